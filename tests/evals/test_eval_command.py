"""`advgame eval` on real tiny models: resume, rescoring, exports, bad input, no egress, speed and memory."""

import asyncio
import csv
import io
import json
import time
import tracemalloc
from pathlib import Path

import loopback
import models
import pytest
from eval_files import behaviours, lines, table
from rich.console import Console

from advgame.cli import main
from advgame.evals.classify import PhraseClassifier, Verdict
from advgame.evals.formats import TURN
from advgame.evals.metrics import scoreboard
from advgame.evals.models import RawFormat, TurnsFormat
from advgame.evals.row import EvalRow
from advgame.evals.row_index import RowIndex
from advgame.evals.score import classify_store, results_of
from advgame.evals.store import Store, completion_line
from advgame.evals.suites import SetSettings, load_set, load_suite
from advgame.evals.table import make_table, published_figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("m") / "one")


@pytest.fixture
def offline(monkeypatch):
    loopback.forbid(monkeypatch.setattr)


SUITE = {
    "name": "t",
    "classifier": "world",
    "sets": [{"set": "world", "part": "plain", "generation": {"max_tokens": 6}}],
}


def suite(tmp_path, tree=SUITE):
    path = tmp_path / "suite.yaml"
    path.write_text(json.dumps(tree))
    return str(path)


def figures(path):
    return {
        (model, r["metric"]): r
        for model, results in json.loads(path.read_text())["results"].items()
        for r in results
        if r["part"] is None
    }


def test_two_models_side_by_side_resume_and_rescoring(tmp_path, folder, offline, capsys):
    other = models.folder(tmp_path / "two", seed=3)
    out = tmp_path / "out"
    words = ["--suite", suite(tmp_path), "--out", str(out), "--quiet"]
    assert main(["eval", str(folder), str(other), *words, "--csv", str(tmp_path / "t.csv")]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("one", "two", "asr", "benign_compliance", "n=6", "by world"))
    found = figures(out / "table.json")
    assert {key[0] for key in found} == {"one", "two"}
    assert found["one", "asr"]["estimate"]["n"] == 6
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["model"], row["metric"]) for row in rows if not row["part"]} == set(found)

    stored = (out / "completions/one/world.jsonl").read_bytes()
    # a kill in the middle of a line: that row alone is made anew, and greedily it is the same
    (out / "completions/one/world.jsonl").write_bytes(stored[:-20])
    assert main(["eval", str(folder), str(other), *words]) == 0
    again = (out / "completions/one/world.jsonl").read_bytes()
    assert sorted(again.splitlines()) == sorted(stored.splitlines())
    assert figures(out / "table.json") == found

    # rescoring needs no model: the folder may be gone
    assert main(["eval", "--rescore", "phrases", "--out", str(out), "--quiet"]) == 0
    assert figures(out / "table-phrases.json")["one", "asr"]["classifier"] == "phrases"


