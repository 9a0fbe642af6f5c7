"""Single requests to vLLM: what is refused beforehand, how they are sampled, what their errors mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from advgame.rollout.engine import EngineError, Request

ROUNDING = 1e-3
"""Nats above zero that a log-prob may be."""


@dataclass(frozen=True)
class Answer:
    """One completion in plain data. version: of the weights that made its first token; None: vLLM did not say (0.24).
    cached_tokens: of the prompt, found in the prefix cache. Tokens and log-probs are empty where it was aborted."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    version: int | None
    cached_tokens: int

    @property
    def usable(self) -> bool:
        """Whether the log-probs are those of a distribution: an engine that has lost its weights says NaN."""
        return all(math.isfinite(one) and one < ROUNDING for one in self.logprobs)


def answer_of(final: Any) -> Answer:
    """From vLLM's final output of a request."""
    made = final.outputs[0]
    cached = getattr(final, "num_cached_tokens", None) or 0
    version = version_of(made)
    if made.finish_reason not in ("stop", "length"):
        return Answer((), (), str(made.finish_reason), version, cached)
    tokens = tuple(made.token_ids)
    logprobs = tuple(step[token].logprob for step, token in zip(made.logprobs, tokens, strict=True))
    return Answer(tokens, logprobs, made.finish_reason, version, cached)


def check(request: Request, name: str, *, text_stops: bool) -> None:
    """EngineError for what no engine could serve: nothing need run to see it."""
    if not request.prompt_ids:
        raise EngineError(f"{name}: the prompt is empty")
    if request.stop and not text_stops:
        raise EngineError(f"{name}: a stop text was asked for, and this engine has no tokenizer")


def check_fits(request: Request, name: str, positions: int, vocabulary: int) -> None:
    """EngineError for what this engine would cut short in silence or die of."""
    ids, most = request.prompt_ids, request.sampling.max_tokens
    if len(ids) + most > positions:
        raise EngineError(
            f"{name}: prompt of {len(ids)} tokens + max_tokens {most} exceeds the engine's {positions} positions"
        )
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise EngineError(f"{name}: the prompt has ids outside the vocabulary of {vocabulary}")


def parameters(request: Request, stop_ids: Sequence[int], *, every_token: bool) -> Any:
    """vLLM's sampling parameters; with `every_token` an output comes with each token, not at the end only."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request.sampling.temperature,
        top_p=request.sampling.top_p,
        max_tokens=request.sampling.max_tokens,
        seed=request.seed,
        stop_token_ids=list(stop_ids),
        logprobs=0,
        stop=list(request.stop) or None,
        include_stop_str_in_output=bool(request.stop),
        detokenize=bool(request.stop),
        output_kind=RequestOutputKind.CUMULATIVE if every_token else RequestOutputKind.FINAL_ONLY,
    )


def version_of(made: Any) -> int | None:
    """The weights' version that made a completion's first token; None where vLLM stamps nothing (0.24)."""
    spans = getattr(made, "weight_versions", None)
    return int(spans[0].version) if spans else None


def is_death(error: Exception) -> bool:
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


def is_refusal(error: Exception) -> bool:
    """A request that vLLM does not take, by the class names of different versions."""
    return isinstance(error, ValueError) or type(error).__name__ in ("VLLMValidationError", "EngineGenerateError")
