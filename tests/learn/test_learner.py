"""The learner against formulas in float64: objectives, normalisers, references, the moving average."""

import math
from dataclasses import replace

import models
import pytest
import torch

from advgame.game.pairs import Group, Member, Pair
from advgame.game.tree import Sample
from advgame.learn.learner import Learner
from advgame.learn.objective import coefficient_change, member_weights
from advgame.learn.settings import LearnSettings

PROMPT = (3, 9, 10, 11, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("player"))


def learner(folder, **settings):
    return Learner(folder, models.tokenizer(), LearnSettings(**({"lr": 1e-3} | settings)), field="defender.model")


def token_logps(model, prompt, tokens):
    """Token log-probs in float64 from a plain forward."""
    ids = torch.tensor([[*prompt, *tokens]])
    logps = model.double()(input_ids=ids).logits[0].log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logps[rows, torch.tensor(tokens)]


def sampled(tokens, model=None, prompt=PROMPT):
    with torch.no_grad():
        logps = token_logps(model or models.model(), prompt, tokens)
    return Sample(prompt, tuple(tokens), tuple(logps.tolist()), "stop", 0)


def pairs(count=3):
    made = []
    for i in range(count):
        chosen, rejected = sampled([12 + i, 13, 2]), sampled([14, 15 + i, 16, 17, 2])
        made.append(Pair(chosen, rejected, 9.0, 1.0, f"s{i}"))
    return made


def gradients_of(made, run):
    """Gradients that `run` leaves behind, caught before clipping and the optimiser's step."""
    made._apply = lambda progress: 0.0
    run(made)
    return {n: p.grad.double() for n, p in made.parameters.items() if p.grad is not None}


def expected_gradients(loss_of):
    model = models.model().double()
    loss_of(model).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance * scale, rtol=1e-4, msg=name)


@pytest.mark.parametrize("reference", ["rollout", "recompute"])
@pytest.mark.parametrize("objective", ["dpo", "ipo"])
@pytest.mark.parametrize("micro_tokens", [1, 20, 10_000])
def test_pair_gradients_are_the_formulas(folder, objective, reference, micro_tokens):
    made = pairs()
    # a reference off the policy, so that the coefficients differ between pairs
    made = [
        replace(p, chosen=replace(p.chosen, logprobs=tuple(lp - 0.3 * i for lp in p.chosen.logprobs)))
        for i, p in enumerate(made)
    ]
    if reference == "recompute":
        made = pairs()

    def loss_of(model):
        total = 0.0
        for p in made:
            h = sum(
                sign * (token_logps(model, PROMPT, s.token_ids).sum() - sum(s.logprobs))
                for sign, s in ((1, p.chosen), (-1, p.rejected))
            )
            total += -torch.nn.functional.logsigmoid(0.1 * h) if objective == "dpo" else (h - 5.0) ** 2
        return total / len(made)

    settings = {"objective": objective, "reference": reference, "micro_tokens": micro_tokens}
    ours = gradients_of(learner(folder, **settings), lambda m: m.update_pairs(made, 0.0))
    assert_same(ours, expected_gradients(loss_of))


def groups():
    a, b, c = sampled([12, 2]), sampled([13, 14, 15, 2]), sampled([16, 17, 2])
    return [
        Group((Member(a, 4.0, 1.5, 1.0), Member(b, -1.0, -3.5, 0.0))),
        Group((Member(c, 2.0, -0.5, 1.0), Member(b, 6.0, 2.5, 1.0))),
    ]


@pytest.mark.parametrize("aggregate", ["group", "token"])
@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_grpo_gradients_are_the_formula(folder, aggregate, micro_tokens):
    """At the initial weights the KL term and its gradient vanish: what is left is -sum of weight x advantage."""
    made = groups()
    weights = member_weights(made, aggregate)

    def loss_of(model):
        total = 0.0
        for group, row in zip(made, weights, strict=True):
            for member, weight in zip(group.members, row, strict=True):
                total -= weight * member.advantage * token_logps(model, PROMPT, member.sample.token_ids).sum()
        return total

    ours = gradients_of(
        learner(folder, objective="grpo", aggregate=aggregate, micro_tokens=micro_tokens),
        lambda m: m.update_groups(made, 0.0),
    )
    assert_same(ours, expected_gradients(loss_of))


def test_member_weights():
    assert member_weights(groups(), "group") == [[0.25, 0.0], [0.25, 0.25]]
    assert member_weights(groups(), "token") == [[1 / 9, 0.0], [1 / 9, 1 / 9]]


