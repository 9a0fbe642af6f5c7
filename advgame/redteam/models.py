"""The models of a red-team run (see `evals/named.py`), opened as partners in conversations, each weights once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from transformers import AutoConfig

from advgame.evals.models import chat_format, open_engine
from advgame.evals.named import ModelSpec
from advgame.redteam.targets import LocalModel, Model, RemoteModel
from advgame.rollout.chat import load_tokenizer
from advgame.rollout.settings import VllmSettings


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
        positions = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
        if spec.engine == "vllm":
            positions = min(positions or 1 << 62, self.vllm.max_model_len or 1 << 62)
        engine = await open_engine(
            spec, folder, tokenizer, name=name, dtype=self.dtype, vllm=self.vllm, counters=self.counters,
            deterministic=not self.remote,
        )  # fmt: skip
        return LocalModel(name, spec.identity(), engine, chat_format(spec, tokenizer), positions, self.counters)
