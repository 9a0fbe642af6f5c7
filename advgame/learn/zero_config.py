"""The user's DeepSpeed JSON against our settings, and what DeepSpeed is given in the end. Imports neither it nor torch.

What decides the gradient has one owner, our settings: a key of the JSON that repeats it is `auto` or equal. Everything
else in the file (buckets, overlap, offload, communication) goes to DeepSpeed as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from advgame.config import Config
from advgame.errors import InputError
from advgame.learn.settings import LearnSettings

Json = Mapping[str, Any]

DEFAULT_STAGE = 2

_REFUSED = {
    "fp16": "players train in float32 or bfloat16; set fp16.enabled: false",
    "amp": "players train in float32 or bfloat16; drop this section",
    "scheduler": "learn.lr and learn.lr_final make the schedule; drop this section",
    "pipeline": "every rank holds the whole player or an equal share of it; drop this section",
    "tensor_parallel": "every rank holds the whole player or an equal share of it; drop this section",
    "compression_training": "players train as they are; drop this section",
    "curriculum_learning": "data order is the run's own; drop this section",
    "data_efficiency": "data order is the run's own; drop this section",
}
_OPTIMIZERS = ("adam", "adamw")


def launched() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_backend(config: Config) -> None:
    """Everything about DeepSpeed that can be told before it or any weight loads. Raises InputError."""
    ranks = launched()
    if config.cluster.trainer_ranks is not None:
        if ranks > 1:
            raise InputError(
                f"cluster.trainer_ranks: Ray starts the trainer's ranks, but torchrun started {ranks} too; start "
                "without torchrun, or leave this out"
            )
        ranks = config.cluster.trainer_ranks
    if config.learn.backend == "plain":
        if ranks > 1:
            raise InputError(
                f"learn.backend: plain trains in one process, but torchrun started {ranks}; set deepspeed, or start "
                "without torchrun"
            )
        return
    if find_spec("deepspeed") is None:
        raise InputError("learn.backend: DeepSpeed is not installed; pip install 'advgame[deepspeed]', or set plain")
    given = read_json(config.learn.deepspeed.config)
    settings = config.learn
    stage_of(settings, given)
    seeds = _seeds_of_an_update(config)
    together = _trains_together(config, ranks)
    per_rank = seeds // together if seeds is not None and together and seeds % together == 0 else None
    file = str(settings.deepspeed.config)
    _agrees(file, given, "gradient_clipping", settings.clip_norm, "learn.clip_norm")
    _agrees(file, given, "gradient_accumulation_steps", 1, "micro-batches follow learn.micro_tokens")
    _agrees(file, given, "train_batch_size", seeds, "seeds of an update: data.harmful, data.benign")
    _agrees(
        file,
        given,
        "train_micro_batch_size_per_gpu",
        per_rank,
        f"seeds of an update on each of {together or ranks} ranks",
    )
    _agrees(file, given, "bf16.enabled", settings.dtype == "bfloat16", "learn.dtype")
    optimizer = given.get("optimizer")
    if optimizer is not None:
        kind = str(_at(given, "optimizer.type") or "auto")
        if kind.lower() not in (*_OPTIMIZERS, "auto"):
            raise InputError(f"{file}: optimizer.type is {kind!r}, but players train by AdamW; set AdamW, or drop it")
        ours = {"betas": list(settings.betas), "weight_decay": settings.weight_decay, "eps": 1e-8}
        for player in ("attacker", "defender"):
            rate = getattr(config, player).lr or settings.lr
            _agrees(file, given, "optimizer.params.lr", rate, f"learn.lr ({player})")
        for key, value in ours.items():
            _agrees(file, given, f"optimizer.params.{key}", value, f"learn.{key}" if key != "eps" else "fixed")
    for key, mend in _REFUSED.items():
        value = given.get(key)
        if value and not (isinstance(value, dict) and value.get("enabled") in (False, "auto")):
            raise InputError(f"{file}: {key}: {mend}")
    for key in ("offload_optimizer", "offload_param"):
        if _at(given, f"zero_optimization.{key}.device") == "nvme":
            raise InputError(
                f"{file}: zero_optimization.{key}.device: averages follow master weights in memory; set cpu"
            )
    for key in ("mics_shard_size", "zero_hpz_partition_size"):
        if (_at(given, f"zero_optimization.{key}") or 0) > 1:
            raise InputError(f"{file}: zero_optimization.{key}: shards lie over all ranks; drop it")


def read_json(path: Path | None) -> dict[str, Any]:
    """The user's file, empty without one. Raises InputError if it is missing or no JSON object."""
    if path is None:
        return {}
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"learn.deepspeed.config: {path}: {error.strerror}; give DeepSpeed's JSON file") from error
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"{path}: a DeepSpeed config is an object, found {type(given).__name__}")
    return given


