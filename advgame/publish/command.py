"""`advgame publish --plan MODEL`: records, prints, saves and compares the copy plan of a model folder."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import torch

from advgame.errors import InputError
from advgame.publish.channels import record_plans
from advgame.publish.plan import Plan, Source, sources_of
from advgame.publish.record import PlanRefused
from advgame.rollout import vllm_start
from advgame.rollout.settings import VllmSettings
from advgame.rollout.vllm_limit import Limit


def run_publish(arguments: argparse.Namespace) -> int:
    """Starts vLLM with random weights, asks its loader, ends it. 0: done; 1: refused, or differs from `--diff`."""
    folder: Path = arguments.plan
    vllm_start.vllm_version("publish --plan")
    saved = None if arguments.diff is None else read_plans(arguments.diff)
    settings = VllmSettings(tensor_parallel=arguments.tensor_parallel, max_sequences=8, cache_gib=0.25)
    sources = model_sources(folder, "--plan")
    vllm_start.check_model(folder, "--plan", settings)
    try:
        plans = asyncio.run(_record(folder, settings, arguments.dtype, sources))
    except PlanRefused as refusal:
        print(f"{folder}: direct writes are refused; weights would go through vLLM's loader, which is slower")
        for reason in refusal.reasons:
            print(f"  {reason}")
        return 1
    if saved is None:
        for plan in plans:
            print("\n".join(plan.lines()))
    if arguments.save is not None:
        arguments.save.write_text(json.dumps([plan.to_tree() for plan in plans], indent=1) + "\n", encoding="utf-8")
    if saved is None:
        return 0
    if len(saved) != len(plans):
        print(f"{arguments.diff}: {len(saved)} ranks, now {len(plans)}")
        return 1
    lines = [line for old, new in zip(saved, plans, strict=True) for line in old.diff(new)]
    print("\n".join(lines) if lines else f"equal: plan {', '.join(plan.hash for plan in plans)}")
    return 1 if lines else 0


def model_sources(folder: Path, field: str) -> tuple[Source, ...]:
    """Names and shapes of a folder's parameters, from its config alone (tied ones once)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise InputError(f"{field}: {folder} has no config.json; give a Hugging Face model folder")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return sources_of(model.named_parameters())


def read_plans(path: Path) -> list[Plan]:
    """Plans that `--save` wrote, by rank."""
    try:
        return [Plan.from_tree(tree) for tree in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--diff: {path} is no saved plan ({type(error).__name__}); write one with --save") from error


async def _record(folder: Path, settings: VllmSettings, dtype: str, sources: tuple[Source, ...]) -> list[Plan]:
    arguments = vllm_start.engine_arguments(folder, settings, dtype=dtype, direct=True, dummy=True)
    with Limit(settings.start_timeout_s).turn():
        llm = vllm_start.start(arguments, settings, None)
    try:
        return await record_plans(llm, folder.resolve().name, sources)
    finally:
        vllm_start.end(llm)
