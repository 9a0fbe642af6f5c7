"""Exact probabilities of a set of answers to many prompts: one forward pass over a trie of the answers.

The answers share their beginnings, so they are laid out as a trie behind each prompt. An attention mask lets
a node see the prompt and its own ancestors only, and its position is its depth: every node's logits equal
those of a plain forward pass over prompt and answer so far, and no shared token is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Trie:
    """Token sequences as a tree. Node 0 stands for the empty sequence (the prompt's last token).

    tokens, parents, depths: of nodes 1.. (`parents[i - 1]` is the parent of node `i`, always smaller).
    paths: for each sequence, in order, the nodes passed, node 0 first and the last token left out.
    sequences: the token sequences.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    sequences: tuple[tuple[int, ...], ...]

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> Trie:
        """Of non-empty sequences. Their last tokens are predicted only, so they need no node."""
        found: dict[tuple[int, ...], int] = {(): 0}
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        paths: list[tuple[int, ...]] = []
        for sequence in sequences:
            nodes = [0]
            for end in range(1, len(sequence)):
                start = tuple(sequence[:end])
                if start not in found:
                    found[start] = len(found)
                    tokens.append(sequence[end - 1])
                    parents.append(nodes[-1])
                    depths.append(end)
                nodes.append(found[start])
            paths.append(tuple(nodes))
        return cls(tuple(tokens), tuple(parents), tuple(depths), tuple(paths), tuple(tuple(s) for s in sequences))

    def sees(self) -> Tensor:
        """(nodes, nodes) bool without node 0: row i may attend to column j, its ancestor or itself."""
        count = len(self.tokens)
        seen = torch.eye(count, dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent > 0:
                seen[i] |= seen[parent - 1]
        return seen


@torch.inference_mode()
def sequence_logprobs(
    model: PreTrainedModel, groups: Sequence[Sequence[Sequence[int]]], trie: Trie, batch: int = 32
) -> Tensor:
    """Natural-log probabilities at temperature 1: (prompts, sequences) float32 on the CPU, in given order.

    Each group holds non-empty prompts (token ids); what its prompts begin with in common is computed once.
    `batch` prompts or a little more go through the model together. Log-softmax is taken in float32, whatever
    the model's type.
    """
    rows: list[Tensor] = []
    waiting: list[Sequence[Sequence[int]]] = []
    for group in groups:
        waiting.append(group)
        if sum(map(len, waiting)) >= batch:
            rows.append(_forward(model, waiting, trie).cpu())
            waiting = []
    if waiting:
        rows.append(_forward(model, waiting, trie).cpu())
    return torch.cat(rows) if rows else torch.empty(0, len(trie.sequences))


def _forward(model: PreTrainedModel, groups: Sequence[Sequence[Sequence[int]]], trie: Trie) -> Tensor:
    device = model.device
    shared = [_shared_length(group) for group in groups]
    stems, stem_real = _left_padded([group[0][:n] for group, n in zip(groups, shared, strict=True)])
    tails, tail_real = _left_padded([p[n:] for group, n in zip(groups, shared, strict=True) for p in group])
    of_group = torch.tensor([g for g, group in enumerate(groups) for _ in group])
    prompts, nodes = len(tails), len(trie.tokens)

    cache = DynamicCache(config=model.config)
    causal = torch.ones(stems.shape[1], stems.shape[1], dtype=torch.bool).tril()
    model.base_model(
        input_ids=stems.to(device),
        attention_mask=_additive(causal & stem_real[:, None, :], model),
        position_ids=(stem_real.cumsum(1) - 1).clamp_min(0).to(device),
        past_key_values=cache,
        use_cache=True,
    )
    cache.reorder_cache(of_group.to(device))

    real = torch.cat([stem_real[of_group], tail_real, torch.ones(prompts, nodes, dtype=torch.bool)], 1)
    lengths = real.sum(1, keepdim=True) - nodes
    tail_positions = (lengths - tails.shape[1] + torch.arange(tails.shape[1])).clamp_min(0)
    node_positions = lengths - 1 + torch.tensor(trie.depths, dtype=torch.long)
    hidden = model.base_model(
        input_ids=torch.cat([tails, torch.tensor(trie.tokens, dtype=torch.long).expand(prompts, -1)], 1).to(device),
        attention_mask=_additive(_sees(stems.shape[1], tails.shape[1], trie) & real[:, None, :], model),
        position_ids=torch.cat([tail_positions, node_positions], 1).to(device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, tails.shape[1] - 1 :]  # (prompts, 1 + nodes, hidden)
    logits = model.get_output_embeddings()(hidden).float()
    normalizers = logits.logsumexp(-1)  # (prompts, 1 + nodes)
    columns = [
        (logits[:, list(path), list(sequence)] - normalizers[:, list(path)]).sum(1)
        for path, sequence in zip(trie.paths, trie.sequences, strict=True)
    ]
    return torch.stack(columns, 1)


def _shared_length(group: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, leaving at least one token to each."""
    most = min(map(len, group)) - 1
    return next((i for i in range(most) if len({prompt[i] for prompt in group}) > 1), most)


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are real, both (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) >= width - lengths[:, None]


def _sees(stem: int, tail: int, trie: Trie) -> Tensor:
    """(tail + nodes, stem + tail + nodes) bool: what each query position sees if no position is padding."""
    nodes = len(trie.tokens)
    sees = torch.zeros(tail + nodes, stem + tail + nodes, dtype=torch.bool)
    sees[:, :stem] = True
    sees[:tail, stem : stem + tail] = torch.ones(tail, tail, dtype=torch.bool).tril()
    sees[tail:, stem : stem + tail] = True
    sees[tail:, stem + tail :] = trie.sees()
    return sees


def _additive(visible: Tensor, model: PreTrainedModel) -> Tensor:
    """(rows, queries, keys) bool -> the additive (rows, 1, queries, keys) mask that every attention takes.

    The lowest finite number keeps the softmax of a padding row, which sees nothing, from being NaN.
    """
    mask = torch.zeros(visible.shape, dtype=model.dtype).masked_fill_(~visible, torch.finfo(model.dtype).min)
    return mask[:, None].to(model.device)
