"""Adapters: they alone learn, average and are saved; what is served and loaded elsewhere is the merged model."""

from dataclasses import replace

import models
import pytest
import torch
from test_learner import groups, learner, pairs
from transformers import AutoModelForCausalLM

from advgame.errors import InputError
from advgame.run.checkpoint import load_into, save_checkpoint
from advgame.run.folder import RunFolder
from advgame.run.train_state import PlayerState, TrainState

peft = pytest.importorskip("peft")
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("player"))


def served_of(made, dtype=torch.float32):
    return {n: torch.full(p.shape, torch.nan, dtype=dtype) for n, p in made.published.items()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 9, 10, 11]])).logits


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("source", ["average", "live"])
def test_the_served_model_is_the_merged_one(tmp_path, family, source):
    made = learner(models.folder(tmp_path, family), lora=LORA, lr=1e-2, reference="rollout")
    if source == "live":
        made.shadow = {}
    plain = models.model(family)
    assert made.published.keys() == dict(plain.named_parameters()).keys()
    served = served_of(made)
    made.serve_into(served)
    for name, parameter in plain.named_parameters():
        assert torch.equal(served[name], parameter), name  # B = 0: nothing is changed yet
    for _ in range(3):
        made.update_pairs(pairs(), 0.0)
        made.publish_into(served)
    plain.load_state_dict(served, strict=False)
    with torch.no_grad():
        for name, average in made.shadow.items():
            made.parameters[name].copy_(average)
    # the learner's own model, with the adapters that sample in place, does what the plain one does with merged weights
    made.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(plain), logits(made.model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(plain), logits(models.model(family)), atol=1e-3)


def test_only_adapters_learn(folder):
    made = learner(folder, lora=LORA, lr=1e-2)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.update_pairs(pairs(), 0.0)
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved
    assert moved <= set(made.parameters)
    assert all(".lora_" in name for name in made.parameters)
    assert len(made.optimizer.param_groups[0]["params"]) == len(made.parameters) == len(made.shadow)


def test_gradients_are_those_of_the_merged_weight(folder):
    """dB = (alpha / rank) dW A^T, with dW the full model's gradient at the same weights (B = 0)."""
    full, made = learner(folder), learner(folder, lora=LORA)
    data = [replace(p, chosen=replace(p.chosen, logprobs=tuple(x - 0.3 for x in p.chosen.logprobs))) for p in pairs()]
    for one in (full, made):
        one._apply = lambda progress: 0.0
        one.update_pairs(data, 0.0)
    for name, parameter in made.parameters.items():
        layer, _, kind = name.partition(".lora_")
        if kind.startswith("B"):
            a = made.parameters[f"{layer}.lora_A.default.weight"]
            expected = 2.0 * full.parameters[f"{layer}.weight"].grad @ a.T
            torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4, msg=name)


def test_the_initial_model_is_the_base(folder):
    """GRPO at step 0 has no divergence from it, and has after a step."""
    made = learner(folder, lora=LORA, objective="grpo", lr=1e-2)
    assert made.update_groups(groups(), 0.0)["kl"] == pytest.approx(0.0, abs=1e-6)
    assert made.update_groups(groups(), 0.0)["kl"] > 1e-5


@pytest.mark.parametrize(
    ("targets", "says"), [(["no_proj"], "no_proj"), (["lm_head"], "lm_head is no linear"), (["embed_tokens"], "embed")]
)
def test_targets_that_cannot_be_adapted(tmp_path, targets, says):
    with pytest.raises(InputError, match=rf"learn\.lora\.targets.*{says}"):
        learner(models.folder(tmp_path, tied=False), lora=LORA | {"targets": targets})


def state_of(made):
    return PlayerState(made.model, made.tokenizer, made.shadow, made.optimizer, made.updates, lora=made.settings.lora)


def test_a_checkpoint_resumes_exactly_and_loads_elsewhere(folder, tmp_path):
    made = learner(folder, lora=LORA, lr=1e-2)
    served = served_of(made)
    for _ in range(2):
        made.update_pairs(pairs(), 0.0)
        made.publish_into(served)
    with RunFolder.create(tmp_path, "run", "a: 1\n", purpose="a test") as run:
        path = save_checkpoint(run, TrainState(2, {"defender": state_of(made)}, {}), 3)
    average = AutoModelForCausalLM.from_pretrained(path / "defender-ema")
    for name, parameter in average.named_parameters():
        assert torch.equal(parameter, served[name]), name
    adapted = peft.PeftModel.from_pretrained(models.model(), path / "defender-ema-adapter")
    torch.testing.assert_close(logits(adapted), logits(average), atol=1e-5, rtol=1e-5)

    again = learner(folder, lora=LORA, lr=1e-2)
    load_into(path, {"defender": state_of(again)})
    for one in (made, again):
        one.update_pairs(pairs(), 0.0)
        one.publish_into(served_of(one))
    for name, parameter in made.parameters.items():
        assert torch.equal(parameter, again.parameters[name]), name
        assert torch.equal(made.shadow[name], again.shadow[name]), name
    with pytest.raises(InputError, match=r"in the checkpoint"):
        load_into(path, {"defender": state_of(learner(folder))})
