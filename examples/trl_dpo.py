"""TRL's DPOTrainer with the loss and its gradient in three GEMMs: replace the trainer's class, keep everything else.

    python examples/trl_dpo.py

trains a tiny random model for a few steps on a toy preference set, offline, and prints both trainers' losses side
by side. Written for TRL 1.16, whose `_compute_loss` it overrides; LoRA and the LM head under FSDP are left to
TRL's own trainer.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from advgame_kernels.patch import patch_model
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

# TRL's loss names in ours; `ipo` is TRL's mean form.
KINDS = {"robust": "sigmoid", "ipo": "ipo_mean"}


class ThreeGemmDPOTrainer(DPOTrainer):
    """DPOTrainer whose loss never makes the logits of the response twice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.loss_types) != 1:
            raise ValueError("loss_type: expected one loss")
        patch_model(self.model)
        if self.ref_model is not None:
            patch_model(self.ref_model)

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        # TRL stacks all chosen on all rejected; the library wants chosen and rejected of a pair side by side.
        pairs = inputs["input_ids"].shape[0] // 2
        order = torch.arange(2 * pairs).view(2, pairs).t().flatten().to(inputs["input_ids"].device)
        batch = {k: inputs[k][order] for k in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(inputs["completion_mask"][order] == 0, -100)
        if "ref_chosen_logps" in inputs:
            ref = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], dim=1).flatten()
        else:
            with torch.no_grad():
                ref = self.ref_model(**batch, labels=labels, fused="logprobs").logps.sum(dim=1)
        kind = self.loss_types[0]
        out = model(
            **batch, labels=labels, fused="preference", ref_logps=ref, kind=KINDS.get(kind, kind), beta=self.beta,
            robust=kind == "robust",
            label_smoothing=self.label_smoothing if kind in ("robust", "exo_pair") else 0.0,
        )  # fmt: skip
        mode = "train" if self.model.training else "eval"
        for name, value in (
            ("rewards/chosen", out.chosen_rewards),
            ("rewards/rejected", out.rejected_rewards),
            ("rewards/margins", self.beta * out.margins),
            ("rewards/accuracies", out.accuracies),
            ("entropy", out.entropy),
        ):
            self._metrics[mode][name].append(self.accelerator.gather(value).mean().item())
        return (out.loss, out) if return_outputs else out.loss


def toy() -> tuple[PreTrainedTokenizerFast, Dataset]:
    """Eleven words and a taste for the polite ones."""
    words = ["<pad>", "<eos>", "say", "it", "again", "no", "never", "please", "gladly", "sure", "why"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    rows = [
        {"prompt": "say it", "chosen": " please gladly", "rejected": " no never why"},
        {"prompt": "say it again", "chosen": " sure gladly please", "rejected": " never"},
    ]
    return tokenizer, Dataset.from_list(rows * 8)


def losses(trainer_class: type[DPOTrainer], folder: str) -> list[float]:
    """Train six steps and return the logged losses."""
    torch.manual_seed(0)
    tokenizer, data = toy()
    config = Qwen2Config(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    arguments = DPOConfig(
        output_dir=folder, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no", seed=0,
    )  # fmt: skip
    model, reference = Qwen2ForCausalLM(config), Qwen2ForCausalLM(config)
    reference.load_state_dict(model.state_dict())
    trainer = trainer_class(
        model=model, ref_model=reference, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Run TRL's trainer and ours on the same data."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = losses(DPOTrainer, folder), losses(ThreeGemmDPOTrainer, folder)
    print("step   TRL        three GEMMs")
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True), 1):
        print(f"{step:4}   {a:.6f}   {b:.6f}")


if __name__ == "__main__":
    main()
