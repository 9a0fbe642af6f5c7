"""The order in which a run plays its seeds: a pure function of step, so resuming needs no saved position."""

from __future__ import annotations

import random
from collections.abc import Sequence

from advgame.errors import InputError
from advgame.game.tree import Category, Seed


class SeedStream:
    """Shuffled batches of harmful and of benign seeds, each category with its own batch size and epochs.

    The batch of a step depends on the arguments and on the step alone: a resumed run asks for the step it
    stopped at, and any worker can compute any batch. Every epoch is shuffled anew; a batch may run from one
    epoch into the next, and holds a seed more than once where the category has fewer seeds than the batch.

    Raises:
        InputError: a negative batch, both batches zero, or no seed in a category whose batch is not zero.
    """

    def __init__(
        self,
        seeds_harmful: Sequence[Seed],
        seeds_benign: Sequence[Seed],
        seed: int,
        batch_harmful: int,
        batch_benign: int,
    ) -> None:
        self._parts = (
            (Category.HARMFUL, seeds_harmful, batch_harmful),
            (Category.BENIGN, seeds_benign, batch_benign),
        )
        for category, seeds, batch in self._parts:
            if batch < 0:
                raise InputError(f"batch of {category} seeds: {batch} is negative; write 0 or more")
            if batch and not seeds:
                raise InputError(f"no {category} seeds, but {batch} a step are asked for; add some or make it 0")
        if not batch_harmful and not batch_benign:
            raise InputError("both batches of seeds are 0, so there is nothing to play; make one of them positive")
        self._seed = seed
        self._orders: dict[Category, dict[int, list[int]]] = {category: {} for category in Category}

    def batch(self, step: int) -> list[Seed]:
        """The seeds of a step (counted from 0), harmful ones first, then benign ones.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        chosen: list[Seed] = []
        for category, seeds, batch in self._parts:
            for position in range(step * batch, (step + 1) * batch):
                epoch, place = divmod(position, len(seeds))
                chosen.append(seeds[self._order(category, epoch, len(seeds))[place]])
        return chosen

    def spread(self, count: int) -> list[Seed]:
        """`count` seeds of each category that is played, evenly spread over its seeds, for evaluation.

        The same at every call; a category with fewer seeds repeats them.
        """
        chosen: list[Seed] = []
        for _, seeds, batch in self._parts:
            if batch:
                chosen.extend(
                    seeds[i * len(seeds) // count if len(seeds) > count else i % len(seeds)] for i in range(count)
                )
        return chosen

    def _order(self, category: Category, epoch: int, count: int) -> list[int]:
        cached = self._orders[category]
        if epoch not in cached:
            # Sorting by `random()` instead of `shuffle`: Python promises the former's sequence across
            # versions.
            draw = random.Random(f"{self._seed}/{category.value}/{epoch}")
            keys = [draw.random() for _ in range(count)]
            if len(cached) > 1:
                del cached[min(cached)]
            cached[epoch] = sorted(range(count), key=keys.__getitem__)
        return cached[epoch]
