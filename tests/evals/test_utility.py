"""The real lm-evaluation-harness on a tiny model with a local task, offline; its figures in our table."""

import json
import math
from pathlib import Path

import loopback
import models
import pytest
from eval_files import lines
from eval_server import Plan, serving, spec

from advgame.cli import main
from advgame.evals.utility import harness_results

pytest.importorskip("lm_eval")

TASK = """task: tiny_tools
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["tool", "python"]
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
"""


@pytest.mark.slow
def test_a_local_task_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    loopback.forbid(monkeypatch.setattr)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = models.bpe_folder(tmp_path / "m", "qwen2")
    data = lines(tmp_path / "d.jsonl", [{"question": "use the", "answer": i % 2} for i in range(10)])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tiny.yaml").write_text(TASK.replace("DATA", str(data)))
    utility = [{"tasks": ["tiny_tools"], "include_path": "tasks"}]
    (tmp_path / "suite.yaml").write_text(json.dumps({"name": "u", "utility": utility}))
    words = ["eval", str(folder), "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 0
    (results,) = json.loads((tmp_path / "out/table.json").read_text())["results"].values()
    (acc,) = [r for r in results if r["metric"] == "acc"]
    # every question is the same, so the model picks one answer always, which is right half the time
    assert (acc["set"], acc["estimate"]["value"], acc["estimate"]["n"]) == ("tiny_tools", 0.5, 10)
    half = 1.96 * math.sqrt(0.25 / 9)
    assert acc["estimate"]["high"] - 0.5 == pytest.approx(half, rel=1e-6)
    assert "lm-evaluation-harness 0.4" in acc["convention"]
    assert "task version 3.0" in acc["convention"]
    capsys.readouterr()
    assert main([*words, "--limit", "4"]) == 0
    assert "n=4" in capsys.readouterr().out
    (tmp_path / "suite.yaml").write_text(json.dumps({"name": "u", "utility": [{"tasks": ["tiny_toolz"]}]}))
    assert main(words) == 2
    assert "has no task 'tiny_toolz'" in capsys.readouterr().err


IFEVAL = """include: HARNESS/tasks/ifeval/ifeval.yaml
task: ifeval_here
dataset_path: json
dataset_kwargs: {data_files: {train: DATA}}
"""


@pytest.mark.slow
def test_ifeval_itself_on_answers_that_are_known(tmp_path, monkeypatch):
    """The harness's own IFEval task, checks and aggregation on three questions of ours, against a server whose answers
    are fixed: five instructions, three followed to the letter, four when the first line may be left out.
    """
    for name in ("langdetect", "immutabledict", "aiohttp"):
        pytest.importorskip(name)
    import lm_eval
    import nltk

    loopback.forbid(monkeypatch.setattr)
    # the checks import only if this folder is there; none of those below reads it
    (tmp_path / "nltk/tokenizers/punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk"), *nltk.data.path])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    comma, zebra = "punctuation:no_comma", "keywords:existence"
    asked = [("one", [comma, zebra]), ("two", [comma]), ("three", [zebra, comma])]
    keywords = {comma: {}, zebra: {"keywords": ["zebra"]}}
    data = lines(
        tmp_path / "ifeval.jsonl",
        [
            {"key": key, "prompt": prompt, "instruction_id_list": names, "kwargs": [keywords[name] for name in names]}
            for key, (prompt, names) in enumerate(asked)
        ],
    )
    (tmp_path / "tasks").mkdir()
    task = IFEVAL.replace("HARNESS", str(Path(lm_eval.__file__).parent)).replace("DATA", str(data))
    (tmp_path / "tasks/ifeval_here.yaml").write_text(task)
    answers = {"one": "a zebra here", "two": "Well, then:\nno stripes", "three": "nothing"}
    utility = [{"tasks": ["ifeval_here"], "include_path": "tasks", "name": "ifeval"}]
    (tmp_path / "suite.yaml").write_text(json.dumps({"name": "u", "utility": utility}))
    with serving(Plan(lambda text: answers[text])) as url:
        words = ["--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out"), "--quiet"]
        assert main(["eval", spec(url, timeout_s=20, concurrency=1), *words]) == 0
    (results,) = json.loads((tmp_path / "out/table.json").read_text())["results"].values()
    found = {r["metric"]: (r["estimate"]["value"], r["estimate"]["n"]) for r in results}
    assert found == {
        "prompt_level_strict_acc": (pytest.approx(1 / 3), 3),
        "inst_level_strict_acc": (pytest.approx(3 / 5), 3),
        "prompt_level_loose_acc": (pytest.approx(2 / 3), 3),
        "inst_level_loose_acc": (pytest.approx(4 / 5), 3),
    }


def test_ifevals_four_metrics_are_all_kept():
    """In the harness's own form of results."""
    four = {f"{level}_level_{kind}_acc": 0.1 * i for i, (level, kind) in enumerate(
        [("prompt", "strict"), ("inst", "strict"), ("prompt", "loose"), ("inst", "loose")], start=1)}  # fmt: skip
    values = {"alias": "ifeval"}
    for name, value in four.items():
        values |= {f"{name},none": value, f"{name}_stderr,none": 0.01 if name.startswith("prompt") else "N/A"}
    out = {
        "results": {"ifeval": values},
        "n-samples": {"ifeval": {"original": 541, "effective": 541}},
        "n-shot": {"ifeval": 0},
        "versions": {"ifeval": 4.0},
        "higher_is_better": {"ifeval": dict.fromkeys(four, True)},
    }
    found = {r.metric: r for r in harness_results(out, "0.4.13", "hf")}
    assert {name: r.estimate.value for name, r in found.items()} == pytest.approx(four)
    assert all(r.estimate.n == 541 for r in found.values())
    assert found["prompt_level_strict_acc"].estimate.high == pytest.approx(0.1 + 0.0196)
    assert math.isnan(found["inst_level_loose_acc"].estimate.high)
