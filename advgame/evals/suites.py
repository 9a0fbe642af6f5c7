"""Suite files: which sets, how they are generated and classified, which utility tasks; strict, in YAML.

Relative paths in a suite file are relative to the file itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt, ValidationError, field_validator

from advgame.errors import InputError
from advgame.evals.formats import FORMATS
from advgame.evals.loaders.behaviour import load_jailbreakbench, load_orbench, load_strongreject, load_xstest
from advgame.evals.loaders.harmbench import load_behaviours, load_cases
from advgame.evals.loaders.jailbreaks import load_dan, load_wildguardtest, load_wildjailbreak
from advgame.evals.loaders.seeds import load_seeds, load_world
from advgame.evals.models import EngineSettings
from advgame.evals.row import EvalRow
from advgame.rollout.settings import Section

Kind = Literal[
    "harmbench", "harmbench-cases", "wildguardtest", "wildjailbreak", "do-anything-now", "xstest", "or-bench",
    "strongreject", "jailbreakbench", "seeds", "world",
]  # fmt: skip
CLASSIFIERS = ("phrases", "world", *FORMATS)


class Generation(Section):
    """How completions are sampled."""

    temperature: NonNegativeFloat | None = Field(None, description="Null: the set's convention (0, or 1).")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass.")
    max_tokens: PositiveInt | None = Field(None, description="Null: the set's convention (512, or 150).")


class ClassifierSettings(Section):
    """One classifier. In short form: `kind`, or `kind@MODEL`."""

    kind: Literal["phrases", "world", "wildguard", "harmbench", "llama-guard", "json", "strongreject"]
    model: str | None = Field(None, description="Folder, vllm:FOLDER or http://host/v1#name, for kinds that ask one.")
    template: Path | None = Field(None, description="The classifier's own prompt text; null: ours.")
    raw: bool | None = Field(
        None, description="Send the text without a chat template; null: whenever a template is given."
    )
    clip: int | None = Field(None, ge=0, description="Longest response in classifier tokens; 0: all; null: the kind's.")
    tokenizer: Path | None = Field(None, description="Folder of the classifier's tokenizer (clipping for a server).")
    max_tokens: PositiveInt | None = Field(None, description="Longest answer; null: the kind's.")
    temperature: NonNegativeFloat = Field(0.0, description="Of the classifier.")


class Translate(Section):
    """Held-out languages: every prompt of the set once more in each language, translated by a model and stored."""

    languages: list[str] = Field(min_length=1, description="As the translator is told them: German, Swahili, ...")
    model: str = Field(description="Who translates.")
    template: Path | None = Field(None, description="Placeholders {text}, {language}; null: ours.")
    max_tokens: PositiveInt = Field(1024, description="Longest translation.")


class SetSettings(Section):
    """One set of questions."""

    set: Kind
    name: str | None = Field(None, pattern=r"^[\w.-]+$", description="In tables and file names; null: the kind.")
    path: Path | None = Field(None, description="The file, brought by you.")
    behaviours: Path | None = Field(None, description="harmbench-cases: the behaviours CSV.")
    convention: Literal["native", "safety-eval"] = Field("native", description="harmbench: whose convention.")
    subset: Literal["all", "standard", "contextual", "copyright"] = Field("all", description="harmbench: which.")
    part: str | None = Field(None, description="or-bench: hard, toxic; jailbreakbench: harmful, benign; world: ...")
    category: Literal["harmful", "benign"] | None = Field(None, description="Of a file without one.")
    columns: dict[str, str] = Field({}, description="seeds: which columns hold prompt and category.")
    by: list[str] = Field([], description="seeds: further columns to break results down by.")
    limit: PositiveInt | None = Field(None, description="First rows only.")
    classifier: str | None = Field(None, description="A name of `classifiers`; null: the suite's default.")
    generation: Generation = Field(default_factory=Generation, description="Where it departs from the convention.")
    translate: Translate | None = Field(None, description="Held-out languages.")

    @property
    def label(self) -> str:
        return self.name or self.set


class UtilitySettings(Section):
    """Tasks of lm-evaluation-harness (the extra `eval`)."""

    tasks: list[str] = Field(min_length=1, description="Names of the harness: mmlu, ifeval, arc_challenge, ...")
    name: str | None = Field(None, description="In the table; null: the task's own.")
    backend: Literal["hf", "vllm", "local-completions", "local-chat-completions"] | None = Field(
        None, description="Null: hf for folders, vllm for vllm:..., local-chat-completions for servers."
    )
    few_shot: int | None = Field(None, ge=0, description="Null: the task's own.")
    limit: PositiveInt | None = Field(None, description="First documents of each task only.")
    include_path: Path | None = Field(None, description="Folder of your own task files.")
    chat_template: bool = Field(True, description="Ask through the model's chat template.")
    batch_size: PositiveInt = Field(8, description="Of the harness.")
    max_gen_tokens: PositiveInt | None = Field(None, description="Longest answer; null: the task's own.")
    offline: bool = Field(True, description="Fail rather than fetch a data set.")


class PairwiseSettings(Section):
    """Answers of the model against a baseline's, by a judge that compares."""

    set: Literal["alpaca-eval", "arena-hard"]
    name: str | None = Field(None, pattern=r"^[\w.-]+$", description="In the table; null: the set.")
    path: Path = Field(description="alpaca-eval: JSON with instruction, output; arena-hard: JSONL uid, prompt.")
    baseline: Path | None = Field(None, description="Answers: arena-hard JSONL uid, output; alpaca-eval: in `path`.")
    judge: str = Field(description="rule, phrases, score@MODEL (0 to 10 a side), or compare@MODEL (five verdicts).")
    generation: Generation = Field(default_factory=Generation, description="Of the model's answers.")
    max_tokens: PositiveInt = Field(1024, description="Of the judge.")
    limit: PositiveInt | None = Field(None, description="First questions only.")

    @property
    def label(self) -> str:
        return self.name or self.set


