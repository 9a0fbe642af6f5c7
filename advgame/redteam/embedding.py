"""Texts as vectors: the mean of a model's last hidden states, for how far apart attacks lie in meaning."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from advgame.evals.named import ModelSpec
from advgame.learn.load import load_model
from advgame.rollout.chat import load_tokenizer

BATCH = 16


@torch.inference_mode()
def mean_hidden_states(spec: ModelSpec, texts: Sequence[str]) -> list[list[float]]:
    """(texts, hidden) in float32: the mean over a text's tokens of the last layer's states. `spec` is a local model."""
    folder = spec.model_folder()
    tokenizer = load_tokenizer(folder, spec.field)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, spec.field).to(device).eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows: list[list[float]] = []
    for start in range(0, len(texts), BATCH):
        encoded = [tokenizer(text)["input_ids"] or [tokenizer.eos_token_id] for text in texts[start : start + BATCH]]
        width = max(map(len, encoded))
        # padded on the right: causal attention never looks there, and the mean leaves it out
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in encoded], device=device)
        real = torch.arange(width) < torch.tensor([len(row) for row in encoded])[:, None]
        mask = real.to(device)
        states = model.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        states = states.masked_fill(~mask[:, :, None], 0.0).sum(1) / mask.sum(1, keepdim=True)  # (rows, hidden)
        rows += states.cpu().tolist()
    return rows
