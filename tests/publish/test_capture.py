"""The pass of a publish on the CPU: equal to its parts to the last bit, made anew when what it points to moves."""

import advgame_kernels as ak
import pytest
import torch
from test_plan import SOURCES, plan_of

from advgame.publish.capture import PublishPass, fingerprint
from advgame.publish.destinations import Destinations


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.shape, generator=g) for s in SOURCES}


def served_by(world):
    plans = [plan_of(rank, world) for rank in range(world)]
    parts = [torch.zeros(plan.layout()[1], dtype=torch.uint8) for plan in plans]
    return Destinations(plans, parts), parts


@pytest.mark.parametrize("world", [1, 2])
def test_the_pass_is_its_parts(world):
    """Decays change, the pass is made once; staged tensors arrive without a scatter of the channel."""
    served, parts = served_by(world)
    other, expected = served_by(world)
    shadow, live, made = tensors(0), tensors(1), PublishPass()
    twin = {name: t.clone() for name, t in shadow.items()}
    for step in range(1, 4):
        decay = ak.ema_decay("warmup", step, decay=0.95)
        made(shadow, live, served, decay)
        ak.ema_update_(list(twin.values()), list(live.values()), decay, publish=[other[name] for name in twin])
        other.scatter()
        assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))
        assert all(torch.equal(shadow[name], twin[name]) for name in twin)
        for t in live.values():
            t += 0.5
        assert served.scattered
        for part in parts if world == 2 else ():
            part.zero_()
        served.settle()  # the channel's: nothing is left to do, once
        assert not any(part.any() for part in parts) or world == 1
    assert (made.builds, made.captured) == (1, False)


def test_anything_that_moves_makes_a_new_pass():
    served, _ = served_by(1)
    shadow, live, made = tensors(0), tensors(1), PublishPass()

    def run():
        before = made.builds
        made(shadow, live, served, 0.5)
        return made.builds - before

    assert [run(), run()] == [1, 0]
    shadow["norm"] = shadow["norm"].clone()
    assert [run(), run()] == [1, 0]
    live["q"] = live["q"].clone()
    assert run() == 1
    served, parts = served_by(1)
    assert run() == 1
    served.key = "another plan in the same memory"
    assert run() == 1
    del parts
    want = 0.5 * shadow["v"] + 0.5 * live["v"]
    run()
    torch.testing.assert_close(served["v"], want)


def test_what_cannot_be_updated_is_refused_before_anything_moves():
    served, _ = served_by(1)
    shadow, live = tensors(0), tensors(1)
    before = {name: t.clone() for name, t in shadow.items()}
    for spoilt in (torch.zeros(3), torch.zeros(6, dtype=torch.int32), torch.zeros(6, 2)[:, 0]):
        with pytest.raises(ValueError, match="params"):
            PublishPass()(shadow, live | {"norm": spoilt}, served, 0.5)
    assert all(torch.equal(shadow[name], before[name]) for name in before)


def test_fingerprints_see_address_shape_stride_dtype_and_plan():
    x = torch.zeros(4, 6)
    seen = {fingerprint([y]) for y in (x, x.view(6, 4), x.t(), x.view(torch.int32), x[1:], x.clone())}
    assert len(seen) == 6
    assert fingerprint([x]) == fingerprint([x.view(4, 6)])
    assert fingerprint([x], "plan") != fingerprint([x])


@pytest.mark.parametrize("world", [1, 2])
def test_a_verified_pass_takes_the_sums_of_what_the_engine_reads(world):
    """In the pass that is asked for them, after the copies; whoever only reads them takes them himself."""
    served, parts = served_by(world)
    shadow, live, made = tensors(0), tensors(1), PublishPass()
    for verify in (False, True, True, False):
        served.verify, served.summed = verify, False
        made(shadow, live, served, 0.5)
        assert served.summed == verify
        if verify:
            parts[0][0] += 1  # after the pass: what counts is what was written
        found = served.checksums()
        if verify:
            parts[0][0] -= 1
        for rank, sums in enumerate(found):
            plan = plan_of(rank, world)
            offsets, _ = plan.layout()
            whole = [parts[rank][offsets[s.name] :][: s.bytes] for s in plan.storages]
            assert list(sums.values()) == [n % 2**64 for n in ak.byte_sums_ref(whole).tolist()]
    assert made.builds == 1
    assert found == served.checksums()
