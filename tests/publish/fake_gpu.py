"""A CUDA runtime of host memory (fake_cudart.c), compiled once a test session and loaded as the real one is."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from advgame.publish import cuda_memory, host

SOURCE = Path(__file__).with_name("fake_cudart.c")
NEEDS = [
    pytest.mark.skipif(host.missing() is not None, reason="no extension"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc"),
]


def compiled(folder, *flags, source=SOURCE):
    """The path of the library."""
    path = folder / "libcudart-fake.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", *flags, "-o", path, source], check=True)
    return path


def over(memory):
    """The host memory behind a device address, as torch would see it on a GPU."""
    found = memory.__cuda_array_interface__
    assert (found["typestr"], found["version"], found["strides"]) == ("|u1", 3, None)
    (address, readonly), (size,) = found["data"], found["shape"]
    assert not readonly
    buffer = (ctypes.c_uint8 * size).from_address(address)
    buffer.owner = memory
    return torch.frombuffer(buffer, dtype=torch.uint8)


def installed(monkeypatch, runtime, devices):
    """The fake in the place of this process's GPUs, which are called `devices`."""
    monkeypatch.setattr(host, "cuda", lambda: runtime)
    monkeypatch.setattr(cuda_memory, "tensor_over", over)
    monkeypatch.setattr(cuda_memory, "present", lambda: devices)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
