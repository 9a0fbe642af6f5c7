"""Parameter shapes of models, for benchmarks that need the sizes but not the weights."""

from __future__ import annotations

MODELS = {
    "100m": {"hidden": 768, "layers": 12, "vocab": 32_000, "inner": 3072, "heads": 12, "kv_heads": 12},
    "0.5b": {"hidden": 896, "layers": 24, "vocab": 151_936, "inner": 4864, "heads": 14, "kv_heads": 2},
    "7b": {"hidden": 3584, "layers": 28, "vocab": 152_064, "inner": 18_944, "heads": 28, "kv_heads": 4, "untied": 1},
}
"""0.5b and 7b are Qwen2.5's; 100m is a Qwen2 of that size."""


def parameter_shapes(model: str) -> list[tuple[int, ...]]:
    """Shapes of a Qwen2's parameters, in the order of its own `named_parameters`."""
    return list(named_shapes(model).values())


def named_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """The same by name."""
    m = MODELS[model]
    h, inner = m["hidden"], m["inner"]
    kv = h // m["heads"] * m["kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (m["vocab"], h)}
    for i in range(m["layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q", h), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, h)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (h, h)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (inner, h)
        shapes[f"{layer}mlp.down_proj.weight"] = (h, inner)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (h,)
    shapes["model.norm.weight"] = (h,)
    if m.get("untied"):
        shapes["lm_head.weight"] = (m["vocab"], h)
    return shapes
