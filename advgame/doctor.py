"""`advgame doctor`: what this machine has, what is wrong with it for a run, and how to mend that."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from advgame.errors import InputError

Status = Literal["ok", "warn", "fail"]
SUPPORTED = {  # lowest version, first one that is too new
    "torch": ("2.11", "2.14"),
    "triton": ("3.6", None),
    "transformers": ("5.16.1", "5.20"),
    "deepspeed": ("0.19", None),
    "ray": ("2.50", None),
}
REQUIRED = ("torch", "transformers")
LEAST_DISK_GIB, LEAST_SHARED_GIB, LEAST_FILES = 20.0, 1.0, 4096


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `mend` is empty when all is well."""

    what: str
    status: Status
    found: str
    mend: str = ""


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", help="also check what this config needs")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where runs will be written (default runs)")


def run_doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints every finding; 1 if one of them would stop a run, else 0."""
    findings = [*packages(), *extension(), *gpus(), *limits(), *storage(arguments.root), *network()]
    if arguments.config is not None:
        findings.append(config(arguments.config, overrides))
    width = max(len(one.what) for one in findings)
    for one in findings:
        print(f"{one.status:4}  {one.what:{width}}  {one.found}")
        if one.mend:
            print(f"      {'':{width}}  -> {one.mend}")
    count = {status: sum(one.status == status for one in findings) for status in ("ok", "warn", "fail")}
    print(f"{count['ok']} ok, {count['warn']} to know, {count['fail']} to mend")
    return 1 if count["fail"] else 0


def packages() -> Iterator[Finding]:
    """Python and the libraries whose versions matter. vLLM has its own check of versions."""
    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    yield Finding("python", "fail" if old else "ok", version, "install Python 3.11 or newer" if old else "")
    for name, (low, high) in SUPPORTED.items():
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in REQUIRED:
                yield Finding(name, "fail", "not installed", "pip install 'advgame[train]'")
            else:
                yield Finding(name, "ok", "not installed (optional)")
            continue
        wanted = f">={low}" + (f",<{high}" if high else "")
        if _parts(have) < _parts(low) or (high and _parts(have) >= _parts(high)):
            yield Finding(name, "fail", have, f"pip install '{name}{wanted}'")
        else:
            yield Finding(name, "ok", have)
    try:
        from advgame.rollout.vllm_start import vllm_version

        yield Finding("vllm", "ok", vllm_version("vllm"))
    except InputError as error:
        missing = "not installed" in str(error)
        yield Finding("vllm", "ok" if missing else "warn", "not installed (optional)" if missing else str(error))


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def extension() -> Iterator[Finding]:
    """The C++ kernels, which only matter without a GPU, and the host side of publishing."""
    from advgame_kernels import native

    from advgame.publish import host

    if native.available():
        yield Finding("C++ kernels", "ok", f"built, using {native.isa()}")
    else:
        yield Finding("C++ kernels", "warn", "not built; CPU runs use torch", "install gcc, then: pip install -e .")
    if reason := host.missing():
        yield Finding("publishing", "warn", f"{reason}; vLLM engines are slower", "install gcc, then: pip install -e .")
    else:
        yield Finding("publishing", "ok", "shared memory and CUDA IPC are built")


def gpus() -> Iterator[Finding]:
    """GPUs, whether they reach each other, NCCL, and what CUDA IPC needs."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        mend = "" if built is None else "check the driver: nvidia-smi; torch was built for CUDA " + built
        yield Finding("GPU", "warn" if mend else "ok", "none; the tiny world runs on the CPU", mend)
        return
    count = torch.cuda.device_count()
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        used = total - free > 0.1 * total
        yield Finding(
            f"GPU {index}", "warn" if used else "ok",
            f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free",
            "another process uses it; see nvidia-smi" if used else "",
        )  # fmt: skip
    apart = [
        (a, b) for a in range(count) for b in range(count)
        if a != b and not torch.cuda.can_device_access_peer(a, b)
    ]  # fmt: skip
    if count > 1:
        mend = "weights between them go through host memory; check the topology: nvidia-smi topo -m" if apart else ""
        found = f"{len(apart)} of {count * (count - 1)} pairs cannot reach each other" if apart else "all pairs"
        yield Finding("peer access", "warn" if apart else "ok", found, mend)
    nccl = torch.cuda.nccl.version()
    yield Finding("NCCL", "ok", ".".join(map(str, nccl)))
    from advgame.publish import host

    try:
        runtime = host.cuda()
        yield Finding("CUDA IPC", "ok", f"CUDA runtime {runtime.version // 1000}.{runtime.version % 1000 // 10}")
    except InputError as error:
        yield Finding("CUDA IPC", "fail", str(error))


def limits() -> Iterator[Finding]:
    """Threads, open files, shared memory."""
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    over = threads is not None and threads.isdigit() and int(threads) > cores
    found = f"{cores}, OMP_NUM_THREADS {threads or 'unset'}"
    yield Finding("cores", "warn" if over else "ok", found, f"export OMP_NUM_THREADS={cores}" if over else "")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < LEAST_FILES
    yield Finding("open files", "warn" if few else "ok", str(files), f"ulimit -n {LEAST_FILES}" if few else "")
    try:
        free = shutil.disk_usage("/dev/shm").free / 2**30
    except OSError as error:
        yield Finding("/dev/shm", "warn", str(error.strerror), "mount a tmpfs there; vLLM and NCCL need it")
        return
    small = free < LEAST_SHARED_GIB
    mend = "in Docker: --shm-size 16g (or --ipc host)" if small else ""
    yield Finding("/dev/shm", "warn" if small else "ok", f"{free:.1f} GiB free", mend)


def storage(root: Path) -> Iterator[Finding]:
    """Room and rights where runs and the tiny world's players are written."""
    from advgame.world.warmstart import default_cache

    for name, folder in (("runs", root), ("cache", default_cache())):
        there = folder.resolve()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free / 2**30
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            mend = "set run.root to another folder" if name == "runs" else "set ADVGAME_CACHE to another folder"
            yield Finding(name, "fail", f"{folder}: {error.strerror}", mend)
            continue
        little = free < LEAST_DISK_GIB
        mend = "a checkpoint of two 7 B players takes 240 GB" if little else ""
        yield Finding(name, "warn" if little else "ok", f"{folder}: writable, {free:.0f} GiB free", mend)


def network() -> Iterator[Finding]:
    """A free port on the loopback address, which process groups and Ray need."""
    try:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            yield Finding("loopback", "ok", f"port {one.getsockname()[1]} could be taken")
    except OSError as error:
        yield Finding("loopback", "fail", str(error), "allow sockets on 127.0.0.1")
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    yield Finding("model hub", "ok", "offline (HF_HUB_OFFLINE=1)" if offline else "models load from local folders only")


def config(path: Path, overrides: list[str]) -> Finding:
    """Everything a run checks before it loads a model."""
    from advgame.config import load_config
    from advgame.run.check import check

    try:
        check(load_config(path, overrides))
    except InputError as error:
        return Finding("config", "fail", str(error))
    return Finding("config", "ok", f"{path}: settings, seeds, tokenizers and engines are in order")
