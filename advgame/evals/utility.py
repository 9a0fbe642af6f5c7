"""Utility through lm-evaluation-harness: its own tasks, models and metrics; ours are the call and the table.

Intervals are the harness's standard errors times 1.96, since it keeps its samples to itself.
"""

from __future__ import annotations

import os
from typing import Any

from advgame.errors import InputError
from advgame.evals.metrics import Result
from advgame.evals.models import EngineSettings
from advgame.evals.named import ModelSpec
from advgame.evals.stats import Estimate
from advgame.evals.suites import UtilitySettings
from advgame.rollout.chat import first_line

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}


def run_utility(
    settings: UtilitySettings, spec: ModelSpec, engine: EngineSettings, *, limit: int | None, seed: int
) -> list[Result]:
    """Every numeric metric of every task (IFEval's four among them). InputError: no harness, no such task, no data."""
    if settings.offline:
        os.environ.update(OFFLINE)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("utility: needs lm-evaluation-harness; run: pip install 'advgame[eval]'") from error
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise InputError(f"utility.include_path: {settings.include_path}: no such folder of task files")
    manager = TaskManager(include_path=str(settings.include_path) if settings.include_path else None)
    for task in settings.tasks:
        if not manager.match_tasks([task]):
            raise InputError(f"utility.tasks: lm-evaluation-harness {lm_eval.__version__} has no task {task!r}")
    backend, arguments = backend_of(settings, spec, engine)
    most = min((n for n in (limit, settings.limit) if n is not None), default=None)
    generation = {"max_gen_toks": settings.max_gen_tokens} if settings.max_gen_tokens else None
    try:
        if settings.offline:
            _forbid_nltk()
        out: Any = lm_eval.simple_evaluate(
            model=backend, model_args=arguments, tasks=list(settings.tasks), num_fewshot=settings.few_shot, limit=most,
            batch_size=settings.batch_size, task_manager=manager, log_samples=False, random_seed=seed,
            numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, gen_kwargs=generation,
            apply_chat_template=settings.chat_template, bootstrap_iters=1000,
        )  # fmt: skip
    except ImportError as error:
        mend = "install it, or all of them: pip install 'advgame[eval]'"
        raise InputError(f"utility {', '.join(settings.tasks)}: {first_line(error)}; {mend}") from error
    except (ConnectionError, FileNotFoundError, ValueError, OSError) as error:
        hint = "; it is offline: fill the cache first, or set offline: false" if settings.offline else ""
        raise InputError(f"utility {', '.join(settings.tasks)}: {first_line(error)}{hint}") from error
    assert out is not None, "only other ranks of a parallel run return nothing"
    return harness_results(out, lm_eval.__version__, backend, settings.name)


def _forbid_nltk() -> None:
    """IFEval's checks fetch a tokenizer's data when they are imported; offline, that is an error that names it."""
    try:
        import nltk
    except ImportError:
        return

    def refuse(name: str, *_: object, **__: object) -> None:
        raise ConnectionError(f"nltk lacks {name!r}; fetch it once with: python -m nltk.downloader {name}")

    nltk.download = refuse


def backend_of(settings: UtilitySettings, spec: ModelSpec, engine: EngineSettings) -> tuple[str, dict[str, Any]]:
    """(the harness's model name, its arguments) of a model."""
    import torch

    default = {"transformers": "hf", "vllm": "vllm", "endpoint": "local-chat-completions"}[spec.engine]
    backend = settings.backend or default
    if spec.endpoint is not None:
        if backend not in ("local-completions", "local-chat-completions"):
            raise InputError(f"utility.backend: {backend} loads folders, {spec.text} is a server")
        path = "chat/completions" if backend == "local-chat-completions" else "completions"
        if spec.endpoint.api_key_env:
            os.environ.setdefault("OPENAI_API_KEY", os.environ[spec.endpoint.api_key_env])
        return backend, {
            "model": spec.endpoint.model, "base_url": f"{spec.endpoint.url.rstrip('/')}/{path}",
            "num_concurrent": spec.endpoint.concurrency, "max_retries": spec.endpoint.retries + 1,
            "tokenizer_backend": None,
        }  # fmt: skip
    dtype = engine.dtype if torch.cuda.is_available() else "float32"
    # what a model thinks aloud is no answer, here as in the sets; servers with a reasoning parser see to it themselves
    arguments: dict[str, Any] = {"pretrained": str(spec.model_folder()), "dtype": dtype, "think_end_token": "</think>"}
    if backend == "hf":
        arguments["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    elif backend == "vllm":
        arguments["tensor_parallel_size"] = engine.vllm.tensor_parallel
        arguments["gpu_memory_utilization"] = engine.vllm.memory_share
    else:
        raise InputError(f"utility.backend: {backend} asks a server, {spec.text} is a folder")
    return backend, arguments


def harness_results(out: Any, version: str, backend: str, name: str | None = None) -> list[Result]:
    """The harness's results as ours, one a metric; groups (mmlu) and their members alike."""
    listed = []
    for task, values in out["results"].items():
        n = (out.get("n-samples", {}).get(task) or {}).get("effective")
        if n is None:  # a group: its members' documents
            members = out.get("group_subtasks", {}).get(task, [])
            n = sum((out["n-samples"].get(member) or {}).get("effective", 0) for member in members)
        shots = out.get("n-shot", {}).get(task)
        task_version = out.get("versions", {}).get(task)
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            half = 1.96 * error if isinstance(error, int | float) else float("nan")
            label = metric if filtered in ("none", "") else f"{metric} ({filtered})"
            higher = out.get("higher_is_better", {}).get(task, {}).get(metric, True)
            percent = 0 <= value <= 1
            says = f"lm-evaluation-harness {version}, {backend}, task version {task_version}, {shots}-shot, 1.96 stderr"
            listed.append(
                Result(
                    name or task, label, "utility", "higher" if higher else "lower", says, "its own", "the task",
                    Estimate(float(value), float(value) - half, float(value) + half, int(n or 0)), percent=percent,
                )
            )  # fmt: skip
    return listed