class Suite(Section):
    """A whole suite."""

    name: str = Field("suite", description="In tables.")
    seed: int = Field(0, ge=0, description="Of sampling and of the bootstrap.")
    classifier: str = Field("phrases", description="Default classifier of all sets.")
    classifiers: dict[str, ClassifierSettings] = Field({}, description="By name.")
    engine: EngineSettings = Field(default_factory=EngineSettings, description="How local models are sampled.")
    sets: list[SetSettings] = Field([], description="What is asked.")
    pairwise: list[PairwiseSettings] = Field([], description="What is compared.")
    utility: list[UtilitySettings] = Field([], description="What lm-evaluation-harness measures.")

    @field_validator("classifiers", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: split_classifier(one) if isinstance(one, str) else one for name, one in value.items()}

    def classifier_of(self, settings: SetSettings) -> ClassifierSettings:
        """A set's classifier; a name that is not in `classifiers` is read as the short form."""
        name = settings.classifier or self.classifier
        return self.classifiers.get(name) or short_classifier(name, "classifier")


def split_classifier(text: str) -> dict[str, str]:
    kind, at, model = text.partition("@")
    return {"kind": kind, "model": model} if at else {"kind": kind}


def short_classifier(text: str, field: str) -> ClassifierSettings:
    """`kind` or `kind@MODEL`. InputError naming the kinds that are known."""
    try:
        return ClassifierSettings.model_validate(split_classifier(text))
    except ValidationError:
        raise InputError(
            f"{field}: no classifier {text!r}; write one of {', '.join(CLASSIFIERS)} (those that ask a model: "
            "json@MODEL), or a name of `classifiers`"
        ) from None


def load_suite(path: Path) -> Suite:
    """A suite file, checked. InputError with one line: file, field, what is wrong, the mend."""
    if not path.is_file():
        raise InputError(f"{path}: no such suite file; try configs/suites/tiny.yaml")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not tree:
        raise InputError(f"{path}: a suite is a mapping with `sets:`, `pairwise:` or `utility:`; this file has none")
    try:
        suite = Suite.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, Suite)}") from None
    if not (suite.sets or suite.pairwise or suite.utility):
        raise InputError(f"{path}: nothing to measure; add `sets:`, `pairwise:` or `utility:`")
    _resolve(suite, path.resolve().parent)
    for number, one in enumerate(suite.sets):
        _check_set(one, f"{path}: sets.{number}")
        suite.classifier_of(one)
    labels = [one.label for one in suite.sets] + [one.label for one in suite.pairwise]
    if twice := sorted({name for name in labels if labels.count(name) > 1}):
        raise InputError(f"{path}: two sets are called {twice[0]!r}; give one of them a name of its own")
    return suite


