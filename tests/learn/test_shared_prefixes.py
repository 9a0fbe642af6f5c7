"""A prompt that several completions share is computed once, and nothing else changes."""

import models
import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from advgame.game.tree import Sample
from advgame.learn.attention import choose_backend, packed_attention, packed_hidden, use_packed_attention
from advgame.learn.packing import Span, pack
from advgame.learn.spans_flash import FlashLayout
from advgame.learn.spans_flex import BLOCK, FlexLayout, touched_blocks
from advgame.learn.spans_sdpa import SdpaLayout, buckets_of


def sample(prompt, tokens):
    return Sample(tuple(prompt), tuple(tokens), tuple(-0.1 * t for t in tokens), "stop", 0)


ONE, TWO = [5, 6, 7, 8, 9, 10, 11, 12], [10, 4, 4]
SAMPLES = [
    sample(ONE, [8, 9, 2]),
    sample(TWO, range(11, 24)),
    sample(ONE, range(12, 22)),
    sample(ONE, [2]),  # its one row is the prompt's last
    sample(TWO, [13, 2]),
    sample([4], [5, 6, 7, 8]),  # shares with nobody
]


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap, **_):
    """What flash-attention's variable-length function computes, in plain torch (causal masks align at the end)."""
    assert causal
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = torch.empty_like(q)
    for i in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(int(c[i]), int(c[i + 1])) for c in (cu_seqlens_q, cu_seqlens_k))
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys])
        scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        n, m = scores.shape[1:]
        distance = torch.arange(n).unsqueeze(1) + (m - n) - torch.arange(m)
        left = window_size[0] if window_size[0] >= 0 else m
        scores = scores.masked_fill(~((distance >= 0) & (distance <= left)), -torch.inf)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys])
    return out


def flash(spans, device):
    return FlashLayout(spans, device, varlen)


BACKENDS = {"sdpa": SdpaLayout, "flex": FlexLayout, "flash": flash}


def test_layout_of_a_tree():
    batch = pack(SAMPLES, share=True)
    assert batch.spans == (
        Span(0, 8), Span(8, 2, 0, 8), Span(10, 9, 0, 8), Span(19, 3), Span(22, 12, 19, 3),
        Span(34, 1, 19, 3), Span(35, 4),
    )  # fmt: skip
    assert batch.position_ids.tolist() == [
        [*range(8), 8, 9, *range(8, 17), *range(3), *range(3, 15), 3, *range(4)]
    ]  # fmt: skip
    assert batch.rows.tolist() == [7, 8, 9, 21, *range(22, 34), 7, *range(10, 19), 7, 21, 34, *range(35, 39)]
    assert (batch.tokens, batch.unshared) == (39, pack(SAMPLES).tokens)
    assert torch.equal(batch.labels, pack(SAMPLES).labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_shared_logits_equal_each_sequences_own(family, backend):
    alone = models.model(family)
    own = []
    with torch.no_grad():
        for s in SAMPLES:
            ids = torch.tensor([[*s.prompt_ids, *s.token_ids[:-1]]])
            own.append(alone.get_decoder()(input_ids=ids).last_hidden_state[0, len(s.prompt_ids) - 1 :])
    shared = models.model(family)
    assert use_packed_attention(shared, "defender.model", BACKENDS[backend]) is None
    expected = torch.cat(own)
    for share in (True, False):
        with torch.no_grad():
            hidden = packed_hidden(shared, pack(SAMPLES, share=share), BACKENDS[backend])
        torch.testing.assert_close(hidden, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "flash"])  # flex has no backward pass on a CPU
@pytest.mark.parametrize("family", models.FAMILIES)
def test_gradients_are_those_of_separate_copies(family, backend):
    def gradients(share):
        model = models.model(family)
        use_packed_attention(model, "x", BACKENDS[backend])
        hidden = packed_hidden(model, pack(SAMPLES, share=share), BACKENDS[backend])
        generator = torch.Generator().manual_seed(0)
        (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    ours, theirs = gradients(True), gradients(False)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        bound = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, atol=bound, rtol=1e-5, msg=name)


def test_buckets_hold_padding_down_at_any_length():
    spans, start = [], 0
    for length in (2048, 300, 310, 280, 40, 700, 1):
        spans.append(Span(start, length))
        start += length
    buckets = buckets_of(spans)
    assert sorted(s for bucket in buckets for s in bucket) == spans
    padded = sum(len(b) * max(s.length for s in b) ** 2 for b in buckets)
    assert padded < 2 * sum(s.length**2 for s in spans)
    layout = SdpaLayout(spans, torch.device("cpu"))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, start, 2, 8).unbind()
    torch.testing.assert_close(
        layout.attend(q, k, v, None, None, None), flash(spans, torch.device("cpu")).attend(q, k, v, None, None, None)
    )


@pytest.mark.parametrize("window", [None, 70])
def test_flex_blocks_cover_all_that_is_visible(window):
    samples = [
        sample(range(3, 3 + p), range(n))
        for p, n in ((200, 150), (200, 301), (7, 400), (200, 2), (130, 40), (130, 260))
    ]
    spans = pack(samples, share=True).spans
    layout = FlexLayout(spans, torch.device("cpu"))
    dense = create_block_mask(layout.visible(window), None, None, layout.tokens, layout.tokens, "cpu", BLOCK)
    # without a window the blocks are exactly those; with one a few more are looked at
    needed = dense.to_dense()[0, 0].bool()
    ours = touched_blocks(spans, layout.tokens)
    assert bool((ours | ~needed).all())
    assert torch.equal(layout.block_mask(window).to_dense()[0, 0].bool(), ours)
    assert ours.float().mean() < 0.6


class ResettingShift(nn.Module):
    """A layer that mixes in the token before, except where a sequence starts: packing is fine, trees are not."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, **kwargs):
        hidden = self.inner(hidden, **kwargs)
        first = (kwargs["position_ids"] == 0).unsqueeze(-1)
        before = torch.roll(hidden, 1, dims=1)
        return hidden + torch.where(first, 0.0, before)


def test_a_model_that_cannot_share_says_so_and_still_packs():
    model = models.model()
    model.model.layers[0] = ResettingShift(model.model.layers[0])
    note = use_packed_attention(model, "defender.model")
    assert note is not None
    assert note.startswith("defender.model: Qwen2ForCausalLM cannot share a prompt")


def test_backends_that_are_not_there():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu, torch.float32) is SdpaLayout
    assert choose_backend("auto", gpu, torch.float32) is FlexLayout
    with pytest.raises(Exception, match=r"learn\.attention: flex has no backward"):
        choose_backend("flex", cpu, torch.float32)
    with pytest.raises(Exception, match=r"learn\.attention: flash needs a GPU"):
        choose_backend("flash", gpu, torch.float32)


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="no dropout"):
        packed_attention(nn.Identity(), *torch.zeros(3, 1, 2, 4, 8).unbind(), None, layout=None, dropout=0.1)
