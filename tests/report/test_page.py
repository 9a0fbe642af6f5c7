"""The command and its page, read without a browser: structure, escaping, what is left out, bad input."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import fails
from run_samples import EVIL, make_run

from advgame import cli
from advgame.report.command import names_of, write_report
from advgame.report.page import SCRIPTS


class Page(HTMLParser):
    """Scripts by id, and every tag with its attributes."""

    def __init__(self, path):
        super().__init__()
        self.scripts, self.tags, self._id = {}, [], None
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._id = dict(attrs).get("id", "program") if tag == "script" else None

    def handle_endtag(self, tag):
        self._id = None

    def handle_data(self, data):
        if self._id:
            self.scripts[self._id] = self.scripts.get(self._id, "") + data

    @property
    def data(self):
        return json.loads(self.scripts["report-data"])

    def packed(self, name):
        return gzip.decompress(base64.b64decode(self.scripts[name]))

    def trees(self, run=0):
        chunks = json.loads(self.scripts[f"index-{run}"])["chunks"]
        return [json.loads(line) for i in range(chunks) for line in self.packed(f"trees-{run}-{i}").split(b"\n")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report([run], None, quiet=True))


def test_one_file_that_asks_for_nothing(run, page):
    assert (run / "report.html").is_file()
    assert not list(run.glob(".report*"))
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "data", "action"} & set(attributes), tag
        assert attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert set(re.findall(r"https?://[\w./]+", page.text)) == {"http://www.w3.org/2000/svg"}


def test_text_of_a_run_is_never_markup(page):
    assert EVIL not in page.text
    assert "window.pwned" not in page.text, "trees are packed, and JSON holds no tree"
    assert [tag for tag, _ in page.tags if tag in ("img", "b", "iframe")] == []
    assert page.data["runs"][0]["purpose"] == "a test of <b>pages</b>"
    assert {a.get("type") for tag, a in page.tags if tag == "script"} == {None, "application/json", "text/plain"}
    assert sum(tag == "script" and not a for tag, a in page.tags) == 1


def test_trees_are_all_there(page):
    trees = page.trees()
    assert len(trees) == 72
    assert [(t["step"], t["index"]) for t in trees] == [(step, index) for step in range(12) for index in range(6)]
    assert trees[0]["seed"]["text"] == f"{EVIL} 0"
    assert trees[0]["attacks"][0]["raw"] == f"<prompt>{EVIL} attack 0 on 0 at 0</prompt>"


def test_data(page):
    [run] = page.data["runs"]
    assert run["name"] == "run"
    assert ["steps", "12"] in run["facts"]
    assert run["summary"] == [["exploitability ↓", 0.8, 0.35]]
    assert run["seconds"] == {"seconds/play": 18.0, "seconds/learn": 6.0, "seconds/step": 24.0}
    assert run["energy"] == {"processor (s)": 12.0}
    assert run["trees"] == {"recorded": 72, "shown": 72}
    states = {sign["key"]: sign["state"] for sign in run["signs"]}
    assert states["position"] == "look", "30 % of the swapped pairs disagree"
    curves = json.loads(page.packed("curves-0"))
    assert curves["judge/swap_disagreement"] == [list(range(12)), [0.3] * 12]
    assert curves["eval/exploitability"][0] == [0, 3, 6, 9]


def test_panels_name_only_what_was_measured(page):
    curves = json.loads(page.packed("curves-0"))
    panels = {panel["key"]: panel for panel in page.data["panels"]}
    drawn = [line["metric"] for panel in panels.values() for chart in panel["charts"] for line in chart["lines"]]
    assert set(drawn) <= set(curves)
    assert "eval/heldout_exploitability" not in drawn
    assert {chart["kind"] for chart in panels["outcomes"]["charts"]} == {"stack"}
    assert [chart["title"] for chart in panels["frontier"]["charts"]] == [
        "Exact worst case",
        "Held-out seeds: plain",
        "Training trees, as judged",
    ]
    assert len({line for line in drawn if line.startswith("errors/")}) == 1


def test_energy_is_summed_and_power_is_not(tmp_path):
    run = make_run(tmp_path, steps=2)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = {"energy/gpu/attacker_joules": 30.0, "energy/gpu/attacker_watts": 15.0, "energy/joules": 30.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    page = Page(write_report([run], None, quiet=True))
    found = page.data["runs"][0]["energy"]
    assert found == {"energy, all (J)": 60.0, "processor (s)": 2.0, "energy, gpu attacker (J)": 60.0}
    charts = next(panel["charts"] for panel in page.data["panels"] if panel["key"] == "effort")
    lines = {chart["title"]: [line["label"] for line in chart["lines"]] for chart in charts}
    assert lines["Energy of a step"] == lines["Power"] == ["gpu attacker"]


def test_the_program_is_every_module(page):
    assert all(
        f"function {name}" in page.scripts["program"] for name in ("lineChart", "stackChart", "pathChart", "main")
    )
    assert len(SCRIPTS) == len(set(SCRIPTS))


def test_several_runs(run, tmp_path):
    other = make_run(tmp_path, "other <i>", steps=4, noise=2, ended=False)
    page = Page(write_report([run, other], tmp_path / "two.html", quiet=True))
    assert [one["name"] for one in page.data["runs"]] == ["run", "other <i>"]
    assert page.data["runs"][1]["summary"] == []
    assert ["steps", "4 of 12"] in page.data["runs"][1]["facts"]
    assert len(page.trees(1)) == 24
    assert "i" not in {tag for tag, _ in page.tags}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/a/joint/seed0", "/a/turns/seed0"], ["joint/seed0", "turns/seed0"]),
        (["/a/x/1/seed0", "/a/y/1/seed0", "/a/y/1/seed1"], ["x/1/seed0", "y/1/seed0", "y/1/seed1"]),
        (["/a/x", "/a/x", "/b/y"], ["x", "x", "y"]),
        (["/a", "/b/a"], ["/a", "b/a"]),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(paths, expected):
    assert names_of([Path(path) for path in paths]) == expected


def test_aggregates_only(run, tmp_path):
    page = Page(write_report([run], tmp_path / "a.html", most_trees=0, quiet=True))
    assert page.trees() == []
    assert page.data["runs"][0]["trees"] == {"recorded": 72, "shown": 0}
    assert page.data["runs"][0]["judges"], "charts and tables count all trees"


def test_fewer_trees_are_spread_over_the_run(run, tmp_path):
    page = Page(write_report([run], tmp_path / "a.html", most_trees=24, quiet=True))
    assert [t["step"] for t in page.trees()] == [step for step in range(12) for _ in range(2)]
    assert "evenly spread" in page.data["runs"][0]["warnings"][0]


def test_equal_runs_give_equal_pages(run, tmp_path):
    pages = [write_report([run], tmp_path / f"{i}.html", quiet=True).read_text() for i in range(2)]
    assert len({re.sub(r'"generated": "[^"]+"', "", text) for text in pages}) == 1


def test_damaged_trees_are_named_and_the_rest_is_shown(tmp_path, capsys):
    run = make_run(tmp_path, steps=3)
    path = run / "trees" / "000001.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    page = Page(write_report([run], None))
    assert "000001.jsonl.gz" in page.data["runs"][0]["warnings"][0]
    assert {t["step"] for t in page.trees()} >= {0, 2}
    assert "000001.jsonl.gz" in capsys.readouterr().err


def test_without_trees(tmp_path):
    run = make_run(tmp_path, steps=3)
    for path in (run / "trees").iterdir():
        path.unlink()
    (run / "trees").rmdir()
    assert Page(write_report([run], None, quiet=True)).trees() == []


def test_bad_input(capsys, run, tmp_path):
    assert "no such run folder" in fails(capsys, "report", tmp_path / "none")
    assert "not a run folder" in fails(capsys, "report", tmp_path)
    assert "give --out a file" in fails(capsys, "report", run, "--out", tmp_path)
    assert "no such folder" in fails(capsys, "report", run, "--out", tmp_path / "x" / "y.html")
    assert "--trees" in fails(capsys, "report", run, "--trees", "-1")
    assert "unexpected argument" in fails(capsys, "report", run, "--colour", "red")
    assert "at most 8" in fails(capsys, "report", *[run] * 9)


@pytest.mark.parametrize(("name", "text"), [("config.yaml", "a: [1"), ("config.yaml", "3"), ("metrics.jsonl", "{\n1")])
def test_damaged_files(capsys, tmp_path, name, text):
    run = make_run(tmp_path, steps=2)
    (run / name).write_text(text)
    assert name in fails(capsys, "report", run)
    assert not (run / "report.html").exists()


def test_from_the_command_line(capsys, run, tmp_path):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'r.html'}\n"
    assert "reading: 1: run" in err