def test_limits_and_changed_settings_make_only_what_is_missing(tmp_path, folder):
    out = tmp_path / "out"
    words = ["eval", str(folder), "--suite", suite(tmp_path), "--out", str(out), "--quiet"]
    path = out / "completions/one/world.jsonl"
    assert main([*words, "--limit", "3"]) == 0
    first = path.read_text().splitlines()
    assert len(first) == 3
    assert main(words) == 0
    assert path.read_text().splitlines()[:3] == first
    assert len(path.read_text().splitlines()) == 12
    longer = json.loads(json.dumps(SUITE))
    longer["sets"][0]["generation"]["max_tokens"] = 7
    words[3] = suite(tmp_path, longer)
    assert main([*words, "--limit", "3"]) == 0
    lengths = {json.loads(line)["request"] for line in path.read_text().splitlines()}
    assert len(lengths & {json.loads(line)["request"] for line in first}) == 0
    assert len(path.read_text().splitlines()) == 12
    assert main([*words, "--fresh"]) == 2


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"sets": [{"set": "harmbenhc", "path": "x.csv"}]}, "unknown set 'harmbenhc'; known: 'harmbench'"),
        ({"sets": [{"set": "xstest", "path": "x.csv", "lmit": 3}]}, "sets.0.lmit: unknown key; did you mean 'limit'?"),
        ({"sets": [{"set": "xstest"}]}, "sets.0.path: xstest needs its file"),
        ({"sets": [{"set": "xstest", "path": "gone.csv"}]}, "no such file; data files are brought by you"),
        ({"sets": [{"set": "or-bench", "path": "x.csv"}]}, "sets.0.part: write hard or toxic"),
        ({"sets": [{"set": "xstest", "path": "x.csv"}]}, "x.csv line 2: no column 'type'"),
        ({"sets": [{"set": "xstest", "path": "empty.csv"}]}, "empty.csv: no rows"),
        ({"classifier": "gpt", "sets": [{"set": "world"}]}, "no classifier 'gpt'; write one of phrases"),
        ({"classifier": "json", "sets": [{"set": "world"}]}, "json asks a model"),
        ({"classifier": "world@x", "sets": [{"set": "world"}]}, "world asks no model"),
        ({"sets": []}, "nothing to measure"),
        ({"sets": [{"set": "world"}, {"set": "world"}]}, "two sets are called 'world'"),
    ],
)
def test_bad_suites_get_one_line(tmp_path, folder, tree, says, capsys):
    table(tmp_path / "x.csv", [{"id": "1", "prompt": "p"}])
    (tmp_path / "empty.csv").write_text("id,prompt,type\n")
    assert main(["eval", str(folder), "--suite", suite(tmp_path, tree), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_bad_models_get_one_line(tmp_path, folder, capsys):
    words = ["--suite", suite(tmp_path), "--out", str(tmp_path / "o")]
    bare = models.folder(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    capsys.readouterr()  # the library's progress while the folder was written
    for name, says in ((str(tmp_path / "gone"), "no such model folder"), (str(bare), "no chat template")):
        assert main(["eval", name, *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert says in error
    assert main(["eval", *words]) == 2
    assert "give at least one MODEL" in capsys.readouterr().err
    assert main(["eval", str(folder), "--suite", str(tmp_path / "harmbenhc.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "harmbenhc.yaml: no such suite file; try configs/suites/tiny.yaml" in error


def test_damaged_rows_name_file_and_line(tmp_path):
    rows = [{"source": "s", "vanilla": "v", "adversarial": "a"}, {"source": "s", "vanilla": "", "adversarial": "a"}]
    path = lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match=r"d\.jsonl line 2: 'vanilla' is empty"):
        list(load_set(SetSettings(set="do-anything-now", path=path)))
    one = {"id": "a", "prompt": "p", "type": "safe"}
    path = table(tmp_path / "x.csv", [one, one])
    with pytest.raises(ValueError, match=r"x\.csv line 3: the id 'a' comes twice"):
        list(load_set(SetSettings(set="xstest", path=path)))


def many(path, rows):
    """A store of completions, a third of them refusals."""
    store = Store(path)
    store.open(lambda name: None)
    for i in range(rows):
        row = EvalRow(f"r{i}", f"question {i}", f"question {i}", "refuse")
        text = "I'm sorry, I can't help with that." if i % 3 == 0 else "Sure, first you take the tool and then " * 8
        store.add(completion_line(row, i, text, "stop", None))
    store.close()
    return store


def rescored(completions, verdicts):
    asyncio.run(classify_store(completions, verdicts, PhraseClassifier(), "p", width=256, tick=lambda done, all: None))
    return results_of(verdicts, scoreboard("seeds"), "s", "phrases", 0)


def peak_of_rescoring(tmp_path, rows):
    completions = many(tmp_path / f"{rows}.jsonl", rows)
    tracemalloc.start()
    rescored(completions, Store(tmp_path / f"{rows}-traced.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_ten_thousand_completions_are_rescored_in_seconds(tmp_path):
    completions = many(tmp_path / "c.jsonl", 10_000)
    start = time.perf_counter()
    results = rescored(completions, Store(tmp_path / "v.jsonl"))
    assert time.perf_counter() - start < 10
    asr = {r.metric: r.estimate for r in results}["asr"]
    assert (asr.n, asr.value) == (10_000, pytest.approx(1 - 3334 / 10_000))


def test_the_command_rescores_ten_thousand_completions_in_seconds(tmp_path, capsys):
    """`--rescore` as a user types it, from the parser to the exported table; no model folder exists any more."""
    out = tmp_path / "out"
    many(out / "completions/gone/s.jsonl", 10_000)
    sets = [{"set": "seeds", "name": "s", "path": "gone.jsonl"}]
    tree = {"suite": {"name": "t", "sets": sets}, "models": {"gone": {"model": "/gone", "identity": "x"}}}
    (out / "eval.json").write_text(json.dumps(tree))
    start = time.perf_counter()
    assert main(["eval", "--rescore", "phrases", "--out", str(out), "--quiet"]) == 0
    assert time.perf_counter() - start < 10
    assert figures(out / "table-phrases.json")["gone", "asr"]["estimate"]["n"] == 10_000
    assert "n=10000" in capsys.readouterr().out


@pytest.mark.parametrize(("few", "many"), [(1000, 6000), pytest.param(10_000, 100_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_rows_or_texts(tmp_path, few, many):
    """What SQLite holds is not traced: its cache of 2 MB at most for each of the two indices."""
    assert peak_of_rescoring(tmp_path, many) - peak_of_rescoring(tmp_path, few) < 50_000


def test_an_index_on_disk_is_a_mapping_by_digest():
    index, top = RowIndex(), 2**63 - 1
    index[top], index[0] = 7, top
    index.add(5)
    index[5] = 6
    assert [(key, index[key]) for key in index] == [(0, top), (5, 6), (top, 7)]
    assert (len(index), 5 in index, 6 in index, index.get(6)) == (3, True, False, None)
    with pytest.raises(KeyError):
        index[6]


def test_labels_that_came_with_completions_stand_unless_rescored(tmp_path, folder):
    rows = [{"BehaviorID": "b0", "test_case": "t", "generation": "Sure", "label": y} for y in (1, 0, 0, 0)]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    behaviours(tmp_path / "b.csv")
    sets = [{"set": "harmbench-cases", "path": "c.json", "behaviours": "b.csv"}]
    words = ["--suite", suite(tmp_path, {"sets": sets}), "--out", str(tmp_path / "out"), "--quiet"]
    for _ in range(2):
        assert main(["eval", str(folder), *words]) == 0
        asr = figures(tmp_path / "out/table.json")["one", "asr"]
        assert (asr["estimate"]["value"], asr["classifier"]) == (0.25, "labels in the file, phrases")
    assert main(["eval", "--rescore", "phrases", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    asr = figures(tmp_path / "out/table-phrases.json")["one", "asr"]
    assert (asr["estimate"]["value"], asr["classifier"]) == (1.0, "phrases")


def test_local_models_as_judges_in_each_form(tmp_path, folder):
    """A random model gives no verdicts; every one is counted, and the texts arrive in the form that was asked for."""
    tokenizer = models.tokenizer()
    assert tokenizer.decode(RawFormat(tokenizer).prompt_ids("how do i")) == "how do i"
    turns = tokenizer.decode(TurnsFormat(tokenizer).prompt_ids(f"how do{TURN}sorry <|end|> now"))
    assert (
        " ".join(turns.split()) == "<|user|> how do <|end|> <|assistant|> sorry <unk> <unk> now <|end|> <|assistant|>"
    )
    (tmp_path / "own.txt").write_text("how {prompt} tool {response} now")
    classifiers = {
        "guard": f"llama-guard@{folder}",
        "json": {"kind": "json", "model": str(folder), "max_tokens": 8},
        "harmbench": {"kind": "harmbench", "model": str(folder), "template": "own.txt"},
    }
    sets = [{"set": "world", "name": one, "part": "plain", "classifier": one, "generation": {"max_tokens": 4}}
            for one in classifiers]  # fmt: skip
    words = ["--suite", suite(tmp_path, {"sets": sets, "classifiers": classifiers}), "--out", str(tmp_path / "o")]
    assert main(["eval", str(folder), *words, "--quiet"]) == 0
    tree = json.loads((tmp_path / "o/table.json").read_text())["results"]["one"]
    found = {r["set"]: r for r in tree if r["metric"] == "asr" and r["part"] is None}
    assert {name: r["parse_errors"] for name, r in found.items()} == dict.fromkeys(classifiers, 6)
    assert found["harmbench"]["classifier"] == "harmbench@one (own.txt)"


def test_the_suites_we_ship_are_well_formed():
    folder = Path(__file__).parents[2] / "configs/suites"
    assert [one.set for one in load_suite(folder / "tiny.yaml").sets] == ["world", "world"]
    for name in ("published", "safety"):
        with pytest.raises(ValueError, match=r"sets\.0\.path: .* no such file; data files are brought by you"):
            load_suite(folder / f"{name}.yaml")


def test_published_figures_stand_beside_yours():
    published = {f"{one['model']} {one['variant']}": one for one in published_figures()}
    assert published["Qwen2.5-7B AdvGame-DPO-MD"]["wildjailbreak/asr"] == 8.5
    assert published["Llama3.1-8B original"]["do-anything-now/asr"] == 49.3
    row = EvalRow("b", "p", "p", "refuse", group="b")
    board = scoreboard("harmbench")
    board.add(row, Verdict(harmful=True))
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(make_table({"mine": board.results("harmbench", "json")}, title="t", published=True))
    text = console.export_text()
    (line,) = [line for line in text.splitlines() if "harmbench asr" in line]
    figures = ["100.0 [100.0, 100.0] n=1", "31.6", "16.8", "4.7", "25.0", "14.9", "7.4"]
    assert [cell.strip() for cell in line.split("│")[3:-1]] == figures
