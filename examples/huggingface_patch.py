"""A Hugging Face causal language model with a fused preference loss: one line, `patch_model(model)`.

    python examples/huggingface_patch.py [MODEL]

MODEL is a name or a folder that transformers knows; without one a tiny random Qwen2 is made, offline. The fused
loss is printed beside the same loss from the model's own logits.
"""

from __future__ import annotations

import sys

import torch
from advgame_kernels.patch import patch_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

PROMPT = 3  # tokens


def make_model(name: str | None) -> PreTrainedModel:
    """The model asked for, or a tiny one."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def loss_from_logits(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    """DPO with β = 0.1 from whole logits."""
    log_probs = torch.log_softmax(model(input_ids=input_ids).logits[:, :-1].float(), dim=-1)
    targets = labels[:, 1:]
    tokens = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    ratio = (tokens.masked_fill(targets < 0, 0.0).sum(dim=1) - ref_logps).view(-1, 2)
    return -torch.nn.functional.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])).mean()


def main(name: str | None = None) -> tuple[float, float]:
    """Print and return the fused loss and the one from logits."""
    model = patch_model(make_model(name))
    # Rows 2p and 2p + 1 are the chosen and the rejected sequence of pair p; prompts are labelled −100.
    input_ids = torch.randint(0, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, :PROMPT] = -100
    with torch.no_grad():
        ref_logps = model(input_ids=input_ids, labels=labels, fused="logprobs").logps.sum(dim=1) - torch.arange(4.0)
    out = model(input_ids=input_ids, labels=labels, fused="preference", ref_logps=ref_logps, kind="sigmoid", beta=0.1)
    out.loss.backward()
    whole = loss_from_logits(model, input_ids, labels, ref_logps)
    print(f"fused {out.loss.item():.6f}   from logits {whole.item():.6f}   accuracy {out.accuracies.mean():.2f}")
    return out.loss.item(), whole.item()


if __name__ == "__main__":
    main(*sys.argv[1:])