def _resolve(section: BaseModel, folder: Path) -> None:
    """Paths relative to the suite file, in place."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Path):
            object.__setattr__(section, name, folder / value)
        elif isinstance(value, BaseModel):
            _resolve(value, folder)
        elif isinstance(value, list | dict):
            for one in value.values() if isinstance(value, dict) else value:
                if isinstance(one, BaseModel):
                    _resolve(one, folder)


PARTS: Mapping[str, tuple[str, ...]] = {
    "or-bench": ("hard", "toxic"),
    "jailbreakbench": ("harmful", "benign"),
    "world": ("plain", "adversarial", "all"),
}


def _check_set(one: SetSettings, where: str) -> None:
    if one.set != "world" and one.path is None:
        raise InputError(f"{where}.path: {one.set} needs its file; name it (nothing is fetched)")
    if one.set == "harmbench-cases" and one.behaviours is None:
        raise InputError(f"{where}.behaviours: name HarmBench's behaviours CSV; test cases hold ids only")
    if one.set in PARTS and one.part not in PARTS[one.set]:
        if one.part is None and one.set == "world":
            one.part = "all"
        else:
            raise InputError(f"{where}.part: write {' or '.join(PARTS[one.set])}")
    for field in ("path", "behaviours"):
        path = getattr(one, field)
        if path is not None and not path.is_file():
            raise InputError(f"{where}.{field}: {path}: no such file; data files are brought by you")


def _path(one: SetSettings) -> Path:
    assert one.path is not None, "checked with the suite"
    return one.path


_LOADERS: Mapping[str, Callable[[SetSettings], Iterator[EvalRow]]] = {
    "harmbench": lambda s: load_behaviours(_path(s), native=s.convention == "native", subset=s.subset),
    "harmbench-cases": lambda s: load_cases(_path(s), s.behaviours or Path()),
    "wildguardtest": lambda s: load_wildguardtest(_path(s)),
    "wildjailbreak": lambda s: load_wildjailbreak(_path(s), s.category),
    "do-anything-now": lambda s: load_dan(_path(s)),
    "xstest": lambda s: load_xstest(_path(s)),
    "or-bench": lambda s: load_orbench(_path(s), s.part or "hard"),
    "strongreject": lambda s: load_strongreject(_path(s)),
    "jailbreakbench": lambda s: load_jailbreakbench(_path(s), s.part or "harmful"),
    "seeds": lambda s: load_seeds(_path(s), s.columns, s.category, s.by),
    "world": lambda s: load_world(s.part or "all", s.limit),
}


def load_set(settings: SetSettings, limit: int | None = None) -> Iterator[EvalRow]:
    """The rows of a set, one at a time, at most `limit` and `settings.limit`. InputError names file and line."""
    most = min((n for n in (limit, settings.limit) if n is not None), default=None)
    seen: set[int] = set()
    for number, row in enumerate(_LOADERS[settings.set](settings)):
        if most is not None and number >= most:
            return
        key = hash(row.id)
        if key in seen:
            raise InputError(f"{settings.path}: the id {row.id!r} comes twice; every row needs its own")
        seen.add(key)
        yield row


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem as "field: what is wrong", with a near name for an unknown key or word."""
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        names = _names_at(first["loc"][:-1], root)
        close = difflib.get_close_matches(str(first["loc"][-1]), names, 1)
        return f"{path}: unknown key; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}")
    if first["type"] == "literal_error":
        return f"{path}: unknown {first['loc'][-1]} {first['input']!r}; known: {first['ctx']['expected']}"
    return f"{path}: {first['msg'].lower()}, got {first['input']!r}"


def _names_at(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    section: type[BaseModel] = root
    for part in location:
        if part not in section.model_fields:
            continue  # an index of a list or a key of a mapping
        pending: list[Any] = [section.model_fields[str(part)].annotation]
        while pending:
            one = pending.pop()
            if isinstance(one, type) and issubclass(one, BaseModel):
                section = one
                break
            pending += getattr(one, "__args__", ())
    return list(section.model_fields)
