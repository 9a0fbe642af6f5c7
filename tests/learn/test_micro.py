"""Micro-batches: whole units, within the limit, even, one prompt's units together."""

import random

import pytest

from advgame.game.tree import Sample
from advgame.learn.micro import micro_batches, packed_tokens


def sample(prompt, completion):
    return Sample(tuple(range(3, 3 + prompt)), (5,) * completion, (-0.1,) * completion, "stop", 0)


def units(*sizes):
    """Unit i has one sample of `sizes[i]` input tokens; all prompts differ."""
    return [(i, (Sample((i,), (5,) * size, (-0.1,) * size, "stop", 0),)) for i, size in enumerate(sizes)]


def test_units_stay_whole_and_in_order():
    assert micro_batches(units(10, 20, 4), 34) == [[0, 1, 2]]
    assert micro_batches(units(10, 20, 4), 1) == [[0], [1], [2]]
    assert micro_batches([], 100) == []


def test_best_fit_needs_fewer_batches_than_taking_them_in_turn():
    assert micro_batches(units(6, 5, 4, 5), 10) == [[0, 2], [1, 3]]


def test_batches_are_evened_out():
    assert micro_batches(units(8, 1, 1, 1, 1), 8) == [[0], [1, 2, 3, 4]]
    # best fit alone would fill 9 + 1 and leave 5
    assert micro_batches(units(7, 3, 3, 2), 10) == [[0], [1, 2, 3]]


@pytest.mark.parametrize("share", [False, True])
def test_every_unit_once_and_within_the_limit(share):
    draw = random.Random(0)
    made = [(i, tuple(sample(draw.randint(1, 30), draw.randint(1, 60)) for _ in range(2))) for i in range(60)]
    batches = micro_batches(made, 200, share=share)
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    loads = [packed_tokens([s for i in batch for s in made[i][1]], share) for batch in batches]
    assert max(loads) <= 200


def test_units_of_one_prompt_stay_together():
    prompts = [tuple(range(50)), tuple(range(60))]
    made = [(i, (Sample(prompts[i % 2], (5,) * 10, (0.0,) * 10, "stop", 0),)) for i in range(6)]
    assert micro_batches(made, 87, share=True) == [[0, 2, 4], [1, 3, 5]]
    # what does not fit is split, and each piece pays for its own copy of the prompt
    assert micro_batches(made[::2], 68, share=True) == [[0, 2], [4]]


def test_packed_tokens_count_a_prompt_once():
    samples = [sample(10, 5), sample(10, 7), sample(4, 1)]
    assert packed_tokens(samples, share=False) == 14 + 16 + 4
    assert packed_tokens(samples, share=True) == 10 + 4 + 6 + 4
