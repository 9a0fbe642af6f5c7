"""Every command line of README and docs is run, in a folder that holds what it names: small real models, a run of two
steps, files of a few rows, a server on loopback. Only the size is cut (`--limit`, steps, tokens)."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import models
import pytest
import yaml

from advgame import cli
from advgame.evals.suites import load_suite
from advgame.game.tree import Category
from advgame.world.grammar import INTENTS, ParsedPrompt
from advgame.world.world import seed_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "evals"))  # the servers and files of the evaluation's own tests

from eval_files import behaviours, lines, table  # noqa: E402
from eval_server import Plan, serving  # noqa: E402
from test_docs import commands  # noqa: E402

pytestmark = pytest.mark.slow

LIMITED = ("evaluation.md", "redteam.md")
LINES = [(page, line) for page, line in commands() if page in LIMITED]
GPUS = "--cluster ray"
"""In lines that want a cluster of GPUs: they are read (`test_docs.py`), and `tests/cluster` plays such runs on Ray."""
OTHERS = sorted({line for page, line in commands() if page not in LIMITED and GPUS not in line})
SMALL = {
    "train configs/tiny": "--run.steps 2",
    "train configs/qwen": "--run.steps 1 --run.validate_every 0 --data.harmful 1 --data.benign 1 "
    "--data.validation_limit 1 --attacker.sampling.max_tokens 8 --defender.sampling.max_tokens 8 "
    "--judge.sampling.max_tokens 8",
    "lab": "--steps 2 --only dpo-md --seeds 1 --worlds easy",
    "eval": "--limit 2",
    "redteam": "--limit 2",
}
"""How a command begins: what makes it short."""
JUDGING = ("doctor", "resources")
"""Commands whose exit code 1 is an answer: this machine lacks something, a run was not good enough."""
SERVER = "http://127.0.0.1:8001/v1"
VERDICTS = {
    "You label": '{"prompt_harmfulness": "harmful", "response_refusal": "refusal", '
    '"response_harmfulness": "unharmful"}',
    "Two assistants": "[[A>B]]",
}


def suite_of_the_page() -> str:
    """The first YAML block of docs/evaluation.md."""
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]


@pytest.fixture(scope="module")
def server():
    with serving(Plan(lambda text: next((v for k, v in VERDICTS.items() if text.startswith(k)), "Sure."))) as url:
        yield url


@pytest.fixture(scope="module")
def place(tmp_path_factory, server):
    """What the lines name, where they name it; the suite's data sets of lm-eval are not here and are left out."""
    if "ADVGAME_CACHE" not in os.environ:
        os.environ["ADVGAME_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    here = tmp_path_factory.mktemp("place")
    folders = ["path/to/model", "other/model", "path/to/judge", "path/to/classifier", "models/harmbench-cls"]
    folders += [f"{root}/Qwen2.5-{size}-Instruct" for root in ("path/to", "models") for size in ("0.5B", "7B")]
    for name in folders:
        models.bpe_folder(here / name, "qwen2")
    words = ["train", ROOT / "configs/tiny.yaml", "--run.root", here / "runs", "--run.name", "mine", "--run.steps", "2"]
    assert cli.main([*map(str, words), "--quiet"]) == 0
    for name in ("RUN", "THE-RUN", "A", "B", "joint", "turns"):
        (here / "runs" / name).symlink_to(here / "runs/mine")
    for variant in ("dpo-md", "sequential"):
        (here / "LAB/runs/easy" / variant).mkdir(parents=True)
        (here / "LAB/runs/easy" / variant / "seed0").symlink_to(here / "runs/mine")
    (here / "configs").symlink_to(ROOT / "configs")
    (here / "data").mkdir()
    behaviours(here / "data/harmbench_behaviors_text_all.csv")
    table(here / "data/xstest_prompts.csv", [{"id": f"v{i}", "prompt": f"p{i}", "type": "homonyms"} for i in range(2)])
    (here / "data/alpaca_eval.json").write_text(json.dumps([{"instruction": "q", "output": "a", "generator": "g"}]))
    (here / "harmbench-prompt.txt").write_text("{prompt} {response}")
    # in the tiny world's language, which its rule judge reads
    intents = [seed_of(ParsedPrompt(intent)) for intent in INTENTS]
    both = [one for category in Category for one in [seed for seed in intents if seed.category is category][:2]]
    seeds = [{"prompt": seed.text, "category": seed.category.value, "product": "x"} for seed in both]
    lines(here / "our_seeds.jsonl", seeds)
    for name in ("seeds", "heldout", "data/train", "data/valid_vanilla", "data/valid_adversarial"):
        lines(here / f"{name}.jsonl", seeds)
    tree = yaml.safe_load(suite_of_the_page().replace(SERVER, server))
    del tree["utility"]
    (here / "my.yaml").write_text(yaml.safe_dump(tree))
    return here


def test_the_pages_suite_is_well_formed(place):
    (place / "whole.yaml").write_text(suite_of_the_page())
    assert [one.tasks for one in load_suite(place / "whole.yaml").utility] == [["mmlu"], ["ifeval"]]


def test_the_pages_have_lines():
    assert {page for page, _ in LINES} == {"evaluation.md", "redteam.md"}
    assert len(LINES) >= 6


@pytest.mark.parametrize("page", ["evaluation.md", "redteam.md"])
def test_the_pages_lines_run(place, server, monkeypatch, page):
    """In the page's order, since one line scores again what another stored."""
    monkeypatch.chdir(place)
    for line in (line for name, line in LINES if name == page):
        for name, value in (("$RUN", "runs/RUN"), ("DIR", "made/matrix"), (SERVER, server)):
            line = line.replace(name, value)
        words = shlex.split(line)[1:]
        if "--rescore" not in words:
            words += ["--limit", "2"]
        assert cli.main([*words, "--quiet"]) == 0, line


def measured_runs(place, monkeypatch):
    """RUN and ANOTHER: on vLLM, and long enough to tell a plan what a step takes."""
    pytest.importorskip("vllm")
    monkeypatch.setattr("advgame.run.loop.exact", lambda session: {})
    few = ["--data.harmful", "4", "--data.benign", "4", "--data.validation_limit", "4", "--run.validate_every", "0"]
    vllm = ["--rollout.engine", "vllm", "--rollout.vllm.cache_gib", "0.25", "--rollout.vllm.max_model_len", "256"]
    words = ["train", "configs/tiny.yaml", "--quiet", "--run.name", "measured", "--run.steps", "5"]
    assert cli.main([*words, *few, *vllm]) == 0
    for name in ("RUN", "ANOTHER"):
        (place / name).symlink_to(place / "runs/measured")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("line", OTHERS)
def test_other_lines_run(place, monkeypatch, line):
    monkeypatch.chdir(place)
    if "--like" in line:
        measured_runs(place, monkeypatch)
    words = [word for one in shlex.split(line)[1:] for word in ([*map(str, Path().glob(one))] if "*" in one else [one])]
    known = " ".join(words)
    words += next((extra.split() for start, extra in SMALL.items() if known.startswith(start)), [])
    assert cli.main(words) in ((0, 1) if words[0] in JUDGING else (0,))
