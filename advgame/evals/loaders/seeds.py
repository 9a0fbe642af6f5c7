"""Any seed file as an evaluation set, with a `language` column if it has one; and the tiny world's own seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from advgame.evals.row import EvalRow, Want
from advgame.game.seeds import read_seeds
from advgame.game.tree import Category, Seed
from advgame.world.settings import WorldSettings


def load_seeds(
    path: Path, columns: Mapping[str, str], category: str | None, by: Sequence[str] = ()
) -> Iterator[EvalRow]:
    """The seeds of a file straight to the model; `by` names further columns to break results down by."""
    for seed in read_seeds(path, columns or None, category):
        yield seed_row(seed, by)


def load_world(part: str, limit: int | None) -> Iterator[EvalRow]:
    """The tiny world's held-out seeds: "plain" (12), "adversarial" (128 or `limit`, held-out framings), "all"."""
    from advgame.world.world import open_world

    world = open_world(WorldSettings())
    if part in ("plain", "all"):
        for seed in world.heldout_seeds:
            yield seed_row(seed, (), style="plain")
    if part in ("adversarial", "all"):
        for seed in world.adversarial_seeds(limit or 128):
            yield seed_row(seed, (), style="adversarial")


def seed_row(seed: Seed, by: Sequence[str] = (), **tags: str) -> EvalRow:
    want: Want = "refuse" if seed.category is Category.HARMFUL else "comply"
    found = {key: seed.meta[key] for key in ("language", *by) if key in seed.meta}
    return EvalRow(seed.id, seed.text, seed.text, want, group=seed.id, tags=found | tags)
