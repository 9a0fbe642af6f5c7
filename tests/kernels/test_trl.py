"""The losses are TRL's, kind for kind: its own trainers' code on the same batch gives the same loss and gradients."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels.trl_dpo import LOSSES, patch_dpo_trainer
from test_examples import load

pytest.importorskip("trl", reason="TRL is not installed")
HERE = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = load("trl_dpo").make_trainer(str(tmp_path_factory.mktemp("trl")))
    made.label_smoothing = 0.1
    with torch.no_grad():  # away from the reference, or many kinds would agree by symmetry
        for p in made.model.parameters():
            p += 0.2 * torch.randn_like(p)
    return patch_dpo_trainer(made)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_kinds_of_the_dpo_trainer(trainer, name):
    trainer.loss_types = [name]
    batch = next(iter(trainer.get_train_dataloader()))
    params = list(trainer.model.parameters())
    found = []
    for compute in (type(trainer)._compute_loss.__get__(trainer), trainer._compute_loss):
        loss = compute(trainer.model, dict(batch), False)
        shown = {k: trainer._metrics["train"][k][-1] for k in ("rewards/chosen", "rewards/accuracies", "entropy")}
        found.append((loss, torch.autograd.grad(loss, params), shown))
    (theirs, their_grads, their_shown), (ours, our_grads, our_shown) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    if name not in ("ipo", "sigmoid_norm"):  # whose rewards are means here, sums there
        assert our_shown["rewards/chosen"] == pytest.approx(their_shown["rewards/chosen"], abs=1e-4)
        assert our_shown["rewards/accuracies"] == their_shown["rewards/accuracies"]


@pytest.mark.slow
def test_sft_of_one_pair(trainer):
    """TRL's mean is over the batch's chosen tokens, ours over each pair's: of one pair they are the same."""
    trainer.loss_types = ["sft"]
    whole = next(iter(trainer.get_train_dataloader()))
    pair = [0, len(whole["input_ids"]) // 2]  # TRL stacks all chosen on all rejected
    batch = {k: whole[k][pair] for k in ("input_ids", "attention_mask", "completion_mask")}
    params = list(trainer.model.parameters())
    theirs = type(trainer)._compute_loss(trainer, trainer.model, dict(batch), False)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    tokens = {k: batch[k] for k in ("input_ids", "attention_mask")}
    ours = trainer.model(**tokens, labels=labels, fused="preference", kind="sft").loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_types": ["sigmoid", "ipo"], "loss_weights": [1.0, 1.0]}, "loss_type"),
        ({"loss_types": ["sft"]}, "loss_type: expected one of sigmoid"),
        ({"loss_types": ["aot"]}, "loss_type"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type"),
        ({"use_weighting": True}, "use_weighting"),
        ({"aux_loss_enabled": True}, "aux_loss_enabled"),
        ({"ref_model": None}, "reference model"),
    ],
)
def test_options_that_are_not_served_are_refused(trainer, monkeypatch, change, message):
    monkeypatch.setattr(trainer, "loss_types", ["sigmoid"])
    for name, value in change.items():
        monkeypatch.setattr(trainer, name, value)
    with pytest.raises(ValueError, match=message):
        patch_dpo_trainer(trainer)


def test_not_a_trainer():
    with pytest.raises(ValueError, match=r"trainer: expected a trl\.DPOTrainer"):
        patch_dpo_trainer(object())


def sequences() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (12,), generator=g)
    return -torch.rand(12, generator=g) * lengths - 0.05, lengths


@pytest.mark.parametrize(("kind", "theirs", "mean"), [("simpo", "simpo", True), ("cpo", "sigmoid", False)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_and_cpo_of_the_experimental_trainer(kind, theirs, mean, smoothing):
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    logps, lengths = sequences()
    like = SimpleNamespace(
        alpha=0.0, beta=0.3, loss_type=theirs, simpo_gamma=0.7, label_smoothing=smoothing, accelerator=HERE
    )
    x = logps / lengths if mean else logps
    want, chosen, _ = cpo.cpo_loss(like, x[0::2], x[1::2])
    out = ak.preference_loss(
        logps, None, kind=kind, beta=0.3, lengths=lengths, label_smoothing=smoothing, simpo_gamma=0.7
    )
    torch.testing.assert_close(out.losses, want)
    torch.testing.assert_close(out.chosen_rewards, chosen)


def test_orpo_of_the_experimental_trainer():
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    logps, lengths = sequences()
    x = logps / lengths
    like = SimpleNamespace(beta=0.3, accelerator=HERE)
    ratio, chosen, *_ = orpo.odds_ratio_loss(like, x[0::2], x[1::2])
    out = ak.preference_loss(logps, None, kind="orpo", beta=0.3, lengths=lengths, nll_weight=1.0)
    torch.testing.assert_close(out.losses, -ratio, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.chosen_rewards, chosen)
    torch.testing.assert_close(out.loss, (-ratio - x[0::2]).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["on policy", "clipped", "clipped, from another sampler"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_grpo_of_the_trainer(loss_type, beta, case):
    """GRPOTrainer's own loss on token log-probs that it is handed; `weights` are its averages."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    g = torch.Generator().manual_seed(0)
    shape, cap, clip = (3, 5), 1.1, (0.2, 0.28)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    logps = (-3 * torch.rand(shape, generator=g)).requires_grad_()
    ref, old, sampler = (logps.detach() + 0.4 * torch.randn(shape, generator=g) for _ in range(3))
    advantages = torch.randn(3, generator=g)
    on_policy, other = case == "on policy", "sampler" in case
    like = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros(shape), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta,
        importance_sampling_level="token", loss_type=loss_type, epsilon_low=clip[0], epsilon_high=clip[1],
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None), use_vllm=other,
        vllm_importance_sampling_correction=other, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(
            gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
        ),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ones = torch.ones(shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": ones, "completion_mask": mask,
        "advantages": advantages, "ref_per_token_logps": ref, "old_per_token_logps": None if on_policy else old,
        "importance_sampling_ratio": torch.exp(old - sampler).clamp(max=cap),
    }  # fmt: skip
    theirs = grpo._compute_loss(like, None, inputs)
    weights = mask / (mask.sum(1, keepdim=True) * 3) if loss_type == "grpo" else mask / mask.sum()
    tokens = [x.flatten() for x in (logps, advantages[:, None].expand(shape), weights)]
    ours = ak.policy_loss(
        *tokens, ref_logps=ref.flatten() if beta else None, kl_beta=beta, clip=clip,
        old_logps=None if on_policy else old.flatten(), sampler_logps=sampler.flatten() if other else None,
        truncation=cap if other else None,
    ).loss  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logps), torch.autograd.grad(theirs, logps))
