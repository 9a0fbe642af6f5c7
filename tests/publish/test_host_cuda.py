"""Device memory, handles and graphs through a CUDA runtime of host memory, loaded as the real one is."""

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import fake_gpu
import pytest
import torch
from test_plan import SOURCES, Fused, plan_of

from advgame.errors import InputError
from advgame.publish import capture, cuda_memory, host
from advgame.publish.binding import bind, open_part
from advgame.publish.copies import Copies
from advgame.publish.cuda_memory import CudaMemory
from advgame.publish.destinations import Destinations

pytestmark = fake_gpu.NEEDS
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_gpu.compiled(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def fake(library):
    """What the library says of itself."""
    return ctypes.CDLL(str(library))


@pytest.fixture
def runtime(library):
    return host.require("ipc").Runtime(str(library))


def headers():
    """CUDA's own, where there are any: Triton brings some."""
    import triton

    found = [Path(triton.__file__).parent / "backends/nvidia/include", *Path("/usr/local").glob("cuda*/include")]
    return [folder for folder in found if (folder / "cuda_runtime_api.h").exists()]


def test_the_calls_are_those_of_cudas_headers(tmp_path):
    """What the extension declares, and what the fake defines, against declarations of the installed CUDA headers."""
    pytest.importorskip("triton")
    if not headers():
        pytest.skip("no CUDA headers")
    for folder in headers():
        include = ["-I", str(folder)]
        ours = ["g++", "-std=c++17", "-fsyntax-only", "-I", str(TESTS.parents[1] / "csrc/host"), *include]
        subprocess.run([*ours, str(TESTS / "cudart_abi.cpp")], check=True)
        fake_gpu.compiled(tmp_path, "-DREAL_HEADERS", *include)


def test_memory_is_given_back_with_its_last_tensor(runtime, fake):
    assert runtime.version == 12080
    before = fake.fake_allocations()
    made = runtime.allocate(1, 1000)
    assert (made.device, len(made.handle)) == (1, 64)
    assert fake.fake_device() == 0, "the current device is as it was"
    tensor = fake_gpu.over(made)[10:]
    del made
    tensor.fill_(1)
    assert fake.fake_allocations() == before + 1
    del tensor
    assert fake.fake_allocations() == before


def test_errors_say_call_and_reason_and_leave_none_behind(runtime, fake):
    for call, says in (
        (lambda: runtime.allocate(0, 2**32), r"^cudaMalloc: out of memory \(2\)$"),
        (lambda: runtime.allocate(7, 10), r"^cudaSetDevice: invalid device ordinal \(101\)$"),
        (lambda: runtime.open(0, b"\0" * 64, 10), r"^cudaIpcOpenMemHandle: invalid argument \(1\)$"),
        (lambda: runtime.reaches(0, 9), None),
    ):
        if says is not None:
            with pytest.raises(RuntimeError, match=says):
                call()
        assert fake.fake_last() == 0
        assert fake.fake_device() == 0
    with pytest.raises(ValueError, match="a handle has 64 bytes, this one 3"):
        runtime.open(0, b"abc", 10)


def test_peers_are_made_reachable_once(runtime, fake):
    assert runtime.reaches(0, 0)
    assert runtime.reaches(0, 1)
    assert runtime.reaches(0, 1), "another in this process, torch for example, may have done so"
    assert not runtime.reaches(0, 2)
    assert fake.fake_last() == 0


def test_no_runtime_and_one_that_is_too_old_are_one_line(tmp_path):
    with pytest.raises(RuntimeError, match=r"no CUDA runtime: .*nowhere\.so"):
        host.require("ipc").Runtime(str(tmp_path / "nowhere.so"))
    (tmp_path / "old.c").write_text("int cudaRuntimeGetVersion(int *v) { return *v = 0; }")
    old = fake_gpu.compiled(tmp_path, source=tmp_path / "old.c")
    with pytest.raises(RuntimeError, match=r"has no cudaGetErrorString; CUDA 11\.4 or newer is needed"):
        host.require("ipc").Runtime(str(old))


def test_a_machine_without_cuda_is_told_what_to_set(monkeypatch):
    class Without:
        def Runtime(self):
            raise RuntimeError("no CUDA runtime: libcudart.so: not found")

    monkeypatch.setattr(host, "_host", Without())
    host.cuda.cache_clear()
    with pytest.raises(InputError, match=r"transport: ipc cannot be used, no CUDA runtime: .*set loader"):
        host.cuda()


def test_a_loaded_runtime_is_taken_before_any_other(library):
    """By its name, wherever it lies: torch's wheels bring one of their own."""
    code = f"import ctypes; ctypes.CDLL({str(library)!r}); from advgame.publish import host; print(host.cuda().path)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()).resolve() == library.resolve()


ENGINE = """
import json, sys
sys.path.insert(0, {tests!r})
import fake_gpu, torch
from test_plan import Fused, plan_of
from advgame.publish import cuda_memory, host
from advgame.publish.binding import bind, checksums, open_part
runtime = host.require("ipc").Runtime({library!r})
host.cuda = lambda: runtime
cuda_memory.tensor_over = fake_gpu.over
memory, rank, world = json.loads(sys.stdin.readline()), {rank}, {world}
model, plan = Fused(rank, world), plan_of(rank, world)
with torch.no_grad():
    model.norm.fill_(3)
bind(model, plan, open_part(memory, torch.device("cuda", 0)))
print("moved", flush=True)
sys.stdin.readline()
print(json.dumps(checksums(model, plan)), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_in_another_process_reads_what_is_written(library, runtime, monkeypatch, world):
    """The whole way of the ipc transport but the GPU: grant, hexadecimal handle, opening, moving in, write, sums."""
    import json

    fake_gpu.installed(monkeypatch, runtime, ["gpu a", "gpu b"])
    memory, plans = CudaMemory(), [plan_of(rank, world) for rank in range(world)]
    granted = memory.grant(plans, ["gpu b", "gpu a"][:world])
    assert [held.device for held, _ in memory._held] == [1, 0][:world]
    assert memory.grant(plans, ["gpu b", "gpu a"][:world]) == granted, "a restarted engine opens the same memory"
    engines = []
    for rank in range(world):
        code = textwrap.dedent(ENGINE).format(tests=str(TESTS), library=str(library), rank=rank, world=world)
        engines.append(
            subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        engines[-1].stdin.write(json.dumps(granted[rank]) + "\n")
        engines[-1].stdin.flush()
    for rank, engine in enumerate(engines):
        assert engine.stdout.readline() == "moved\n"
        offset = plans[rank].layout()[0]["norm"]
        assert memory.parts[rank][offset : offset + 24].view(torch.float32).eq(3).all()
    made = Destinations(plans, memory.parts)
    assert bool(made.staged) == (world == 2)
    for s in SOURCES:
        made[s.name].copy_(torch.randn(s.shape))
    made.settle()
    for expected, engine in zip(made.checksums(), engines, strict=True):
        answer, _ = engine.communicate("\n")
        assert json.loads(answer) == expected
    memory.close()
    assert memory.parts == []


def test_too_little_memory_and_a_gpu_out_of_sight_are_one_line(runtime, monkeypatch):
    fake_gpu.installed(monkeypatch, runtime, ["gpu a"])
    with pytest.raises(InputError, match="GPU gpu c visible to the trainer too"):
        CudaMemory().grant([plan_of()], ["gpu c"])
    says = r"ipc gets no 4\.00 GiB on GPU 0 \(cudaMalloc: out of memory \(2\)\); lower rollout\.vllm\.memory_share"
    with pytest.raises(InputError, match=says):
        cuda_memory.allocated(0, 2**32)


def test_an_engine_that_cannot_open_the_memory_hears_why(runtime, monkeypatch):
    fake_gpu.installed(monkeypatch, runtime, [])
    gone = f"{os.getpid()} 99999 64".encode().ljust(64, b"\0").hex()
    with pytest.raises(RuntimeError, match="cudaIpcOpenMemHandle: mapping of buffer object failed"):
        open_part({"kind": "cuda", "handle": gone, "size": 64}, torch.device("cuda", 0))


def graph_of(runtime, *stages):
    made = host.require("ipc").PublishGraph(runtime, 0)
    for stage in stages:
        made.then_copies(stage.rows)
    return made


def test_a_graph_copies_what_torch_copies(runtime):
    """Rows, columns, a box: each time it is launched, from what is there then."""
    taken = torch.randn(6, 8, 10)
    into = torch.zeros(6, 8, 10)
    pairs = [(into[:2], taken[:2]), (into[2:, :3], taken[2:, :3]), (into[2:, 3:, 1:4], taken[2:, 3:, 1:4])]
    graph = graph_of(runtime, Copies(pairs))
    assert graph.nodes == 1 + 1 + 4
    for _ in range(2):
        graph.launch(0)
        want = torch.zeros_like(into)
        for (place, _), source in zip(
            [(want[:2], 0), (want[2:, :3], 0), (want[2:, 3:, 1:4], 0)], [t for _, t in pairs], strict=True
        ):
            place.copy_(source)
        assert torch.equal(into, want)
        taken += 1


def test_stages_of_a_graph_follow_each_other(runtime):
    """Each waits for all of the one before it, as the copies wait for the average and the sums for the copies."""
    a, b, c = (torch.zeros(4, 4) for _ in range(3))
    first = Copies([(b[i], a[i]) for i in range(4)])
    second = Copies([(c[i], b[i]) for i in range(4)])
    graph = graph_of(runtime, first, second)
    a += torch.arange(4.0)
    graph.launch(0)
    assert torch.equal(c, a)
    with pytest.raises(RuntimeError, match="launched already"):
        graph.then_copies(first.rows)
    with pytest.raises(RuntimeError, match=r"cudaGraphLaunch: invalid argument \(1\)"):
        graph.launch(13)


def test_a_captured_graph_is_a_part_of_it(runtime, fake):
    """Here one that the fake library made; on a GPU torch's."""
    a, b, c = torch.arange(4.0), torch.zeros(4), torch.zeros(4)
    recorded = Recorded(fake, b, a)
    graph = host.require("ipc").PublishGraph(runtime, 0)
    graph.then_graph(recorded.raw_cuda_graph())
    graph.then_copies(Copies([(c, b)]).rows)
    assert graph.nodes == 2
    graph.launch(0)
    assert torch.equal(c, a)


def test_a_part_of_more_than_a_gibibyte_is_cut(runtime):
    """A node's row must be shorter than 2 GiB: shown on addresses alone, nothing is copied."""
    entries = [(1 << 40, 1 << 41, 2, [5 << 29], [1], [1])]
    graph = host.require("ipc").PublishGraph(runtime, 0)
    graph.then_copies(host.require("ipc").Copies(entries))
    assert graph.nodes == 5


def test_a_moved_model_is_written_through_views_of_device_memory(runtime, monkeypatch):
    fake_gpu.installed(monkeypatch, runtime, ["cpu"])
    memory, model, plan = CudaMemory(), Fused(), plan_of()
    (granted,) = memory.grant([plan], ["cpu"])
    bind(model, plan, open_part(granted, torch.device("cuda", 0)))
    made = Destinations([plan], memory.parts)
    made["norm"].copy_(torch.arange(6.0))
    assert torch.equal(model.norm.detach(), torch.arange(6.0))


class Recorded:
    """In the place of a torch.cuda.CUDAGraph: one copy, as the fake library records it."""

    def __init__(self, fake, into, taken):
        self.graph, node = ctypes.c_void_p(), ctypes.c_void_p()
        size = into.numel() * into.element_size()
        assert fake.cudaGraphCreate(ctypes.byref(self.graph), 0) == 0
        words = [0] * 4 + [taken.data_ptr(), size, size, 1] + [0] * 4 + [into.data_ptr(), size, size, 1, size, 1, 1]
        copy = Copy3D(*words, 4)
        assert fake.cudaGraphAddMemcpyNode(ctypes.byref(node), self.graph, None, 0, ctypes.byref(copy)) == 0

    def raw_cuda_graph(self):
        return self.graph.value


class Copy3D(ctypes.Structure):
    """cudaMemcpy3DParms."""

    _fields_ = [(f"word{i}", ctypes.c_size_t) for i in range(19)] + [("kind", ctypes.c_int)]


@pytest.mark.parametrize("verify", [False, True])
def test_a_captured_pass_is_average_copies_and_sums_in_this_order(runtime, fake, monkeypatch, verify):
    """As on a GPU, but of recorded copies: the average fills the stages, a sum is a snapshot of a part."""
    fake_gpu.installed(monkeypatch, runtime, [])
    device = torch.device("cpu", 0)
    plans = [plan_of(rank, 2) for rank in range(2)]
    parts = [torch.zeros(plan.layout()[1], dtype=torch.uint8) for plan in plans]
    served = Destinations(plans, parts)
    live, seen = torch.arange(24.0).view(4, 6), [torch.zeros_like(part) for part in parts]
    served.verify = verify
    for sums, part, copy in zip(served.sums, parts, seen, strict=True):
        sums.device, sums.launch = device, (part, copy)
    monkeypatch.setattr(capture, "captured", lambda calls, _: Recorded(fake, calls[1], calls[0]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    made = capture.CapturedPass(Recorded(fake, served["q"], live), served, device, verify=verify)
    for _ in range(2):
        made.replay(served)
        for rank, (plan, part, copy) in enumerate(zip(plans, parts, seen, strict=True)):
            found = part[plan.layout()[0]["qkv"] :][: 12 * 4].view(torch.float32)
            assert torch.equal(found, live[2 * rank : 2 * rank + 2].flatten())
            assert torch.equal(copy, part if verify else torch.zeros_like(part))
        assert (served.scattered, served.summed) == (True, verify)
        live += 1
    assert made._graph.nodes == 1 + len(served.copies.rows) + 2 * verify
