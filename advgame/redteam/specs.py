"""How a model is named on the command line, and the model that the name stands for.

path/to/model            a Hugging Face folder, sampled by transformers in this process
path/to/run              a run of `advgame train`: its newest checkpoint's player of the role that is asked for
path/to/run:initial      that player before training;  path/to/run:step-000100  at another checkpoint
vllm:PATH                any of these, sampled by vLLM
http://host:8000/v1#name the model `name` of an OpenAI-compatible server; settings of the endpoint may follow as
                         ?key=value&..., for example #name?api_key_env=KEY&concurrency=8&rpm=60
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

import torch
from pydantic import ValidationError
from transformers import AutoConfig

from advgame.config import Config, load_config
from advgame.errors import InputError
from advgame.learn.load import load_model
from advgame.redteam.targets import LocalModel, Model, RemoteModel
from advgame.rollout import vllm_start
from advgame.rollout.chat import ChatFormat, load_tokenizer, stop_ids
from advgame.rollout.endpoint_engine import check_endpoint
from advgame.rollout.engine import Engine
from advgame.rollout.settings import EndpointSettings, VllmSettings
from advgame.rollout.transformers_engine import TransformersEngine
from advgame.rollout.vllm_engine import VllmEngine
from advgame.run.checkpoint_files import latest_checkpoint, list_checkpoints
from advgame.world.world import World, open_world

PLAYERS: Mapping[str, str] = {"attacker": "attacker", "target": "defender", "judge": "defender"}
"""Which player of a run speaks in a role."""


@dataclass(frozen=True)
class Spec:
    """One named model, checked but not loaded. `config` is that of the run it comes from, `initial` whether it is
    the player before training; `folder` is None where the world has yet to make that player, and for a server.
    """

    text: str
    field: str
    engine: str
    folder: Path | None = None
    endpoint: EndpointSettings | None = None
    per_minute: float | None = None
    config: Config | None = None
    player: str = ""

    @property
    def world(self) -> World | None:
        """The tiny world of the run, if it was played there."""
        return None if self.config is None or self.config.world is None else open_world(self.config.world)

    def model_folder(self) -> Path:
        """The folder of a local model; the world may train its player now, for half a minute."""
        if self.folder is not None:
            return self.folder
        world = self.world
        assert world is not None, "only a world's player lacks a folder"
        path: Path = getattr(world, f"{self.player}_path")
        return path

    def identity(self) -> str:
        """Names weights or server; two local models are the same if their weight files are (sampled) equal."""
        if self.endpoint is not None:
            return f"{self.endpoint.url}#{self.endpoint.model}"
        return weights_digest(self.model_folder())


def parse_spec(text: str, field: str, role: str) -> Spec:
    """What `text` names in `role` (a key of PLAYERS). Loads and sends nothing. Raises InputError naming `field`."""
    if text.startswith(("http://", "https://")):
        return _endpoint(text, field)
    engine = "transformers"
    if text.startswith("vllm:"):
        engine, text = "vllm", text.removeprefix("vllm:")
        vllm_start.vllm_version(field)
    path, colon, which = text.rpartition(":")
    folder = Path(path if colon else text)
    if (folder / "config.yaml").is_file():
        spec = _player(folder, which if colon else "", field, role, engine)
    elif colon and (Path(text) / "config.json").is_file():  # a folder whose own name holds a colon
        spec = Spec(text, field, engine, Path(text))
    else:
        spec = Spec(text, field, engine, Path(text))
    if spec.folder is not None:
        load_tokenizer(spec.folder, field)
        if engine == "vllm":
            vllm_start.check_model(spec.folder, field, VllmSettings())
    return spec


def _player(run: Path, which: str, field: str, role: str, engine: str) -> Spec:
    config = load_config(run / "config.yaml")
    player = "shared" if config.game.self_play else PLAYERS[role]
    text = f"{run}:{which}" if which else str(run)
    if which == "initial":
        own: Path | None = getattr(config, "defender" if player == "shared" else player).model
        if own is None and config.world is None:
            raise InputError(f"{field}: the run {run} has no {player}")
        return Spec(text, field, engine, own, config=config, player=player)
    if which:
        found = {path.name: path for _, path in list_checkpoints(run / "checkpoints")}.get(which)
        if found is None:
            names = ", ".join(path.name for _, path in list_checkpoints(run / "checkpoints")) or "none"
            raise InputError(f"{field}: {run} has no checkpoint {which!r}; there are: initial, {names}")
    else:
        found = latest_checkpoint(run / "checkpoints").path
        if found is None:
            raise InputError(f"{field}: {run} has no intact checkpoint; write {run}:initial for the untrained player")
    for name in (f"{player}-ema", player):
        if (found / name / "config.json").is_file():
            return Spec(text, field, engine, found / name, config=config, player=player)
    raise InputError(f"{field}: {found} holds no {player}, since it did not learn; write {run}:initial")


def _endpoint(text: str, field: str) -> Spec:
    url, mark, rest = text.partition("#")
    name, _, options = rest.partition("?")
    if not mark or not name:
        raise InputError(f"{field}: {text!r} names no model; write {url or 'http://host:8000/v1'}#MODEL")
    given: dict[str, object] = dict(parse_qsl(options, keep_blank_values=True))
    try:
        per_minute = float(str(given.pop("rpm"))) if "rpm" in given else None
        if per_minute is not None and per_minute <= 0:
            raise ValueError("rpm must be positive")
        settings = EndpointSettings.model_validate({"url": url, "model": name} | given)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join([*(k for k in EndpointSettings.model_fields if k not in ("url", "model")), "rpm"])
        raise InputError(
            f"{field}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}; known: {known}"
        ) from None
    except ValueError:
        raise InputError(f"{field}: rpm: write a positive number of requests a minute") from None
    check_endpoint(settings, field)
    return Spec(text, field, "endpoint", endpoint=settings, per_minute=per_minute)


@dataclass
class Models:
    """Opens models, each set of weights once. `remote`: some model is a server, so engines must not block the loop."""

    dtype: str
    remote: bool
    counters: Counter[str]
    vllm: VllmSettings = field(default_factory=VllmSettings)
    _open: dict[tuple[str, str], Model] = field(default_factory=dict)

    async def open(self, spec: Spec, name: str) -> Model:
        """`name` begins the keys of its counters. Raises InputError or EngineError."""
        if spec.endpoint is not None:
            key = (spec.engine, f"{name} {spec.text}")
            if key not in self._open:
                self._open[key] = RemoteModel(name, spec.endpoint, spec.per_minute, self.counters)
            return self._open[key]
        key = (spec.engine, spec.identity())
        if key not in self._open:
            self._open[key] = await self._local(spec, name)
        return self._open[key]

    async def close(self) -> None:
        for model in self._open.values():
            await model.close()

    async def _local(self, spec: Spec, name: str) -> LocalModel:
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
        return LocalModel(name, spec.identity(), engine, ChatFormat(tokenizer), positions, self.counters)


def weights_digest(folder: Path, sample: int = 1 << 20) -> str:
    """16 hex digits over names, sizes and both ends of a model folder's weight files and its config (blake2b)."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(sample))
            file.seek(max(0, size - sample))
            digest.update(file.read(sample))
    return digest.hexdigest()
