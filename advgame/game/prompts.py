"""The texts that the players and the judge read: template files, checked when loaded, filled in one pass.

A template is a Markdown file with `{name}` placeholders (`{{name}}` writes `{name}` literally). The package
brings one for every use; a file of the same name in the user's directory takes its place. Whatever is
inserted is escaped (`escaping.py`), so that a seed, an attack or an answer can neither leave its tags nor
pose as a verdict.

A judge's template begins with what is the same for every question of its rubric and ends with the material: an
engine that keeps the prefixes of prompts computes a rubric once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from advgame.errors import InputError
from advgame.game.escaping import escape
from advgame.game.tree import Category, Rubric, Seed


@dataclass(frozen=True)
class Rules:
    """What a template must contain: placeholders, and literal text its reader must be told.

    form: the template whose text stands for `{format}`, and then shows what this one must show; without `{style}`.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    form: str = ""


Style = Literal["reason", "brief", "verdict"]
"""How a judge answers: reasoning first, two sentences of it at the most, or the bare verdict."""

_SHOWN = {
    "pair": ("<score_A>", "</score_A>", "<score_B>", "</score_B>"),
    "point": ("<score>", "</score>"),
    "faithful": ("<verdict>", "</verdict>"),
}

RULES: Mapping[str, Rules] = {
    "attacker_harmful": Rules(("seed",), ("format",)),
    "attacker_benign": Rules(("seed",), ("format",)),
    "format_reasoning": Rules(shows=("<think>", "</think>", "<prompt>", "</prompt>")),
    "format_plain": Rules(shows=("<prompt>", "</prompt>")),
    "defender_reasoning": Rules(("prompt",), shows=("<think>", "</think>")),
    "judge_faithful": Rules(("seed", "attack"), ("format",), _SHOWN["faithful"], "verdict_faithful"),
    **{
        f"judge_pair_{rubric}": Rules(("query", "answer_a", "answer_b"), ("format",), _SHOWN["pair"], "verdict_pair")
        for rubric in Rubric
    },
    **{
        f"judge_point_{rubric}": Rules(("query", "answer"), ("format",), _SHOWN["point"], "verdict_point")
        for rubric in Rubric
    },
    **{f"verdict_{form}_{style}": Rules(shows=tags) for form, tags in _SHOWN.items() for style in get_args(Style)},
}
"""The templates by name (file stem)."""

_PLACEHOLDER = re.compile(r"\{\{(?P<literal>[A-Za-z_]\w*)\}\}|\{(?P<name>[A-Za-z_]\w*)\}")
_CLOSING_TAG = re.compile(r"</([A-Za-z][A-Za-z0-9_]*)>")


