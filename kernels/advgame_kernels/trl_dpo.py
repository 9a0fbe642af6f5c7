"""One line that gives TRL's DPOTrainer the loss and its gradient in three GEMMs: `patch_dpo_trainer(trainer)`.

Written for TRL 1.16, whose `_compute_loss` it takes the place of; TRL itself is never imported. What would change the
loss and is not served here is refused by name, never left out in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advgame_kernels._checks import one_of, refuse
from advgame_kernels.patch import IGNORED, patch_model

# TRL's names of its losses, as settings of `linear_preference_loss`. TRL's `sft` averages over the batch's tokens and
# its `aot` kinds sort the whole batch: neither is a loss of pairs.
SAME = ("sigmoid", "hinge", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
LOSSES: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in SAME} | {
    "ipo": {"kind": "ipo_mean"},
    "robust": {"kind": "sigmoid", "robust": True},
    "sigmoid_norm": {"kind": "sigmoid", "average": True},
}
# Attributes of the trainer that change its loss, and the only value with which they change nothing.
PLAIN = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False, "aux_loss_enabled": False}


def loss_settings(trainer: Any) -> dict[str, Any]:
    """A trainer's loss as settings of `linear_preference_loss`; ValueError naming what is not served."""
    if len(trainer.loss_types) != 1 or list(trainer.loss_weights) != [1.0]:
        refuse("loss_type", "one loss of weight 1", f"{trainer.loss_types}, weights {trainer.loss_weights}")
    (name,) = trainer.loss_types
    one_of("loss_type", name, tuple(LOSSES))
    for setting, plain in PLAIN.items():
        if getattr(trainer, setting, plain) != plain:
            refuse(setting, f"{plain!r}, the only one that the fused loss serves", getattr(trainer, setting))
    found = {"beta": trainer.beta} | LOSSES[name]
    if name in ("robust", "exo_pair"):
        found["label_smoothing"] = trainer.label_smoothing
    if name == "discopop":
        found["discopop_tau"] = trainer.args.discopop_tau
    return found


def _side_by_side(x: Tensor) -> Tensor:
    """TRL stacks all chosen on all rejected; here the two of a pair are neighbours."""
    return x.view(2, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1)


def patch_dpo_trainer(trainer: Any) -> Any:
    """Make `trainer` (a trl.DPOTrainer, before `train()`) compute its loss without logits, and return it.

    Its models are patched by `patch_model`, and stay what they were for every other call. Rewards, their margins and
    accuracies, and the entropy are logged under TRL's names, in the units of the loss (means for `ipo` and
    `sigmoid_norm`); TRL's statistics of logits and of top-1 tokens need logits or another pass, and are not.

    Raises ValueError naming the setting for losses and options that it does not serve, for PEFT models without a
    reference model, for batches with more than tokens and masks, and for trainers that are not TRL 1.16's.
    """
    if not hasattr(trainer, "_compute_loss") or not hasattr(trainer, "loss_types"):
        refuse("trainer", "a trl.DPOTrainer of TRL 1.16", type(trainer).__name__)
    loss_settings(trainer)
    if trainer.ref_model is None and not trainer.precompute_ref_logps:
        refuse("trainer", "a reference model, or precompute_ref_log_probs=True", "neither")
    patch_model(trainer.model)
    if trainer.ref_model is not None:
        patch_model(trainer.ref_model)
    known = {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}

    def compute_loss(model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        if set(inputs) - known:
            refuse("inputs", "a batch of tokens and masks alone", sorted(set(inputs) - known))
        settings = loss_settings(trainer)
        batch = {k: _side_by_side(inputs[k]) for k in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(_side_by_side(inputs["completion_mask"]) == 0, IGNORED)
        if trainer.precompute_ref_logps:
            ref = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], dim=1).flatten()
        else:
            with torch.no_grad():
                ref = trainer.ref_model(**batch, labels=labels, fused="logprobs").logps.sum(dim=1)
        out = model(**batch, labels=labels, fused="preference", ref_logps=ref, **settings)
        shown = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/margins": trainer.beta * out.margins,
            "rewards/accuracies": out.accuracies,
            "entropy": out.entropy,
        }
        means = torch.stack([trainer.accelerator.gather(x).mean() for x in shown.values()]).tolist()
        mode = "train" if trainer.model.training else "eval"
        for name, value in zip(shown, means, strict=True):
            trainer._metrics[mode][name].append(value)
        return (out.loss, out) if return_outputs else out.loss

    trainer._compute_loss = compute_loss
    return trainer
