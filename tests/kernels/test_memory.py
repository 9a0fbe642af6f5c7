"""Memory that is lent again: never while anybody can see it, never more than was lent at one time."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import memory
from problems import grads_of, head_problem

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(None in memory.ADVICE, reason="not Linux")
ROWS = memory.LEAST // 4


@pytest.fixture
def pool(monkeypatch):
    """One of the test's own."""
    made = memory.Pool()
    monkeypatch.setattr(memory, "_pool", made)
    return made


def large(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return memory.empty((rows, 1), dtype, CPU)


def test_a_block_comes_back_when_the_last_view_is_gone(pool):
    first = large()
    where, view = first.data_ptr(), first.view(-1)[5:]
    first.fill_(1.0)
    del first
    other = large()
    assert other.data_ptr() != where
    other.fill_(2.0)
    assert (view == 1.0).all()
    del view
    gc.collect()
    again = large()
    assert again.data_ptr() == where
    assert again.shape == (ROWS, 1)
    assert again.is_contiguous()


def test_no_more_is_kept_than_was_lent_at_one_time(pool):
    held = [large(), large(2 * ROWS)]
    most = pool.most
    del held
    for rows in (ROWS, 5 * ROWS // 2, ROWS // 2, 3 * ROWS, 2 * ROWS):
        large(rows)  # dropped at once
        assert pool.lent + sum(map(len, pool.idle)) <= pool.most == most
    pool.release()
    assert (pool.idle, pool.lent, pool.most) == ([], 0, 0)


def test_a_small_tensor_does_not_sit_in_a_large_block(pool):
    where = large(5 * ROWS).data_ptr()
    assert large(2 * ROWS).data_ptr() == where
    assert large(ROWS).data_ptr() != where


def test_small_ones_and_other_devices_are_torchs_own(pool):
    assert memory.empty((3, 2), torch.float32, CPU).shape == (3, 2)
    assert memory.empty((ROWS, 2), torch.float32, torch.device("meta")).is_meta
    assert pool.most == 0


def test_threads_never_hold_the_same_block(pool):
    wrong = []

    def work(number: int) -> None:
        for _ in range(30):
            x = large(ROWS, torch.float32)
            x[::4096] = number
            if not (x[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    pool._collect()
    assert pool.lent == 0


def test_the_operation_has_a_fake_and_compiles():
    torch.library.opcheck(torch.ops.advgame_kernels.empty, ([ROWS, 1], torch.float32), test_utils="test_faketensor")
    step = torch.compile(lambda n: memory.empty((n, 2), torch.float32, CPU).zero_(), backend="aot_eager")
    for rows in (ROWS, ROWS + 3, ROWS + 8):
        assert step(rows).shape == (rows, 2)
        assert not step(rows).any()


def test_gradients_that_are_held_survive_further_calls(pool, monkeypatch):
    """What the caller has got is the caller's, however many calls take memory afterwards."""
    monkeypatch.setattr(memory, "LEAST", 0)
    p = head_problem([5, 3, 2, 4]).to(torch.float32)

    def gradients(beta: float) -> list[torch.Tensor]:
        out = ak.linear_preference_loss(
            p.hidden, p.weight, p.labels, p.bounds, p.ref_logps, beta=beta, chunk_bytes=8 * 37 * 4
        )
        return grads_of(out.loss * beta, p.hidden, p.weight)

    held = gradients(0.3)
    kept = [g.clone() for g in held]
    for beta in (0.1, 0.2, 0.5):
        gradients(beta)
    assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_second_call_takes_no_fresh_pages(pool):
    """The point of it: page faults of a call after the first."""
    import resource

    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(1 << 16, 8, requires_grad=True)  # 16 MiB of logits
    args = (torch.arange(64), [0, 16, 32, 48, 64], torch.zeros(4))

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        ak.linear_preference_loss(hidden, weight, *args).loss.backward()
        hidden.grad = weight.grad = None
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert pool.most >= 16 << 20
    assert min(faults() for _ in range(3)) < (16 << 20) // 4096 / 2
