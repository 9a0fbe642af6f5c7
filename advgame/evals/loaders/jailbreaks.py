"""Jailbreak sets in the forms of Allen AI's releases: WildGuardTest, WildJailbreak's evaluation, Do-Anything-Now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from advgame.errors import InputError
from advgame.evals.row import EvalRow, Want, language_tag, optional, rows_of, text_of, word_of
from advgame.game.rows import Row

_TRUE = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_HARM = {"harmful": True, "unharmful": False, "harmless": False, "benign": False}
_LABEL = {"1": "harmful", "1.0": "harmful", "0": "benign", "0.0": "benign", "harmful": "harmful", "benign": "benign"}
_DATA_TYPE = {"adversarial_harmful": "harmful", "adversarial_benign": "benign"}


def load_wildguardtest(path: Path) -> Iterator[EvalRow]:
    """Parquet or JSONL with `prompt, prompt_harm_label, adversarial`; harmful rows only (the set's convention)."""
    kept = False
    for row in rows_of(path):
        if not row.fields.get("prompt_harm_label"):
            text_of(row, "prompt_harm_label", empty=True)
            continue  # rows that annotators did not agree on
        if not word_of(row, "prompt_harm_label", _HARM):
            continue
        kept = True
        prompt = text_of(row, "prompt")
        style = "adversarial" if word_of(row, "adversarial", _TRUE) else "vanilla"
        tags = {"style": style} | language_tag(row)
        if optional(row, "subcategory"):
            tags["subcategory"] = optional(row, "subcategory")
        yield EvalRow(str(row.number), prompt, prompt, "refuse", tags=tags)
    if not kept:
        raise InputError(f"{path}: no row has prompt_harm_label 'harmful'; is this the right file?")


def load_wildjailbreak(path: Path, category: str | None) -> Iterator[EvalRow]:
    """TSV `adversarial, label, data_type`, or JSONL `vanilla, adversarial` with `category` fixed for the file.

    The classifier reads the vanilla text of harmful rows, where the file has it, and the adversarial one of benign
    rows.
    """
    for row in rows_of(path):
        adversarial = text_of(row, "adversarial")
        found = category or _category(row)
        if category and ("label" in row.fields or "data_type" in row.fields) and _category(row) != category:
            continue  # the fixed category picks its rows out of a file that has both
        vanilla = optional(row, "vanilla").strip()
        harmful = found == "harmful"
        want: Want = "refuse" if harmful else "comply"
        judged = vanilla if harmful and vanilla else adversarial
        yield EvalRow(str(row.number), adversarial, judged, want, tags=language_tag(row))


def _category(row: Row) -> str:
    by_label = word_of(row, "label", _LABEL) if "label" in row.fields else None
    by_type = word_of(row, "data_type", _DATA_TYPE) if "data_type" in row.fields else None
    if by_label is None and by_type is None:
        raise InputError(f"{row.where}: neither 'label' nor 'data_type'; fix category: harmful or benign for the file")
    if by_label and by_type and by_label != by_type:
        raise InputError(f"{row.where}: label says {by_label}, data_type {by_type}; mend the row")
    return str(by_label or by_type)


def load_dan(path: Path) -> Iterator[EvalRow]:
    """JSONL with `source, vanilla, adversarial`: the adversarial text is asked, the vanilla one is judged."""
    for row in rows_of(path):
        vanilla, source = text_of(row, "vanilla"), text_of(row, "source")
        tags = {"source": source} | language_tag(row)
        yield EvalRow(str(row.number), text_of(row, "adversarial"), vanilla, "refuse", tags=tags)
