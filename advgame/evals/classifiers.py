"""Classifiers from their settings: checked first, opened when they are needed, on any engine or endpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from advgame.errors import InputError
from advgame.evals.classify import Classifier, ModelClassifier, PhraseClassifier, WorldClassifier
from advgame.evals.formats import FORMATS, renderer
from advgame.evals.models import EngineSettings, Form, Opened, open_model, raw_tokenizer
from advgame.evals.named import ModelSpec, parse_model
from advgame.evals.store import digest
from advgame.evals.suites import ClassifierSettings
from advgame.rollout.engine import Sampling

EMBEDDED = {"phrases": PhraseClassifier, "world": WorldClassifier}
WIDTH = 256
"""Questions at once to an embedded classifier, which answers immediately."""


@dataclass
class OpenClassifier:
    """A classifier that answers. `identity` names its weights, text and limits; `title` is printed with figures."""

    classifier: Classifier
    identity: str
    title: str
    width: int = WIDTH
    model: Opened | None = None

    async def close(self) -> None:
        if self.model is not None:
            await self.model.close()


def check_classifier(settings: ClassifierSettings, field: str) -> ModelSpec | None:
    """Settings and model folder, without loading. Raises InputError naming `field`."""
    if settings.kind in EMBEDDED:
        if settings.model is not None:
            raise InputError(f"{field}: {settings.kind} asks no model; write {settings.kind} alone")
        return None
    if settings.model is None:
        raise InputError(f"{field}: {settings.kind} asks a model; write {settings.kind}@FOLDER or @http://host/v1#name")
    renderer(settings.kind, settings.template, None)
    spec = parse_model(settings.model, field, "judge", needs_template=not _raw(settings))
    if _clip(settings) and spec.endpoint is not None and settings.tokenizer is None:
        raise InputError(
            f"{field}: {settings.kind} reads {_clip(settings)} tokens of its own of a response; give `tokenizer:` (a "
            "folder with the classifier's tokenizer), or `clip: 0` to send responses whole"
        )
    return spec


async def open_classifier(
    settings: ClassifierSettings, field: str, engine: EngineSettings, *, seed: int, counters: Counter[str]
) -> OpenClassifier:
    """Loads the classifier's model, or reaches its server. Raises InputError or EngineError with one line."""
    spec = check_classifier(settings, field)
    if spec is None:
        made: Classifier = EMBEDDED[settings.kind]()
        return OpenClassifier(made, settings.kind, settings.kind)
    form = FORMATS[settings.kind]
    sampling = Sampling(settings.temperature, 1.0, settings.max_tokens or form.max_tokens)
    shape: Form = "raw" if _raw(settings) else "turns" if form.conversation and settings.template is None else "chat"
    opened = await open_model(
        spec, sampling, engine, name=f"classifier {settings.kind}", seed=seed, counters=counters, form=shape
    )
    render = renderer(settings.kind, settings.template, _clipper(settings, spec, field))
    name = f"{settings.kind}@{spec.name}"
    own = settings.template.name if settings.template else "chat template" if form.conversation else "our wording"
    text = settings.template.read_text(encoding="utf-8") if settings.template else own
    identity = str(digest(settings.kind, spec.identity(), text, sampling, shape, _clip(settings), seed))
    return OpenClassifier(
        ModelClassifier(name, opened.speaker, render, form.parse, sampling), identity, f"{name} ({own})", opened.width,
        opened,
    )  # fmt: skip


def _raw(settings: ClassifierSettings) -> bool:
    return settings.template is not None if settings.raw is None else settings.raw


def _clip(settings: ClassifierSettings) -> int | None:
    default = FORMATS[settings.kind].clip
    return (default if settings.clip is None else settings.clip) or None


def _clipper(settings: ClassifierSettings, spec: ModelSpec, field: str) -> Callable[[str], str] | None:
    most = _clip(settings)
    if most is None or (settings.tokenizer is None and spec.endpoint is not None):
        return None
    folder = settings.tokenizer or spec.model_folder()
    return clipper(raw_tokenizer(folder, f"{field}.tokenizer"), most)


def clipper(tokenizer: Any, most: int) -> Callable[[str], str]:
    """Cuts a text after its first `most` tokens, special tokens not counted; a shorter one is left as it is."""

    def clip(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= most else str(tokenizer.decode(ids[:most], skip_special_tokens=True))

    return clip
