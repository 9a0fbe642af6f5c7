"""How a step is run changes nothing of what it computes: checkpointing, compilation, clipping, metrics."""

import sys
from pathlib import Path

import models
import pytest
import torch
from test_learner import groups, learner, pairs
from torch.utils._python_dispatch import TorchDispatchMode

import advgame.learn
from advgame.config import LearnSettings
from advgame.errors import InputError
from advgame.learn.compute import checkpoint_layers
from advgame.learn.meter import Meter
from advgame.learn.optimizer import clipped_step, make_optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("player"))


def gradients(folder, **settings):
    made = learner(folder, reference="recompute", **settings)
    made._apply = lambda progress: 0.0
    made.update_pairs(pairs(), 0.0)
    return {n: p.grad for n, p in made.parameters.items()}


def assert_same(ours, theirs):
    for name, gradient in theirs.items():
        bound = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, atol=bound, rtol=1e-5, msg=name)


@pytest.mark.parametrize("share", ["auto", "off"])
def test_checkpointed_gradients_are_the_same(folder, share):
    assert_same(gradients(folder, checkpointing=True, share_prefixes=share), gradients(folder))


def test_checkpointing_keeps_less(folder):
    def kept(**settings):
        made = learner(folder, **settings)
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = made._pack([s for p in pairs() * 10 for s in (p.chosen, p.rejected)], Meter())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made._hidden(batch)
        return sum(sizes.values()) - sum(p.nbytes for p in made.parameters.values())

    assert kept(checkpointing=True) < 0.5 * kept()


def test_a_decoder_without_layers_cannot_be_checkpointed():
    model = models.model()
    model.model.layers = torch.nn.ModuleDict()
    with pytest.raises(InputError, match=r"x: Qwen2ForCausalLM has no list of layers; set learn\.checkpointing: false"):
        checkpoint_layers(model, "x")


@pytest.mark.slow
def test_compiled_gradients_are_the_same(folder):
    assert_same(gradients(folder, compile=True), gradients(folder))


@pytest.mark.parametrize("clip", [1e-2, 1e3])
@pytest.mark.parametrize("fused", [True, False])
def test_one_norm_pass_is_torchs_clipping(clip, fused):
    def stepped(step):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(40, 7)), torch.nn.Parameter(torch.randn(5))]
        unused = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([*weights, unused], lr=0.1, fused=fused)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            norm = step(optimizer, [*weights, unused])
        assert all(weight.grad is None for weight in weights)
        return [*weights, unused], norm

    def torchs(optimizer, weights):
        norm = torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    (ours, our_norm), (theirs, their_norm) = stepped(lambda o, _: clipped_step(o, clip)), stepped(torchs)
    torch.testing.assert_close(our_norm, their_norm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without it is told")
def test_8_bit_moments_need_their_library():
    with pytest.raises(InputError, match=r"learn\.optimizer: adamw8bit needs"):
        make_optimizer([], LearnSettings(optimizer="adamw8bit"), 1e-3, torch.device("cpu"))


def test_the_meter_reads_everything_at_once():
    meter = Meter()
    for value in (1.5, 2.5):
        meter.add("sum", torch.tensor(value))
        meter.add("plain", value)
        meter.most("most", torch.tensor(3 - value))
    assert meter.read() == {"sum": 4.0, "plain": 4.0, "most": 1.5}
    assert Meter().read() == {}


class Waits(TorchDispatchMode):
    """Where the learner's own code asks a tensor for its value, as file:line."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frame, own = sys._getframe(1), str(Path(advgame.learn.__file__).parent)
            while frame is not None and "torch" in Path(frame.f_code.co_filename).parts:
                frame = frame.f_back
            if frame is not None and frame.f_code.co_filename.startswith(own):
                self.found.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reference", ["rollout", "recompute", "auto"])
def test_no_pair_update_waits_for_a_number(folder, reference):
    made = learner(folder, reference=reference, micro_tokens=20)
    with Waits() as waits:
        made.update_pairs(pairs(), 0.0)
    assert waits.found == []


def test_the_detector_detects():
    line = compile("float(x.sum())", f"{Path(advgame.learn.__file__).parent}/somewhere.py", "exec")
    with Waits() as waits:
        exec(line, {"x": torch.ones(2)})
    assert [Path(found).name for found in waits.found] == ["somewhere.py:1"]


def test_no_group_update_waits_for_a_number(folder):
    made = learner(folder, objective="grpo", micro_tokens=20)
    with Waits() as waits:
        made.update_groups(groups(), 0.0)
    assert waits.found == []


def test_tokens_saved_are_reported(folder):
    values = learner(folder).update_pairs(pairs(3), 0.0)
    assert (values["tokens"], values["tokens_saved"]) == (5 + 3 * (2 + 4), 5 * 5)
    values = learner(folder, share_prefixes="off").update_pairs(pairs(3), 0.0)
    assert (values["tokens"], values["tokens_saved"]) == (6 * 5 + 3 * (2 + 4), 0)
