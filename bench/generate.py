"""The embedded engine's batched sampling against transformers' continuous batching: `python -m bench generate`.

Both sample the same requests (untempered log-probs kept by ours only) from a randomly initialised model. The floor
is one forward over every token, in one batch: what the arithmetic alone costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import io

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from advgame.rollout.engine import Request, Sampling, stream_seed
from advgame.rollout.transformers_engine import TransformersEngine
from bench.timing import alternate, table

STOP, PAD = 1, 0


def requests_of(count: int, longest: int, vocab: int) -> list[Request]:
    """Prompts of 8 to 24 tokens and completions of 1/4 to 4/4 of `longest`: a random model seldom stops."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    made = []
    for i in range(count):
        prompt = tuple(torch.randint(2, vocab, (draw(8, 24),), generator=generator).tolist())
        made.append(Request(prompt, Sampling(1.0, 1.0, draw(longest // 4, longest)), (i,), stream_seed(0, (i,))))
    return made


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench generate", description=__doc__)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--longest", type=int, default=32, help="tokens of the longest completion")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args(arguments)

    config = Qwen2Config(
        vocab_size=chosen.vocab, hidden_size=chosen.hidden, intermediate_size=2 * chosen.hidden,
        num_hidden_layers=chosen.layers, num_attention_heads=max(1, chosen.hidden // 32),
        num_key_value_heads=max(1, chosen.hidden // 64), eos_token_id=STOP, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    model, peer = (Qwen2ForCausalLM(config).eval() for _ in range(2))
    peer.load_state_dict(model.state_dict())
    engine = TransformersEngine(model, stop_ids=[STOP], pad_id=PAD, batch=chosen.requests)
    requests = requests_of(chosen.requests, chosen.longest, chosen.vocab)
    tokens = sum(len(r.prompt_ids) + r.sampling.max_tokens for r in requests)

    def batched() -> None:
        async def all_of_them() -> None:
            await asyncio.gather(*(engine.generate(r) for r in requests))

        asyncio.run(all_of_them())

    settings = GenerationConfig(
        max_new_tokens=chosen.longest, do_sample=True, eos_token_id=STOP, pad_token_id=PAD, use_cuda_graph=False
    )
    paged = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=1024)

    def continuous() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            peer.generate_batch(
                [list(r.prompt_ids) for r in requests], generation_config=settings,
                continuous_batching_config=paged, warmup=False,
            )  # fmt: skip

    @torch.inference_mode()
    def floor() -> None:
        model(input_ids=torch.full((chosen.requests, tokens // chosen.requests), 2), use_cache=False)

    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{chosen.requests} requests, {tokens} tokens, {size:.2f} M parameters")
    contenders = {"one forward over all tokens": floor, "batched, padded (ours)": batched}
    if model.device.type == "cpu" and importlib.util.find_spec("psutil") is None:
        print("continuous batching is left out: it needs psutil on a CPU (pip install psutil)")
    else:
        contenders["continuous"] = continuous
    timings = alternate(contenders, model.device, chosen.repeats)
    print(table("sampling", timings, timings["one forward over all tokens"].milliseconds))
    return 0
