"""TRL's DPOTrainer with the loss and its gradient in three GEMMs: one line, `patch_dpo_trainer(trainer)`.

    python examples/trl_dpo.py

trains a tiny random model for a few steps on a toy preference set, offline, and prints both trainers' losses side
by side. Written for TRL 1.16; LoRA and the LM head under FSDP are left to TRL's own trainer.
"""

from __future__ import annotations

import tempfile

import torch
from advgame_kernels.trl_dpo import patch_dpo_trainer
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer


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


def make_trainer(folder: str) -> DPOTrainer:
    """TRL's own trainer on a tiny model and the toy preferences."""
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
    return DPOTrainer(model=model, ref_model=reference, args=arguments, train_dataset=data, processing_class=tokenizer)


def losses(folder: str, three_gemms: bool) -> list[float]:
    """Train six steps and return the logged losses."""
    trainer = make_trainer(folder)
    if three_gemms:
        patch_dpo_trainer(trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Run TRL's trainer and ours on the same data."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = losses(folder, False), losses(folder, True)
    print("step   TRL        three GEMMs")
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True), 1):
        print(f"{step:4}   {a:.6f}   {b:.6f}")


if __name__ == "__main__":
    main()
