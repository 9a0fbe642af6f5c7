"""The captured pass on a GPU: the same bits as the eager one, over a schedule, without a new capture."""

import advgame_kernels as ak
import pytest
import torch

from advgame.publish.capture import PublishPass
from advgame.publish.cuda_memory import open_shared, shared

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


def child(memory, queue):
    part = open_shared(memory, torch.device("cuda", 0))
    part[3] = 7
    torch.cuda.synchronize()
    queue.put(int(part[5]))
    queue.get()


def test_memory_opened_by_another_process_is_the_same_memory():
    part = torch.zeros(32 << 20, dtype=torch.uint8, device="cuda")
    part[5] = 9
    torch.cuda.synchronize()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(shared(part), queue))
    process.start()
    assert queue.get(timeout=120) == 9
    assert part[3] == 7
    queue.put(0)
    process.join()
