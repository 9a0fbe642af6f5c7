"""How a model is named on every command line, and what the name stands for; nothing is loaded or sent here.

path/to/model            a Hugging Face folder, sampled by transformers in this process
path/to/run              a run of `advgame train`: its newest checkpoint's player of the role that is asked for
path/to/run:initial      that player before training;  path/to/run:step-000100  at another checkpoint
vllm:PATH                any of these, sampled by vLLM
http://host:8000/v1#name the model `name` of an OpenAI-compatible server; settings of the endpoint may follow as
                         ?key=value&..., for example #name?api_key_env=KEY&concurrency=8&rpm=60
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

from pydantic import ValidationError

from advgame.config import Config, load_config
from advgame.errors import InputError
from advgame.rollout import vllm_start
from advgame.rollout.chat import load_tokenizer
from advgame.rollout.endpoint_engine import check_endpoint
from advgame.rollout.settings import EndpointSettings, VllmSettings
from advgame.run.checkpoint_files import latest_checkpoint, list_checkpoints
from advgame.world.world import World, open_world

PLAYERS: Mapping[str, str] = {"attacker": "attacker", "target": "defender", "judge": "defender"}
"""Which player of a run speaks in a role."""

EngineKind = Literal["transformers", "vllm", "endpoint"]


@dataclass(frozen=True)
class ModelSpec:
    """One named model, checked but not loaded. `config` and `player`: of the run that it comes from, `role`: a key of
    PLAYERS. `folder` is None for a server, and for a world's player before training, which the world has yet to make.
    """

    text: str
    field: str
    engine: EngineKind
    folder: Path | None = None
    endpoint: EndpointSettings | None = None
    config: Config | None = None
    player: str = ""
    role: str = "target"

    @property
    def reasons(self) -> bool:
        """Whether it is to answer as a run's Defender that was trained to reason first."""
        return self.role == "target" and self.config is not None and self.config.game.defender_reasoning

    @property
    def name(self) -> str:
        """Short, for tables and file names; see `short_names` where it must be unique."""
        if self.endpoint is not None:
            return self.endpoint.model.replace("/", "_")
        if self.folder is None:
            return Path(self.text.removeprefix("vllm:")).name.replace(":", "_")
        folder = self.folder
        if folder.parent.parent.name == "checkpoints":  # a player of a run
            return "_".join((folder.parent.parent.parent.name, folder.parent.name, folder.name))
        return folder.name

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


def parse_model(text: str, field: str, role: str = "target", *, needs_template: bool = True) -> ModelSpec:
    """What `text` names in `role` (a key of PLAYERS). Loads no weights, sends nothing. InputError naming `field`."""
    if text.startswith(("http://", "https://")):
        return _endpoint(text, field)
    engine: EngineKind = "vllm" if text.startswith("vllm:") else "transformers"
    path = text.removeprefix("vllm:")
    if engine == "vllm":
        vllm_start.vllm_version(field)
    run, which = _run_of(path)
    if run is not None:
        spec = _player(text, run, which, field, role, engine)
    elif Path(path).exists():
        spec = ModelSpec(text, field, engine, Path(path))
    else:
        raise InputError(
            f"{field}: {path} has no config.json: no such model folder; models are brought by you, nothing is fetched"
        )
    if spec.folder is not None:
        if needs_template:
            load_tokenizer(spec.folder, field)
        if engine == "vllm":
            vllm_start.check_model(spec.folder, field, VllmSettings())
    return spec


def _run_of(path: str) -> tuple[Path | None, str]:
    """(run folder, what follows its colon) of a path that names a run; a model's own name may hold a colon too."""
    folder = Path(path)
    if folder.exists():
        is_run = (folder / "config.yaml").is_file() and not (folder / "config.json").is_file()
        return (folder if is_run else None), ""
    run, colon, which = path.rpartition(":")
    return (Path(run), which) if colon and (Path(run) / "config.yaml").is_file() else (None, "")


def _player(text: str, run: Path, which: str, field: str, role: str, engine: EngineKind) -> ModelSpec:
    config = load_config(run / "config.yaml")
    player = "shared" if config.game.self_play else PLAYERS[role]
    if which == "initial":
        own: Path | None = getattr(config, "defender" if player == "shared" else player).model
        if own is None and config.world is None:
            raise InputError(f"{field}: the run {run} has no {player}")
        return ModelSpec(text, field, engine, own, config=config, player=player, role=role)
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
            return ModelSpec(text, field, engine, found / name, config=config, player=player, role=role)
    raise InputError(f"{field}: {found} holds no {player}, since it did not learn; write {run}:initial")


def _endpoint(text: str, field: str) -> ModelSpec:
    url, mark, rest = text.partition("#")
    name, _, options = rest.partition("?")
    if not mark or not name:
        raise InputError(f"{field}: {text!r} names no model; write {url or 'http://host:8000/v1'}#MODEL")
    given = dict(parse_qsl(options, keep_blank_values=True))
    try:
        settings = EndpointSettings.model_validate({"url": url, "model": name} | given)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(key for key in EndpointSettings.model_fields if key not in ("url", "model"))
        raise InputError(
            f"{field}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}; known: {known}"
        ) from None
    check_endpoint(settings, field)
    return ModelSpec(text, field, "endpoint", endpoint=settings)


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


def short_names(specs: Sequence[ModelSpec]) -> list[str]:
    """A short name for each model, unique among them: the folder's name, with its parents' where needed."""
    names = [spec.name for spec in specs]
    for depth in range(1, 8):
        if len(set(names)) == len(names):
            break
        for i, spec in enumerate(specs):
            if names.count(names[i]) > 1 and spec.folder is not None:
                parts = spec.folder.resolve().parts
                names[i] = "_".join(parts[-1 - depth :])
    return [name if names[:i].count(name) == 0 else f"{name}.{i + 1}" for i, name in enumerate(names)]