@dataclass(frozen=True)
class Templates:
    """Checked templates by name.

    `reasoning`: the Attacker reasons first; `defender_reasoning`: so does the Defender. `style`: how the judge
    answers. `tags` are the tags that the templates use besides the package's own; inserted text is kept from them too.
    """

    texts: Mapping[str, str]
    reasoning: bool = True
    defender_reasoning: bool = False
    tags: frozenset[str] = frozenset()
    style: Style = "reason"

    @classmethod
    def load(
        cls,
        directory: Path | None = None,
        reasoning: bool = True,
        defender_reasoning: bool = False,
        style: Style = "reason",
    ) -> Templates:
        """The package's templates, with those in `directory` in their place.

        Raises:
            InputError: no such directory; a file there that is no template of ours (README.md aside), is
            empty or is
                not UTF-8; a placeholder that is missing or unknown; a tag its reader must be told that is
                missing; a `style` other than "reason" and a judge's text in `directory` without `{format}`.
        """
        if directory is not None:
            _check_directory(directory)
        package = resources.files("advgame.game") / "templates"
        texts: dict[str, str] = {}
        for name, rules in RULES.items():
            own = None if directory is None else directory / f"{name}.md"
            if own is not None and own.exists():
                path, raw = str(own), _read(own)
            else:
                path, raw = f"{name}.md", (package / f"{name}.md").read_bytes()
            texts[name] = checked_template(path, raw, rules)
            if rules.form and style != "reason" and "{format}" not in texts[name]:
                raise InputError(
                    f"{path}: says itself how to answer, so judge.style: {style} cannot; put {{format}} in its place"
                )
        tags = frozenset(tag.lower() for text in texts.values() for tag in _CLOSING_TAG.findall(text))
        return cls(texts, reasoning, defender_reasoning, tags, style)

    def attacker(self, seed: Seed) -> str:
        """The Attacker's turn: instruction for the seed's category, the seed, and the form of the answer."""
        name = "attacker_harmful" if seed.category is Category.HARMFUL else "attacker_benign"
        form = self._fill("format_reasoning" if self.reasoning else "format_plain", {})
        return self._fill(name, {"seed": seed.text}, form=form)

    def defender(self, prompt: str) -> str:
        """The Defender's turn: the attack word for word, or within the reasoning template (then escaped)."""
        return self._fill("defender_reasoning", {"prompt": prompt}) if self.defender_reasoning else prompt

    def faithful(self, seed: Seed, attack: str) -> str:
        """The judge's turn on whether `attack` keeps the intent of `seed`."""
        return self._fill("judge_faithful", {"seed": seed.text, "attack": attack})

    def pair(self, rubric: Rubric, query: str, a: str, b: str) -> str:
        """The judge's turn on two answers to one query."""
        return self._fill(f"judge_pair_{rubric}", {"query": query, "answer_a": a, "answer_b": b})

    def point(self, rubric: Rubric, query: str, answer: str) -> str:
        """The judge's turn on one answer alone."""
        return self._fill(f"judge_point_{rubric}", {"query": query, "answer": answer})

    def _fill(self, name: str, values: Mapping[str, str], form: str = "") -> str:
        if RULES[name].form:
            form = self._fill(f"{RULES[name].form}_{self.style}", {})
        inserted = {key: escape(value, self.tags) for key, value in values.items()} | {"format": form}
        return fill_template(self.texts[name], inserted)


def fill_template(text: str, inserted: Mapping[str, str]) -> str:
    """`text` with its placeholders filled in one pass; what is `inserted` must have been escaped already."""

    def replace(match: re.Match[str]) -> str:
        literal = match["literal"]
        return f"{{{literal}}}" if literal else inserted[match["name"]]

    return _PLACEHOLDER.sub(replace, text)


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such template directory; name a folder of .md files, or leave it out")
    for path in sorted(directory.glob("*.md")):
        if path.stem not in RULES and path.name != "README.md":
            raise InputError(f"{path}: no template has this name; use one of {', '.join(RULES)} (.md)")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend or remove the file") from error


def checked_template(path: str, raw: bytes, rules: Rules) -> str:
    """A template file's text. InputError if it is empty, no UTF-8, or lacks what `rules` ask for."""
    try:
        # Outer white space would become part of what the players learn to expect.
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    if not text:
        raise InputError(f"{path}: empty template; write its text, or remove the file to use the package's own")
    found = {match["name"] for match in _PLACEHOLDER.finditer(text)} - {None}
    known = (*rules.required, *rules.optional)
    for name in sorted(found - set(known)):
        allowed = ", ".join(f"{{{k}}}" for k in known) or "none"
        raise InputError(
            f"{path}: unknown placeholder {{{name}}}; this template knows {allowed} "
            f"(write {{{{{name}}}}} for literal text)"
        )
    for name in rules.required:
        if name not in found:
            raise InputError(f"{path}: placeholder {{{name}}} is missing; put it where that text shall stand")
    for tag in rules.shows:
        if tag not in text and not (rules.form and "format" in found):
            raise InputError(f"{path}: the text never shows {tag}, so no answer would have it; say where it goes")
    return text
