"""What is read from a run folder or a model folder is data: no pickle is loaded from it, and no code of it runs."""

import hashlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import models
import pytest
import torch
from defender_runs import SHORT, config_file

from advgame import cli
from advgame.errors import InputError
from advgame.learn.load import load_model
from advgame.run.checkpoint_files import _state_checksum

_unpickled: list[str] = []
sys.addaudithook(lambda event, arguments: event == "pickle.find_class" and _unpickled.append(".".join(arguments)))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def config_of(folder, player):
    run = {"root": str(folder), "name": "run", "purpose": "a test", "steps": 2, "checkpoint_every": 1}
    return config_file(
        folder,
        player,
        SHORT,
        run=run | {"validate_every": 0, "threads": 1},
        data={"harmful": 2, "benign": 2, "validation_limit": 4},
        max_tokens=12,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main(["train", str(config_of(folder, models.folder(folder / "player"))), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(run):
    return cli.main(["resume", str(run), "--quiet", "--run.steps", "3"])


def seal(checkpoint):
    """New checksums for what lies there now, as whoever plants a file would write them."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["checksum"]
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "state.json")
    state["checksums"] = {
        path.relative_to(checkpoint).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    (checkpoint / "state.json").write_text(json.dumps(state | {"checksum": _state_checksum(state)}))


def test_nothing_is_unpickled(run):
    pickle.loads(pickle.dumps(Path("x")))
    assert _unpickled, "the hook hears of it"
    _unpickled.clear()
    assert resume(run) == 0
    assert cli.main(["report", str(run), "--out", str(run.parent / "page.html")]) == 0
    assert _unpickled == []


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
@pytest.mark.parametrize(
    "name",
    ["defender/model.safetensors", "defender-ema/model.safetensors", "optimizer-defender.safetensors", "state.json",
     "defender/tokenizer.json"],
)  # fmt: skip
def test_a_pickle_in_the_place_of_a_file_is_refused(run, tmp_path, capsys, name, form):
    """Sealed anew, so that no checksum saves us; and every checkpoint, so that there is none to fall back to."""
    marker = tmp_path / "marker"
    for checkpoint in (run / "checkpoints").glob("step-*"):
        with (checkpoint / name).open("wb") as file:
            (pickle.dump if form == "pickle" else torch.save)(Evil(marker), file)
        if name != "state.json":
            seal(checkpoint)
    capsys.readouterr()
    code = resume(run)
    if name != "defender/tokenizer.json":  # which a resume does not read: it starts from the player's own folder
        assert code in (1, 2)
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("advgame: ")
    assert not marker.exists()


def test_a_pickle_beside_missing_safetensors_is_not_loaded(run, tmp_path, capsys):
    """What transformers would look for next in a folder without safetensors."""
    marker = tmp_path / "marker"
    for checkpoint in (run / "checkpoints").glob("step-*"):
        for folder in (checkpoint / "defender", checkpoint / "defender-ema"):
            (folder / "model.safetensors").unlink()
            torch.save({"model.embed_tokens.weight": Evil(marker)}, folder / "pytorch_model.bin")
        seal(checkpoint)
    assert resume(run) in (1, 2)
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("advgame: ")
    # as an evaluation of the run would load it
    with pytest.raises(InputError, match=r"model: no weights load from .*defender-ema"):
        load_model(checkpoint / "defender-ema", "model")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["config.yaml", "environment.json", "metrics.jsonl", "summary.json", "trees/000001.jsonl.gz"]
)
def test_a_pickle_in_the_run_folder_is_refused(run, tmp_path, capsys, name):
    marker = tmp_path / "marker"
    (run / name).write_bytes(pickle.dumps(Evil(marker)) + b"\n")  # a line: what is none is set aside
    codes = [cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]), resume(run)]
    assert not marker.exists()
    for line in capsys.readouterr().err.splitlines():
        assert "Traceback" not in line
    assert set(codes) <= {0, 1, 2}
    if name in ("config.yaml", "environment.json", "metrics.jsonl"):
        assert codes[1] == 2


CODE = """
open({marker!r}, "w").close()
from transformers import Qwen2Config, Qwen2ForCausalLM, PreTrainedTokenizerFast
class OwnConfig(Qwen2Config):
    model_type = "own"
class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_code_of_a_model_folder_does_not_run_unless_asked_for(tmp_path, capsys, monkeypatch, what):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    player, marker = models.folder(tmp_path / "player"), tmp_path / "marker"
    (player / "own.py").write_text(CODE.format(marker=str(marker)))
    if what == "config":
        settings = json.loads((player / "config.json").read_text())
        settings |= {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        }
        (player / "config.json").write_text(json.dumps(settings))
    else:
        settings = json.loads((player / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        (player / "tokenizer_config.json").write_text(json.dumps(settings))
    words = ["train", str(config_of(tmp_path, player)), "--quiet"]
    code = cli.main(words)
    err = capsys.readouterr().err
    assert not marker.exists()
    if what == "config":
        assert code == 2
        assert err.strip().splitlines()[-1].startswith("advgame: defender.model: ")
        assert "brings Python code of its own; set trust_remote_code" in err
    assert cli.main([*words, "--trust_remote_code", "true", "--run.name", "trusted"]) == 0
    assert marker.exists()