def test_reinforce_normalises_over_the_batch(folder):
    """With equal rewards nothing is learned; with different ones the better completion gains probability."""
    made = learner(folder, objective="reinforce", lr=1e-2)
    a, b = sampled([12, 2]), sampled([13, 14, 2])
    made.update_groups([Group((Member(a, 1.0, 0, 1.0), Member(b, -1.0, 0, 1.0)))], 0.0)
    model = models.model().double()
    model.load_state_dict({k: v.double() for k, v in made.model.state_dict().items()})
    with torch.no_grad():
        assert token_logps(model, PROMPT, a.token_ids).sum() > sum(a.logprobs)
        assert token_logps(model, PROMPT, b.token_ids).sum() < sum(b.logprobs)


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_training_separates_the_pairs(folder, objective):
    made, data = learner(folder, objective=objective), pairs()
    first = made.update_pairs(data, 0.0)
    for _ in range(20):
        last = made.update_pairs(data, 0.0)
    assert last["loss"] < first["loss"]
    assert last["accuracy"] == 1.0
    assert made.updates == 21


@pytest.mark.parametrize("call", ["update_pairs", "update_groups"])
def test_nothing_to_learn_from_changes_nothing(folder, call):
    made = learner(folder)
    before = {n: p.detach().clone() for n, p in made.parameters.items()}
    assert getattr(made, call)([], 0.0) in ({"pairs": 0.0}, {"members": 0.0})
    assert made.updates == 0
    assert all(torch.equal(before[n], p) for n, p in made.parameters.items())


def test_the_average_moves_and_is_served_in_one_pass(folder):
    made = learner(folder, ema_decay=0.9)
    served = {n: torch.full_like(p, torch.nan, dtype=torch.bfloat16) for n, p in made.parameters.items()}
    shadow = {n: s.double() for n, s in made.shadow.items()}
    made.update_pairs(pairs(), 0.0)
    made.publish_into(served)
    for name, parameter in made.parameters.items():
        expected = 0.9 * shadow[name] + 0.1 * parameter.detach().double()
        torch.testing.assert_close(made.shadow[name].double(), expected, atol=1e-7, rtol=1e-6)
        assert torch.equal(served[name], made.shadow[name].bfloat16())


def test_auto_keeps_the_samplers_logprobs_when_they_agree(folder):
    made = learner(folder, reference="auto", lr=1e-9)
    for _ in range(4):
        metrics = made.update_pairs(pairs(), 0.0)
        assert metrics["reference_gap"] < 1e-4
    assert made.reference.decided == "rollout"
    assert "reference_gap" not in made.update_pairs(pairs(), 0.0)


def test_auto_recomputes_when_they_do_not(folder):
    off = [replace(p, chosen=replace(p.chosen, logprobs=tuple(lp - 0.5 for lp in p.chosen.logprobs))) for p in pairs()]
    made = learner(folder, reference="auto", lr=1e-9)
    for _ in range(4):
        metrics = made.update_pairs(off, 0.0)
    assert metrics["reference_gap"] > 0.5
    assert made.reference.decided == "recompute"


def test_coefficient_change():
    settings = LearnSettings(objective="dpo", beta=0.1)
    recomputed = torch.tensor([0.0, 0.0])
    assert coefficient_change(recomputed, recomputed, settings) == 0.0
    change = coefficient_change(torch.tensor([1.0, 1.0]), recomputed, settings)
    assert float(change) == pytest.approx(1 - 2 / (1 + math.exp(0.1)), rel=1e-4)


def test_learning_rate_is_a_cosine_to_its_floor(folder):
    made = learner(folder, lr=1e-3, lr_final=0.2)
    assert made.lr_at(0.0) == pytest.approx(1e-3)
    assert made.lr_at(0.5) == pytest.approx(0.6e-3)
    assert made.lr_at(1.0) == pytest.approx(0.2e-3)


def test_bf16_compute_keeps_fp32_master_weights(folder):
    made = learner(folder, dtype="bfloat16", reference="recompute")
    metrics = made.update_pairs(pairs(), 0.0)
    assert math.isfinite(metrics["loss"])
    assert all(p.dtype == torch.float32 for p in made.parameters.values())


def test_optional_terms(folder):
    base = learner(folder).update_pairs(pairs(), 0.0)
    nll = learner(folder, nll_weight=1.0).update_pairs(pairs(), 0.0)
    mean_nll = sum(-sum(p.chosen.logprobs) / len(p.chosen.logprobs) for p in pairs()) / 3
    assert nll["loss"] - base["loss"] == pytest.approx(mean_nll, rel=1e-4)
    entropy = learner(folder, entropy_weight=0.5).update_pairs(pairs(), 0.0)
    assert entropy["loss"] - base["loss"] == pytest.approx(-0.5 * base["entropy"], rel=1e-4)
    mean = learner(folder, length_normalised=True).update_pairs(pairs(), 0.0)
    assert mean["margin"] == pytest.approx(0.0, abs=1e-5)
