"""The sizes of a transformer that cost memory and time, from its config.json or from its well-known name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advgame.errors import InputError


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with grouped-query attention and a gated feed-forward block."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def body_parameters(self) -> int:
        """Of the layers: projections and feed-forward; norms and biases are below a thousandth and left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Of the LM head, whether its memory is the embedding's or its own."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.head_parameters * (1 if self.tied else 2)

    def kv_bytes(self, itemsize: int = 2) -> int:
        """Key-value cache of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    def forward_flops(self, tokens: float, context: float, head_rows: float | None = None) -> float:
        """Of `tokens` tokens that attend to `context` earlier ones on average; the head sees `head_rows` of them."""
        rows = tokens if head_rows is None else head_rows
        attention = 4.0 * tokens * context * self.layers * self.heads * self.head_dim
        return 2.0 * (self.body_parameters * tokens + self.head_parameters * rows) + attention


KNOWN = (
    ModelShape("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151_936, True),
    ModelShape("qwen2.5-1.5b", 28, 1536, 12, 2, 128, 8960, 151_936, True),
    ModelShape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18_944, 152_064, False),
    ModelShape("qwen2.5-14b", 48, 5120, 40, 8, 128, 13_824, 152_064, False),
    ModelShape("qwen2.5-32b", 64, 5120, 40, 8, 128, 27_648, 152_064, False),
    ModelShape("qwen2.5-72b", 80, 8192, 64, 8, 128, 29_568, 152_064, False),
    ModelShape("llama3.1-8b", 32, 4096, 32, 8, 128, 14_336, 128_256, False),
    ModelShape("llama3.3-70b", 80, 8192, 64, 8, 128, 28_672, 128_256, False),
)


def shape_of(model: Path | str, field: str) -> ModelShape:
    """The shape of a model folder, or of a folder's name where the folder is not here ("Qwen2.5-7B-Instruct").

    Raises InputError naming `field` for a folder without a readable config.json and for an unknown name.
    """
    path = Path(model)
    if path.is_dir():
        try:
            tree = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{field}: no readable config.json in {path}: {error}") from error
        return shape_from_config(tree, path.name, field)
    wanted = _plain(path.name)
    for shape in KNOWN:
        if wanted.startswith(_plain(shape.name)) or _plain(shape.name) in wanted:
            return shape
    raise InputError(
        f"{field}: {path} is not a folder here, and its name is none of {', '.join(s.name for s in KNOWN)}; "
        "give a folder with a config.json, or one of these names"
    )


def shape_from_config(tree: dict[str, Any], name: str, field: str) -> ModelShape:
    """A Hugging Face config's tree as a shape. Raises InputError for a mixture of experts or a missing size."""
    text = tree.get("text_config", tree)
    experts = next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), None)
    if experts is not None:
        raise InputError(f"{field}: {name} is a mixture of experts ({experts}); planning knows dense models only")
    try:
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        return ModelShape(
            name, int(text["num_hidden_layers"]), hidden, heads, int(text.get("num_key_value_heads") or heads),
            int(text.get("head_dim") or hidden // heads), int(text["intermediate_size"]), int(text["vocab_size"]),
            bool(tree.get("tie_word_embeddings", False)),
        )  # fmt: skip
    except KeyError as missing:
        raise InputError(f"{field}: config.json of {name} has no {missing.args[0]}") from None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
