"""What a run attacks: the harmful seeds of a file, in the columns of the public behaviour sets or in our own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from advgame.errors import InputError
from advgame.game.rows import read_rows
from advgame.game.seeds import seed_of_row
from advgame.game.tree import Category, Seed
from advgame.world.world import World

TEXT_COLUMNS = ("prompt", "vanilla", "adversarial", "Behavior", "Goal", "forbidden_prompt")
"""Columns that hold a goal, in the order in which they are looked for (ours, WildJailbreak, HarmBench,
JailbreakBench, StrongREJECT)."""

CONTEXT_BREAK = "\n\n---\n\n"
"""Between HarmBench's context and behaviour."""


@dataclass(frozen=True)
class Goals:
    """The seeds to attack, in the order of the file, and how many benign rows were left out."""

    seeds: tuple[Seed, ...]
    benign: int


WORLD = Path("world")
"""Names the tiny world's own seeds instead of a file."""


def world_goals(world: World, limit: int | None = None) -> Goals:
    """The 24 harmful seeds of the tiny world: the 18 of the game, then the 6 held out."""
    harmful = [s for s in (*world.train_seeds, *world.heldout_seeds) if s.category is Category.HARMFUL]
    return Goals(tuple(harmful[:limit]), 0)


def read_goals(path: Path, limit: int | None = None) -> Goals:
    """The harmful rows of `path` (every row, where no column tells), at most the first `limit`.

    A seed's id is the file's stem and row; HarmBench's `BehaviorID` and JailbreakBench's `Index` stay in its meta.
    HarmBench's contextual behaviours become context, a rule, and the behaviour.

    Raises InputError: bad rows, an unknown layout, nothing harmful in it.
    """
    seeds: list[Seed] = []
    benign = 0
    for row in read_rows(path):
        column = next((name for name in TEXT_COLUMNS if name in row.fields), None)
        if column is None:
            raise InputError(f"{row.where}: no column of goals; name one of {', '.join(TEXT_COLUMNS)}")
        if column == "Behavior" and "Goal" in row.fields:
            column = "Goal"  # JailbreakBench's Behavior is a short title
        told = "category" if "category" in row.fields else "data_type" if "data_type" in row.fields else None
        foreign = column in ("Behavior", "Goal", "forbidden_prompt") or told is None
        columns = {} if column in ("prompt", "vanilla", "adversarial") else {"prompt": column}
        named = row if not foreign else replace(row, fields={k: v for k, v in row.fields.items() if k != "category"})
        seed = seed_of_row(path, named, columns, Category.HARMFUL if foreign else None)
        if foreign and isinstance(row.fields.get("category"), str):
            seed = replace(seed, meta={**seed.meta, "category": str(row.fields["category"])[:200]})
        if seed.category is Category.BENIGN:
            benign += 1
            continue
        if not seed.text:
            raise InputError(f"{row.where}: empty text; remove the row or fill it in")
        context = row.fields.get("ContextString")
        if isinstance(context, str) and context.strip():
            seed = replace(seed, text=f"{context.strip()}{CONTEXT_BREAK}{seed.text}")
        if limit is None or len(seeds) < limit:
            seeds.append(seed)
    if not seeds:
        raise InputError(f"{path}: no harmful seeds; red-teaming attacks harmful ones")
    return Goals(tuple(seeds), benign)
