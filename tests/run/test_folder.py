"""Run folders: layout, refusals, attempts and the lock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from advgame.errors import InputError
from advgame.run.environment import mask_secrets
from advgame.run.folder import RunFolder, write_text_atomically


def make(root, name="run"):
    return RunFolder.create(root, name, "run: {steps: 3}\n", purpose="a test")


def test_layout(tmp_path):
    with make(tmp_path / "runs") as folder:
        assert folder.attempt == 0
        assert folder.config.read_text() == "run: {steps: 3}\n"
        assert all(path.is_dir() for path in (folder.trees, folder.checkpoints, folder.tensorboard))
        assert folder.metrics.read_text() == ""
        assert "a test" in folder.notice.read_text()
        (start,) = json.loads(folder.environment.read_text())["starts"]
        for key in ("git_commit", "git_dirty", "torch", "transformers", "triton", "advgame", "cpu_count", "argv"):
            assert key in start


def test_default_names_never_collide(tmp_path):
    names = {make(tmp_path, None).name for _ in range(5)}
    assert len(names) == 5


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "/abs"])
def test_bad_name(tmp_path, name):
    with pytest.raises(InputError, match="run name"):
        make(tmp_path, name)


def test_existing_name_and_bad_root(tmp_path):
    make(tmp_path).close()
    with pytest.raises(InputError, match="exists already"):
        make(tmp_path)
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="another root"):
            make(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_root(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        make(tmp_path)


def test_attempts_count_resumes(tmp_path):
    make(tmp_path).close()
    for attempt in (1, 2):
        with RunFolder.resume(tmp_path / "run") as folder:
            assert folder.attempt == attempt
    assert RunFolder.open(tmp_path / "run").attempt == 2
    assert len(json.loads((tmp_path / "run/environment.json").read_text())["starts"]) == 3


@pytest.mark.parametrize("damage", ["none", "no environment", "bad json", "no starts"])
def test_not_a_run_folder(tmp_path, damage):
    path = tmp_path / "run"
    if damage != "none":
        make(tmp_path).close()
        environment = path / "environment.json"
        environment.unlink() if damage == "no environment" else environment.write_text(
            "{" if damage == "bad json" else '{"starts": []}'
        )
    for opening in (RunFolder.open, RunFolder.resume):
        with pytest.raises(InputError, match=r"run folder|starts"):
            opening(path)


def test_lock_names_the_other_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from advgame.run.folder import RunFolder\n"
        "RunFolder.create(Path(sys.argv[1]), 'run', '', purpose='x'); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(InputError, match=f"pid {other.pid} "):
            RunFolder.resume(tmp_path / "run")
        assert RunFolder.open(tmp_path / "run").attempt == 0, "reading needs no lock"
        other.kill()
    with RunFolder.resume(tmp_path / "run") as folder:
        assert folder.attempt == 1, "a killed writer leaves no lock behind, and a refused resume is no attempt"


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks into /proc")
def test_forked_child_does_not_keep_the_lock(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from advgame.run.folder import RunFolder\n"
        "f = RunFolder.create(Path(sys.argv[1]), 'run', '', purpose='x')\n"
        "pid = os.fork()\n"
        "if pid == 0: os.close(1); time.sleep(30); os._exit(0)\n"
        "print(pid, flush=True); os._exit(0)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, check=True)
    child = int(run.stdout)
    try:
        assert Path(f"/proc/{child}/cmdline").read_bytes(), "the child must be alive for this to test anything"
        RunFolder.resume(tmp_path / "run").close()
    finally:
        os.kill(child, 9)


def test_failed_write_keeps_the_old_text(tmp_path):
    path = tmp_path / "a.json"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "\ud800")
    assert path.read_text() == "old"


def test_secrets_are_masked():
    argv = ["advgame", "--judge.api_key=abc", "--judge.api-key", "def", "--max_tokens=5", "HF_TOKEN=x", "--api_key"]
    assert mask_secrets(argv) == [
        "advgame", "--judge.api_key=***", "--judge.api-key", "***", "--max_tokens=5", "HF_TOKEN=***", "--api_key",
    ]  # fmt: skip
