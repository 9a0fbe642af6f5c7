"""`bench step`: every way from the published step to ours finds the same gradients, in parts too; figures by hand."""

import json

import pytest
import torch

from bench import step
from bench.step_case import Case, layers_that_fit, pairs_of, useful_flops
from bench.step_ways import PUBLISHED_PARTS, WAYS, Contender

CASE = Case("cpu", "tiny", 2, 3, "float32", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("step")
    step.sampled(CASE, made)
    assert step.contend("published", ["check"], CASE, made, None)["gap"] == 0
    return made


@pytest.fixture(autouse=True)
def ordinary_malloc(monkeypatch):
    monkeypatch.setattr(step, "keep_freed_memory", lambda: None)  # it would last for all tests of this process


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_find_the_same_gradients_and_step(folder, name):
    result = step.contend(name, ["check", "time"], CASE, folder, None)
    assert result["gap"] < 1e-4
    assert result["whole_gap"] < 1e-5
    assert result["at_once"] == (2 if name == PUBLISHED_PARTS else 3)
    assert 0 <= result["peak"] < result["whole"]
    assert len(result["seconds"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["published", "fused loss", "ours"])
def test_what_does_not_fit_is_halved(folder, monkeypatch, name):
    gradients, tried = Contender.gradients, []

    def scarce(self, pairs):
        tried.append(self.at_once)
        found = gradients(self, pairs)  # half a batch's gradients may be there when memory ends
        if self.at_once > 1:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(Contender, "gradients", scarce)
    result = step.contend(name, ["check"], CASE, folder, None)
    assert tried == [3, 2, 1]
    assert (result["at_once"], result["gap"] < 1e-4) == (1, True)
    monkeypatch.setattr(Contender, "gradients", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert step.contend(name, ["check"], CASE, folder, None) == {"too_large": True}


def test_other_gradients_are_told(folder):
    contender = Contender("ours", step.model_of(CASE), CASE.dtype)
    gradients = dict(contender.gradients(step.played(CASE, folder)))
    name = "lm_head.weight"
    gradients[name] = gradients[name] * 1.01
    found = step.compare(gradients, folder / "gradients.safetensors")
    assert found["gap"] == pytest.approx(0.01, rel=0.01)
    assert 0 < found["whole_gap"] < 0.01


def test_lengths_are_those_that_are_stated():
    case = Case("cuda", "tiny", 2, 2000, "bfloat16", 1)
    pairs = pairs_of(case)
    assert pairs == pairs_of(case)
    prompts = torch.tensor([float(len(p.chosen.prompt_ids)) for p in pairs])
    assert (float(prompts.mean()), float(prompts.std())) == (pytest.approx(300, abs=6), pytest.approx(80, abs=5))
    lengths = torch.tensor([float(len(s.token_ids)) for p in pairs for s in (p.chosen, p.rejected)])
    assert float(lengths.median()) == pytest.approx(300, abs=10)
    assert float(lengths.log().std()) == pytest.approx(0.6, abs=0.03)
    assert float(lengths.max()) <= 2048


def test_useful_work_by_hand():
    (pair,) = pairs = pairs_of(Case("cpu", "tiny", 2, 1, "float32", 1))
    prompt, a, b = len(pair.chosen.prompt_ids), len(pair.chosen.token_ids), len(pair.rejected.token_ids)
    tokens, heads = prompt + a - 1 + b - 1, 64 * 64 + 2 * 64 * 32 + 64 * 64
    attended = sum(range(1, prompt + 1)) + sum(prompt + i for n in (a, b) for i in range(1, n))
    layer = 2 * tokens * (heads + 3 * 64 * 128) + 2 * 2 * attended * 64
    assert useful_flops(Case("cpu", "tiny", 2, 1, "float32", 1), pairs) == 3 * (2 * layer + 2 * (a + b) * 64 * 512)


def test_layers_leave_room():
    assert [layers_that_fit("7b", n * 2**30) for n in (1, 80, 139, 10_000)] == [1, 2, 8, 28]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["inside", "processes"])
def test_the_command(tmp_path, capsys, how):
    """Inside one process is how a GPU is measured, in processes a CPU."""
    target = tmp_path / "step.json"
    ways = ["published", "response rows only", "ours"] if how == "inside" else ["published", "ours"]
    words = ["--size", "tiny", "--ways", *ways, "--rounds", "2", "--pairs", "2", "--out", str(target)]
    assert step.main([*words, *(["--inside"] if how == "inside" else [])]) == 0
    result = json.loads(target.read_text())
    assert result["equal_gradients"]
    assert {"times_as_fast", "share_of_peak", "gemm_flops_per_second", "lengths", "seed"} <= result.keys()
    assert list(result["ways"]) == ways
    assert {"utilisation", "tokens_per_second", "peak_bytes"} <= result["ways"]["ours"].keys()
    assert "times as fast as published" in capsys.readouterr().out
