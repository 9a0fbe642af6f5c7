"""The models of a red-team run (see `evals/named.py`), opened as partners in conversations, each weights once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig

from advgame.evals.models import chat_format
from advgame.evals.named import ModelSpec
from advgame.learn.load import load_model
from advgame.redteam.targets import LocalModel, Model, RemoteModel
from advgame.rollout.chat import load_tokenizer, stop_ids
from advgame.rollout.engine import Engine
from advgame.rollout.settings import VllmSettings
from advgame.rollout.transformers_engine import TransformersEngine
from advgame.rollout.vllm_engine import VllmEngine


@dataclass
class Models:
    """Opens models, each set of weights once. `remote`: some model is a server, so engines must not block the loop."""

    dtype: str
    remote: bool
    counters: Counter[str]
    vllm: VllmSettings = field(default_factory=VllmSettings)
    _open: dict[tuple[str, str, bool], Model] = field(default_factory=dict)

    async def open(self, spec: ModelSpec, name: str) -> Model:
        """`name` begins the keys of its counters. Raises InputError or EngineError."""
        if spec.endpoint is not None:
            key = (spec.engine, f"{name} {spec.text}", False)
            if key not in self._open:
                self._open[key] = RemoteModel(name, spec.endpoint, self.counters)
            return self._open[key]
        key = (spec.engine, spec.identity(), spec.reasons)
        if key not in self._open:
            self._open[key] = await self._local(spec, name)
        return self._open[key]

    async def close(self) -> None:
        for model in self._open.values():
            await model.close()

    async def _local(self, spec: ModelSpec, name: str) -> LocalModel:
        folder = spec.model_folder()
        tokenizer = load_tokenizer(folder, spec.field)
        stops = stop_ids(folder, tokenizer)
        positions = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
        engine: Engine
        if spec.engine == "vllm":
            engine = VllmEngine(
                folder, name=name, settings=self.vllm, dtype=self.dtype, stop_ids=stops, channel=None, restore=None,
                counters=self.counters,
            )  # fmt: skip
            positions = min(positions or 1 << 62, self.vllm.max_model_len or 1 << 62)
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            engine = TransformersEngine(
                load_model(folder, spec.field, dtype=getattr(torch, self.dtype)).to(device),
                stop_ids=stops,
                pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
                deterministic=not self.remote,
            )
        await engine.start()
        return LocalModel(name, spec.identity(), engine, chat_format(spec, tokenizer), positions, self.counters)
