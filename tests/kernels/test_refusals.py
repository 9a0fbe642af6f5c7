"""Bad input to any public function: a ValueError that names the argument and says what was expected, never NaN.

The functions' own tests hold their settings; here every function meets every kind of bad tensor.
"""

from __future__ import annotations

import inspect
from typing import Any

import advgame_kernels as ak
import pytest
import torch

N, V, H = 4, 5, 2
NAN = float("nan")


def good(name: str) -> dict[str, Any]:
    """Arguments that the function takes."""
    labels = torch.tensor([0, 1, 4, 2])
    head = {"hidden": torch.zeros(N, H), "weight": torch.zeros(V, H), "labels": labels}
    tokens = {"advantages": torch.zeros(N), "weights": torch.ones(N)}
    return {
        "selective_logprobs": {"logits": torch.zeros(N, V), "labels": labels},
        "linear_logprobs": head,
        "preference_loss": {"policy_logps": torch.zeros(N), "ref_logps": torch.zeros(N)},
        "linear_preference_loss": head | {"cu_seqlens": [0, 2, 4], "ref_logps": torch.zeros(2)},
        "policy_loss": {"logps": torch.zeros(N)} | tokens,
        "linear_policy_loss": head | tokens,
    }[name]


NAMES = ("selective_logprobs", "linear_logprobs", "preference_loss", "linear_preference_loss", "policy_loss",
         "linear_policy_loss")  # fmt: skip
TENSORS = [(name, arg) for name in NAMES for arg, value in good(name).items() if isinstance(value, torch.Tensor)]


def refused(name: str, argument: str, value: Any, **more: Any) -> str:
    arguments = good(name) | {argument: value} | more
    with pytest.raises(ValueError, match=r": expected .*, got ") as caught:
        getattr(ak, name)(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_good_arguments_are_good(name):
    out = getattr(ak, name)(**good(name))
    assert torch.isfinite(out[0]).all()


@pytest.mark.parametrize(("name", "argument"), TENSORS)
@pytest.mark.parametrize("how", ["another device", "a dimension more", "another dtype", "a list", "complex"])
def test_tensors_of_the_wrong_kind(name, argument, how):
    x = good(name)[argument]
    changed = {
        "another device": lambda: x.to("meta"),
        "a dimension more": lambda: x[None],
        "another dtype": lambda: x.to(torch.int32),
        "a list": x.tolist,
        "complex": lambda: x.to(torch.complex64),
    }[how]()
    first = next(iter(good(name)))
    if how == "another device" and argument == first:  # then it is the others that are elsewhere
        others = [a for n, a in TENSORS if n == name and a != first]
        assert refused(name, argument, changed).split(":")[0] in others
    else:
        assert refused(name, argument, changed).startswith(f"{argument}: ")


@pytest.mark.parametrize(("name", "argument"), [t for t in TENSORS if t[1] not in ("hidden", "logits", "logps")])
def test_one_row_too_many(name, argument):
    x = good(name)[argument]
    if argument == "weight":
        assert refused(name, argument, torch.zeros(V, H + 1)).startswith("weight: ")
    else:
        assert refused(name, argument, torch.cat([x, x[:1]])).startswith(f"{argument}: ")


OPTIONAL = {"bias": torch.zeros(V), "lengths": torch.ones(N), "ref_logps": torch.zeros(N), "old_logps": torch.zeros(N),
            "sampler_logps": torch.zeros(N)}  # fmt: skip
TAKEN = {name: inspect.signature(getattr(ak, name)).parameters for name in NAMES}
GIVEN = [(name, arg) for name in NAMES for arg in OPTIONAL if arg in TAKEN[name] and arg not in good(name)]


@pytest.mark.parametrize(("name", "argument"), GIVEN)
@pytest.mark.parametrize("how", ["another device", "one too many", "a list", "complex"])
def test_optional_tensors_of_the_wrong_kind(name, argument, how):
    x = OPTIONAL[argument]
    changed = {
        "another device": lambda: x.to("meta"),
        "one too many": lambda: torch.cat([x, x[:1]]),
        "a list": x.tolist,
        "complex": lambda: x.to(torch.complex64),
    }[how]()
    assert refused(name, argument, changed).startswith(f"{argument}: ")


SETTINGS = [
    (name, setting)
    for name in NAMES
    for setting, parameter in TAKEN[name].items()
    if isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool)
]


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
@pytest.mark.parametrize("value", ["1", None, float("nan"), float("inf"), torch.tensor(1.0)])
def test_settings_that_are_no_numbers(name, setting, value):
    assert refused(name, setting, value).startswith(f"{setting}: ")


