"""The embedding that adds its gradient in place: the gradients of autograd, and no dense tensor for them."""

import models
import pytest
import torch
from test_learner import learner, pairs
from torch.utils._python_dispatch import TorchDispatchMode

from advgame.learn.attention import packed_hidden, use_packed_attention
from advgame.learn.embedding import embed_in_place
from advgame.learn.packing import pack


class Called(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def loss(model, batch):
    hidden = packed_hidden(model, batch)
    return (hidden @ model.get_output_embeddings().weight.T).log_softmax(-1).square().mean()


def batches():
    samples = [s for pair in pairs() for s in (pair.chosen, pair.rejected)]
    return pack(samples[:2]), pack(samples[2:])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_gradients_are_those_of_autograd(family, tied):
    plain, ours = models.model(family, tied=tied), models.model(family, tied=tied)
    for model in (plain, ours):
        use_packed_attention(model, "x")
    done = embed_in_place(ours)
    assert done == (type(ours.get_input_embeddings()) is torch.nn.Embedding)
    for batch in batches():  # the second backward adds to the first's gradients
        loss(plain, batch).backward()
        with Called() as called:
            loss(ours, batch).backward()
        assert ("aten::embedding_dense_backward" in called.names) != done
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_padding_learns_nothing_as_in_torch():
    plain, ours = (torch.nn.Embedding(6, 4, padding_idx=2) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    holder = models.model()
    holder.set_input_embeddings(ours)
    assert embed_in_place(holder)
    ids = torch.tensor([[2, 3, 3, 5]])
    for table in (plain, ours):
        table(ids).pow(2).sum().backward()
    assert torch.equal(plain.weight.grad, ours.weight.grad)
    assert not ours.weight.grad[2].any()


def test_frozen_and_unusual_embeddings_are_left_alone():
    frozen = models.model()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    assert not embed_in_place(frozen)
    normed = models.model()
    normed.get_input_embeddings().max_norm = 1.0
    assert not embed_in_place(normed)


def test_a_learner_trains_by_it(tmp_path):
    made = learner(models.folder(tmp_path))
    with Called() as called:
        made.update_pairs(pairs(), 0.0)
    assert "aten::embedding_dense_backward" not in called.names
    assert "aten::index_add_" in called.names
