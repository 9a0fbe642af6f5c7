"""Packed batches: what goes in, and that every sequence computes what it computes alone."""

import models
import pytest
import torch

from advgame.game.tree import Sample
from advgame.learn.attention import packed_hidden, use_packed_attention
from advgame.learn.packing import Span, pack


def sample(prompt, tokens):
    return Sample(tuple(prompt), tuple(tokens), tuple(-0.1 * t for t in tokens), "stop", 0)


SAMPLES = [sample([5, 6, 7], [8, 9, 2]), sample([10], [11, 12, 13, 14, 15, 16, 17, 18, 19, 2]), sample([4, 4], [2])]


def test_layout():
    batch = pack(SAMPLES)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 4, 4]]
    assert batch.position_ids.tolist() == [[*range(5), *range(10), *range(2)]]
    assert batch.spans == (Span(0, 5), Span(5, 10), Span(15, 2))
    assert batch.unshared == batch.tokens == 17
    assert batch.owner.tolist() == [0] * 3 + [1] * 10 + [2]
    assert batch.rows.tolist() == [2, 3, 4, *range(5, 15), 16]
    assert batch.labels.tolist() == [8, 9, 2, 11, 12, 13, 14, 15, 16, 17, 18, 19, 2, 2]
    assert batch.row_bounds == (0, 3, 13, 14)
    assert batch.sampler_logps.shape == batch.labels.shape


@pytest.mark.parametrize("empty", [sample([], [1]), sample([1], [])])
def test_empty_sequences_are_refused(empty):
    with pytest.raises(ValueError, match=r"samples\[0\] has an empty"):
        pack([empty])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_packed_logits_equal_each_sequences_own(family, tied):
    alone = models.model(family, tied=tied)
    own = []
    with torch.no_grad():
        for s in SAMPLES:
            ids = torch.tensor([[*s.prompt_ids, *s.token_ids[:-1]]])
            own.append(alone(input_ids=ids).logits[0, len(s.prompt_ids) - 1 :])
    packed = models.model(family, tied=tied)
    use_packed_attention(packed, "defender.model")
    batch = pack(SAMPLES)
    with torch.no_grad():
        logits = packed_hidden(packed, batch) @ packed.get_output_embeddings().weight.T
    cap = getattr(packed.config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    expected = torch.cat(own)
    torch.testing.assert_close(logits, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=1e-5)


def test_gradients_flow_as_in_separate_sequences():
    alone, packed = models.model(), models.model()
    use_packed_attention(packed, "x")
    batch = pack(SAMPLES)
    packed_hidden(packed, batch).square().sum().backward()
    for s in SAMPLES:
        ids = torch.tensor([[*s.prompt_ids, *s.token_ids[:-1]]])
        out = alone.model(input_ids=ids).last_hidden_state
        out[0, len(s.prompt_ids) - 1 :].square().sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-4, rtol=1e-4, msg=name)