def stage_of(settings: LearnSettings, given: Json) -> int:
    """The ZeRO stage that settings and file agree on. Raises InputError."""
    ours, theirs = settings.deepspeed.stage, _at(given, "zero_optimization.stage")
    if theirs in (None, "auto"):
        return DEFAULT_STAGE if ours is None else ours
    if theirs not in (0, 1, 2, 3) or isinstance(theirs, bool):
        raise InputError(f"{settings.deepspeed.config}: zero_optimization.stage is {theirs!r}; set 0, 1, 2 or 3")
    if ours is not None and ours != theirs:
        raise InputError(
            f"{settings.deepspeed.config}: zero_optimization.stage is {theirs}, but learn.deepspeed.stage is {ours}; "
            "leave one of them out"
        )
    return int(theirs)


def engine_config(settings: LearnSettings) -> dict[str, Any]:
    """What DeepSpeed is initialised with: the user's file with our own values in the places of `auto`.

    How many micro-batches make an update changes from one to the next and is told call by call; the batch sizes here
    only satisfy DeepSpeed's arithmetic. Stage 0 is clipped by us: DeepSpeed does not tell the norm there.
    """
    given = read_json(settings.deepspeed.config)
    stage = stage_of(settings, given)
    made = {k: v for k, v in given.items() if k not in ("optimizer", "train_batch_size", *_REFUSED)}
    zero = {k: v for k, v in given.get("zero_optimization", {}).items() if v != "auto"}
    made |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip_norm if stage else 0.0,
        "zero_optimization": zero | {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
    }
    made.pop("bf16", None)
    made.setdefault("steps_per_print", 1 << 30)
    if settings.dtype == "bfloat16" and stage:
        made["bf16"] = {"enabled": True}
        types = {k: v for k, v in given.get("data_types", {}).items() if v != "auto"}
        made["data_types"] = {"grad_accum_dtype": "fp32"} | types
        if made.get("communication_data_type", "auto") == "auto":
            made["communication_data_type"] = "fp32"
    return {k: v for k, v in made.items() if v != "auto"}


def _trains_together(config: Config, ranks: int) -> int | None:
    """How many ranks train a player; None: the two players' numbers differ. Raises InputError."""
    attacker = config.learn.deepspeed.attacker_ranks
    if attacker is None:
        return ranks
    if attacker >= ranks:
        more = "start more with torchrun" if config.cluster.trainer_ranks is None else "raise cluster.trainer_ranks"
        raise InputError(
            f"learn.deepspeed.attacker_ranks: {attacker} of {ranks} ranks leave none for the Defender; {more}, or "
            "lower it"
        )
    return attacker if 2 * attacker == ranks else None


def _seeds_of_an_update(config: Config) -> int | None:
    """None: the two categories' updates differ."""
    data = config.data
    if config.learn.accumulate or config.game.self_play:
        return data.harmful + data.benign
    sizes = {n for n in (data.harmful, data.benign) if n}
    return sizes.pop() if len(sizes) == 1 else None


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def _agrees(file: str, given: Json, path: str, ours: Any, owner: str) -> None:
    theirs = _at(given, path)
    if theirs in (None, "auto") or _equal(theirs, ours):
        return
    mend = "set it to auto" if ours is None else f"set it to auto or {json.dumps(ours)}"
    raise InputError(f"{file}: {path} is {json.dumps(theirs)}; {mend} ({owner})")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, int | float) and isinstance(b, int | float) and abs(a - b) <= 1e-12 * max(abs(a), abs(b))
