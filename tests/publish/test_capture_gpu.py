"""The captured pass on a GPU: the same bits as the eager one, over a schedule, without a new capture.

Twins without a GPU: test_capture.py for the pass, test_host_cuda.py for memory, handles and graphs.
"""

import advgame_kernels as ak
import pytest
import torch
from test_plan import SOURCES, plan_of

from advgame.publish import cuda_memory
from advgame.publish.capture import PublishPass
from advgame.publish.destinations import Destinations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SHAPES = {"a": (1000, 77), "b": (5,), "c": (64, 64), "d": (70_003,)}


def tensors(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g).to("cuda", dtype) for name, shape in SHAPES.items()}


def test_replays_equal_the_eager_pass_to_the_last_bit():
    live = tensors(1)
    both = [(tensors(0), tensors(2, torch.bfloat16), PublishPass(capture=capture)) for capture in (True, False)]
    for step in range(1, 6):
        for shadow, served, made in both:
            made(shadow, live, served, ak.ema_decay("power", step))
        torch.cuda.synchronize()
        for one, other in ((both[0][0], both[1][0]), (both[0][1], both[1][1])):
            assert all(torch.equal(one[name], other[name]) for name in SHAPES)
        for t in live.values():
            t += 0.25
    assert [(made.builds, made.captured) for *_, made in both] == [(1, True), (1, False)]


def test_capturing_changes_no_average_and_a_moved_tensor_captures_again():
    shadow, live, served, made = tensors(0), tensors(1), tensors(2, torch.bfloat16), PublishPass()
    before = {name: t.clone() for name, t in shadow.items()}
    made(shadow, live, served, 1.0)
    assert all(torch.equal(shadow[name], before[name]) for name in SHAPES)
    served["c"] = torch.zeros_like(served["c"])
    made(shadow, live, served, 0.5)
    assert made.builds == 2
    assert torch.equal(served["c"], shadow["c"].bfloat16())


def given(world):
    """Memory as an engine of `world` ranks would have it, all on this GPU."""
    memory, plans = cuda_memory.CudaMemory(), [plan_of(rank, world) for rank in range(world)]
    granted = memory.grant(plans, [cuda_memory.device_id(torch.device("cuda", 0))] * world)
    return memory, granted, plans


@pytest.mark.parametrize("world", [1, 2])
def test_a_publish_with_copies_and_sums_is_one_graph_and_equals_the_eager_one(world):
    g = torch.Generator().manual_seed(0)
    live = {s.name: torch.randn(s.shape, generator=g).cuda() for s in SOURCES}
    sides = []
    for capture in (True, False):
        memory, _, plans = given(world)
        served = Destinations(plans, memory.parts, torch.device("cuda", 0))
        sides.append((memory, served, {n: torch.zeros_like(t) for n, t in live.items()}, PublishPass(capture=capture)))
    for step in range(6):
        found = []
        for memory, served, shadow, made in sides:
            served.verify, served.summed = step % 2 == 1, False
            made(shadow, live, served, 0.5)
            assert served.summed == served.verify
            served.settle()
            torch.cuda.synchronize()
            found.append((served.checksums(), [part.cpu() for part in memory.parts]))
        assert found[0][0] == found[1][0]
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
        live["q"] += 0.25
    assert [(made.builds, made.captured) for *_, made in sides] == [(1, True), (1, False)]
    captured, served = sides[0][-1], sides[0][1]
    assert not served.copies.rest
    assert {verify: one._graph.nodes for verify, one in captured._graphs.items()} == {
        verify: 1 + len(served.copies.rows or ()) + verify * world for verify in (False, True)
    }


def child(granted, queue):
    part = cuda_memory.open_shared(granted, torch.device("cuda", 0))
    part[3] = 7
    torch.cuda.synchronize()
    queue.put(int(part[5]))
    queue.get()


def test_memory_opened_by_another_process_is_the_same_memory(monkeypatch):
    """Whatever torch's own allocator was told."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    memory, (granted,), _ = given(1)
    part = memory.parts[0]
    part[5] = 9
    torch.cuda.synchronize()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(granted, queue))
    process.start()
    assert queue.get(timeout=120) == 9
    assert part[3] == 7
    queue.put(0)
    process.join()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_copies_to_another_gpu_are_part_of_the_graph():
    memory, plan = cuda_memory.CudaMemory(), plan_of()
    memory.grant([plan], [cuda_memory.device_id(torch.device("cuda", 1))])
    near = torch.device("cuda", 0)
    served, live = Destinations([plan], memory.parts, near), {s.name: torch.randn(s.shape).cuda() for s in SOURCES}
    shadow, made = {name: torch.zeros_like(t) for name, t in live.items()}, PublishPass()
    for _ in range(3):
        served.verify, served.summed = True, False
        made(shadow, live, served, 0.5)
        served.settle()
        torch.cuda.synchronize(near)
        found = served.checksums()
        want = [n % 2**64 for n in ak.byte_sums_ref(served.sums[0].tensors).tolist()]
        assert list(found[0].values()) == want
    assert made.captured
