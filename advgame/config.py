"""The one tree of settings: a YAML file plus `--a.b value` overrides, validated before anything heavy loads."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError

from advgame.cluster.settings import ClusterSettings
from advgame.combinations import COMBINATIONS, WORLD_VERDICT_TOKENS, says_verdict_length, world_judges
from advgame.errors import InputError
from advgame.game.settings import GameSettings, JudgeSettings
from advgame.learn.settings import LearnSettings
from advgame.rollout.settings import RolloutSettings, SamplingSettings
from advgame.run.settings import RunSettings
from advgame.settings import Section
from advgame.world.settings import WorldSettings


class DataSettings(Section):
    train: Path | None = Field(None, description="Seed file (JSONL, JSON, CSV, TSV, Parquet); null: the world's seeds.")
    validation: list[Path] = Field([], description="Held-out seed files, sent straight to the Defender.")
    columns: dict[str, str] = Field(
        {}, description="Which columns of the seed files hold `prompt` and `category`, if others."
    )
    category: Literal["harmful", "benign"] | None = Field(None, description="Category of a file without one.")
    harmful: int = Field(32, ge=0, description="Harmful seeds a step.")
    benign: int = Field(32, ge=0, description="Benign seeds a step.")
    validation_limit: PositiveInt = Field(
        128, description="Seeds of each validation file that are used; and of training, for sampled ASR."
    )


class PlayerSettings(Section):
    model: Path | None = Field(None, description="Hugging Face model folder; null: the world's warm-started player.")
    lr: PositiveFloat | None = Field(None, description="This player's learning rate; null: learn.lr.")
    frozen: bool = Field(False, description="Never updated (fixed Attacker or fixed Defender).")
    sampling: SamplingSettings = Field(default_factory=SamplingSettings, description="How it samples.")


class Config(Section):
    """Everything that decides a run."""

    trust_remote_code: bool = Field(False, description="Let model folders run their own Python code.")
    run: RunSettings = Field(default_factory=RunSettings, description="Length, seed, outputs.")
    world: WorldSettings | None = Field(None, description="The embedded tiny world; null: real models and seed files.")
    data: DataSettings = Field(default_factory=DataSettings, description="Seeds.")
    attacker: PlayerSettings = Field(default_factory=PlayerSettings, description="The Attacker.")
    defender: PlayerSettings = Field(default_factory=PlayerSettings, description="The Defender.")
    judge: JudgeSettings = Field(default_factory=JudgeSettings, description="The judge.")
    game: GameSettings = Field(default_factory=GameSettings, description="Rules of the game.")
    rollout: RolloutSettings = Field(default_factory=RolloutSettings, description="Sampling.")
    learn: LearnSettings = Field(default_factory=LearnSettings, description="Learning.")
    cluster: ClusterSettings = Field(default_factory=ClusterSettings, description="Where vLLM engines run.")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path`, applies `--a.b value` words, validates.

    Raises InputError with one line: the file, the field's path, what is wrong and the mend.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such config file; try configs/tiny.yaml")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a config is a mapping of sections, found {type(tree).__name__}")
    tree = _apart(tree)
    for field, value in parse_overrides(overrides):
        _put(tree, field, value)
    return build_config(tree, str(path))


def build_config(tree: dict[str, Any], source: str) -> Config:
    """Validates a plain tree; `source` names it in errors."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error)}") from None
    for check in COMBINATIONS:
        if (problem := check(config)) is not None:
            raise InputError(f"{source}: {problem}")
    if config.world is not None:
        config.world.reasoning = config.game.reasoning
    if world_judges(config) and not says_verdict_length(config.judge):
        # the default is meant for judges that reason; all positions of the world's own would not hold it
        config.judge.sampling.max_tokens = WORLD_VERDICT_TOKENS
    return config


def dump_config(config: Config) -> str:
    """The resolved tree as YAML that loads to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """`--a.b 1`, `--a.b=1` -> [("a.b", 1)]; values are read as YAML."""
    pairs: list[tuple[str, Any]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise InputError(f"unexpected argument {word!r}; overrides are written --section.field value")
        field, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise InputError(f"--{field} has no value; write --{field} VALUE")
            value = rest.pop(0)
        try:
            pairs.append((field, _scalar(value)))
        except yaml.YAMLError:
            pairs.append((field, value))
    return pairs


def _scalar(text: str) -> Any:
    if not text.strip():
        return text
    value = yaml.safe_load(text)
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        return text  # prose with a colon, not a mapping
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            return value
    return value


def _apart(value: Any) -> Any:
    """A copy in which nothing is shared: YAML aliases are one object, and an override must change one of them only."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value


def _put(tree: dict[str, Any], field: str, value: Any) -> None:
    *sections, leaf = field.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[leaf] = value


def _explain(error: ValidationError) -> str:
    """The first problem as "field: what is wrong", with a near name for an unknown key."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key{_nearest(first['loc'])}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{path}: {first['msg'].lower()}, got {first['input']!r}{more}"


def _nearest(location: tuple[int | str, ...]) -> str:
    section: Any = Config
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    names = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def describe_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, default, meaning) of every setting, in order."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is not None:
            yield path, "null" if field.default is None else "(section)", field.description or ""
            yield from describe_fields(section, f"{path}.")
        else:
            if field.is_required():
                yield path, "(required)", field.description or ""
                continue
            default = field.get_default(call_default_factory=True)
            kinds = [] if get_origin(field.annotation) is dict else candidates
            choices = [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
            meaning = f"{field.description or ''}{' One of: ' + ', '.join(choices) + '.' if choices else ''}"
            yield path, yaml.safe_dump(_plain(default), default_flow_style=True).split("\n")[0], meaning


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
