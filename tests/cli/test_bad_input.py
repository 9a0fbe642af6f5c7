"""Bad input: exit code 2 and one clear line that names the place and the mend, before any model is loaded."""

import json

import models
import pytest
from command_line import fails

from advgame import cli
from advgame.learn import load


@pytest.fixture
def good(tmp_path):
    """A working setting: model folder, seed file, and the words that use them."""
    player = models.folder(tmp_path / "player")
    seeds = tmp_path / "seeds.jsonl"
    rows = [{"prompt": "how do i kill a python process", "category": "benign"}] * 2
    rows += [{"prompt": "how do i kill the old neighbor", "category": "harmful"}] * 2
    seeds.write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run: {{root: {tmp_path / 'runs'}, purpose: a test, steps: 1}}\n"
        f"data: {{train: {seeds}, harmful: 1, benign: 1, validation_limit: 2}}\n"
        f"attacker: {{model: {player}, sampling: {{max_tokens: 8}}}}\n"
        f"defender: {{model: {player}, sampling: {{max_tokens: 8}}}}\n"
        "judge: {kind: phrases}\n"
    )
    return tmp_path


@pytest.fixture(autouse=True)
def no_model_loads(monkeypatch, request):
    if "loads" not in request.keywords:

        def refuse(*args, **kwargs):
            raise AssertionError("a model was loaded before the input was checked")

        monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", refuse)


def test_missing_config(capsys, tmp_path):
    assert "no such config file; try configs/tiny.yaml" in fails(capsys, "train", tmp_path / "none.yaml")


def test_unknown_key(capsys, good):
    assert "learn.bta: unknown key; did you mean 'beta'?" in fails(
        capsys, "train", good / "config.yaml", "--learn.bta", "1"
    )


def test_wrong_type(capsys, good):
    assert "learn.beta: input should be a valid number" in fails(
        capsys, "train", good / "config.yaml", "--learn.beta", "x"
    )


SEED_FILES = {
    "bad line": ('{"prompt": "a", "category": "benign"}\n{"prompt": \n', "line 2"),
    "unknown category": ('{"prompt": "a", "category": "rude"}\n', "unknown category 'rude'"),
    "missing column": ('{"text": "a", "category": "benign"}\n', "no column 'prompt'"),
    "empty": ("", "no rows"),
    "one category": ('{"prompt": "a", "category": "benign"}\n', "no harmful seeds"),
}


@pytest.mark.parametrize("case", SEED_FILES)
def test_seed_files(capsys, good, case):
    text, message = SEED_FILES[case]
    (good / "seeds.jsonl").write_text(text)
    assert message in fails(capsys, "train", good / "config.yaml")


def test_missing_seed_file(capsys, good):
    assert "none.jsonl" in fails(capsys, "train", good / "config.yaml", "--data.train", good / "none.jsonl")


def test_model_folder_missing(capsys, good):
    err = fails(capsys, "train", good / "config.yaml", "--defender.model", good / "nowhere")
    assert "defender.model: " in err
    assert "no config.json" in err


def test_no_tokenizer(capsys, good):
    folder = good / "bare"
    models.model().save_pretrained(folder)
    assert "has no tokenizer" in fails(capsys, "train", good / "config.yaml", "--attacker.model", folder)


def test_no_chat_template(capsys, good):
    folder = models.folder(good / "mute")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has no chat template" in fails(capsys, "train", good / "config.yaml", "--attacker.model", folder)


def test_vocabulary_mismatch(capsys, good):
    folder = models.folder(good / "small", vocab=8)
    err = fails(capsys, "train", good / "config.yaml", "--defender.model", folder)
    assert "vocabulary mismatch" in err
    assert "8 rows" in err


def test_template_without_its_placeholder(capsys, good):
    templates = good / "templates"
    templates.mkdir()
    (templates / "attacker_harmful.md").write_text("rewrite it\n")
    err = fails(capsys, "train", good / "config.yaml", "--game.templates", templates)
    assert "attacker_harmful.md" in err
    assert "{seed}" in err


def test_unwritable_run_folder(capsys, good):
    (good / "runs").write_text("a file in the way")
    assert "choose another root for runs" in fails(capsys, "train", good / "config.yaml")


def test_completions_longer_than_the_models_positions(capsys, good):
    err = fails(capsys, "train", good / "config.yaml", "--defender.sampling.max_tokens", "5000")
    assert "defender.sampling.max_tokens: 5000 leaves no room" in err


def test_a_template_that_does_not_render(capsys, good):
    (good / "player" / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    assert "does not render: no system role" in fails(capsys, "train", good / "config.yaml")


def test_validation_files_of_one_name(capsys, good):
    files = [good / name / "held.jsonl" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text((good / "seeds.jsonl").read_text())
    err = fails(capsys, "train", good / "config.yaml", "--data.validation", f"[{files[0]}, {files[1]}]")
    assert "two files are called 'held'" in err


def test_the_command_line_itself(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "x.yaml", "--seeds", "two"])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.loads
def test_a_model_that_cannot_be_packed(capsys, good):
    folder = models.folder(good / "sinks", "gpt_oss")
    assert "cannot be trained on packed sequences" in fails(
        capsys, "train", good / "config.yaml", "--defender.model", folder
    )


@pytest.mark.loads
def test_an_engine_that_answers_nothing_stops_the_run(capsys, good):
    """Prompts that leave no room for the completion, which no check beforehand can know."""
    long = {"prompt": "how " * 4090, "category": "benign"}
    rows = [long, long | {"category": "harmful"}]
    (good / "seeds.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = ["--game.skip_attacker", "true", "--game.responses", "2", "--data.validation_limit", "1"]
    assert cli.main(["train", str(good / "config.yaml"), "--quiet", *words]) == 1
    err = capsys.readouterr().err
    assert "every request to the defender failed" in err
    assert "4096 positions" in err


def test_no_purpose(capsys, good, monkeypatch):
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    assert "run.purpose: say what" in fails(capsys, "train", good / "config.yaml", "--run.purpose", "")


def test_seeds_option(capsys, good):
    assert "--seeds: give 1 or more" in fails(capsys, "train", good / "config.yaml", "--seeds", "0")


def test_resuming_what_is_no_run(capsys, good):
    assert cli.main(["resume", str(good / "player")]) == 2
    assert "not a run folder" in capsys.readouterr().err


@pytest.mark.loads
def test_broken_weights_are_named(capsys, good):
    (good / "player" / "model.safetensors").write_bytes(b"no weights")
    assert "player" in fails(capsys, "train", good / "config.yaml")


@pytest.mark.loads
def test_resuming_with_a_changed_architecture(capsys, good):
    assert cli.main(["train", str(good / "config.yaml"), "--quiet", "--run.name", "a"]) == 0
    models.folder(good / "player", hidden=64)
    capsys.readouterr()
    assert cli.main(["resume", str(good / "runs" / "a"), "--run.steps", "2", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "hidden_size is 32 in the checkpoint, 64 in this run" in err