@pytest.mark.parametrize("value", [[0, 2.5, 4], ["0", "2", "4"], None, 4, [0, None, 4]])
def test_bounds_that_are_no_whole_numbers(value):
    assert refused("linear_preference_loss", "cu_seqlens", value).startswith("cu_seqlens: ")


@pytest.mark.parametrize("value", [[1.0, -1.0, 2.0, 3.0], [1.0, float("nan"), 2.0, 3.0], [True] * 4])
def test_lengths_that_count_nothing(value):
    assert refused("preference_loss", "lengths", torch.tensor(value)).startswith("lengths: ")


@pytest.mark.parametrize("value", [(0.2,), (0.2, 0.3, 0.4), (0.2, "0.3"), "0.2", (0.2, float("nan")), 1.5])
@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss"])
def test_clips_that_are_no_ranges(name, value):
    assert refused(name, "clip", value, old_logps=torch.zeros(N)).startswith("clip: ")


@pytest.mark.parametrize("name", [n for n in NAMES if "labels" in good(n)])
@pytest.mark.parametrize("label", [-1, -100, V, 2**40])
def test_labels_out_of_range(name, label):
    assert f"ids in [0, {V})" in refused(name, "labels", torch.tensor([0, 1, 2, label]))


@pytest.mark.parametrize("name", [n for n in NAMES if "labels" in good(n)])
def test_labels_with_gaps(name):
    assert refused(name, "labels", (torch.arange(8) % V)[::2]).startswith("labels: expected a contiguous")


def test_logits_that_lie_on_each_other():
    transposed = torch.zeros(V, N).t()
    assert "unit stride" in refused("selective_logprobs", "logits", transposed)
    one = torch.zeros(1, V).expand(N, V)  # one row four times: a gradient in place would be written over itself
    assert "overlap" in refused("selective_logprobs", "logits", one, inplace_backward=True)
    assert torch.isfinite(ak.selective_logprobs(one, good("selective_logprobs")["labels"]).logps).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("linear")])
def test_hidden_states_and_heads_with_gaps_are_read_right(name):
    """What can be served without a copy of the whole is served: the same numbers as from dense tensors."""
    arguments = good(name)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g)
    gaps = {"hidden": torch.stack([hidden, hidden + 9], dim=2)[..., 0], "weight": weight.t().contiguous().t()}
    assert not gaps["hidden"].is_contiguous()
    found = []
    for leaves in ({"hidden": hidden, "weight": weight}, gaps):
        leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
        out = getattr(ak, name)(**(arguments | leaves))
        found.append([out[0], *torch.autograd.grad(out[0].sum(), list(leaves.values()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_empty_batches():
    """The mean over no pairs is refused; given a normalizer, a rank without pairs has a loss and gradient of zero."""
    none = {"policy_logps": torch.zeros(0, requires_grad=True), "ref_logps": torch.zeros(0)}
    with pytest.raises(ValueError, match=r"normalizer: expected a number where a batch is empty"):
        ak.preference_loss(**none)
    assert ak.preference_loss(**none, normalizer=8).loss.item() == 0.0
    head = {"hidden": torch.zeros(0, H), "weight": torch.zeros(V, H), "labels": torch.zeros(0, dtype=torch.int64)}
    pairs = head | {"cu_seqlens": [0], "ref_logps": torch.zeros(0)}
    with pytest.raises(ValueError, match=r"normalizer: expected a number where a batch is empty"):
        ak.linear_preference_loss(**pairs)
    assert ak.linear_preference_loss(**pairs, normalizer=8).loss.item() == 0.0
    with pytest.raises(ValueError, match="cu_seqlens"):
        ak.linear_preference_loss(**(pairs | {"cu_seqlens": []}))


@pytest.mark.parametrize("value", [0, -1.0, NAN, float("inf"), "4", torch.tensor(0.0), torch.tensor(NAN)])
@pytest.mark.parametrize("name", ["preference_loss", "linear_preference_loss"])
def test_normalizers_that_would_give_nan(name, value):
    assert refused(name, "normalizer", value).startswith("normalizer: ")


def test_odd_numbers_of_sequences():
    assert "even number" in refused("preference_loss", "policy_logps", torch.zeros(3))
    assert refused("linear_preference_loss", "cu_seqlens", [0, 1, 2, 4]).startswith("cu_seqlens: expected 2P + 1")


def test_heads_that_are_not_the_whole_product():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError("never gathered in silence")

    assert "DTensor" in refused("linear_logprobs", "weight", torch.zeros(V, H).as_subclass(Sharded))
    flat = torch.zeros(0)
    flat.ds_id = 3  # as DeepSpeed leaves a partitioned parameter
    assert "ZeRO-3" in refused("linear_logprobs", "weight", flat)
