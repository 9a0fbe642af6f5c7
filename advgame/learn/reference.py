"""Reference log-probs: what the sampler returned, recomputed from the EMA, or the frozen initial model's.

In fp32 sampler and trainer agree to rounding, and the sampler's numbers make the reference pass disappear. In bf16
they differ by about 0.16 nats in 64 tokens; `auto` measures what that does to the gradient and decides once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

MEASURED_UPDATES = 4
"""Updates that `auto` measures before it decides."""


@contextmanager
def weights_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, `model` computes with `tensors` in the parameters' places that they name; nothing is copied."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in tensors}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = tensors[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


class ReferenceChoice:
    """Which reference a player's pairs use. `decided` is None while `auto` still measures; saved with the run."""

    def __init__(self, mode: str, tolerance: float):
        self.decided: str | None = None if mode == "auto" else mode
        self.changes: list[float] = []
        self._tolerance = tolerance

    def measured(self, change: float) -> str | None:
        """Takes one update's relative coefficient change; returns the decision when this measurement made it."""
        self.changes.append(change)
        if len(self.changes) < MEASURED_UPDATES:
            return None
        self.decided = "rollout" if max(self.changes) <= self._tolerance else "recompute"
        return self.decided

    def state(self) -> dict[str, object]:
        return {"decided": self.decided, "changes": self.changes}

    def restore(self, state: Mapping[str, object]) -> None:
        if self.decided is not None:  # the settings say it
            return
        decided, changes = state["decided"], state["changes"]
        assert decided is None or isinstance(decided, str)
        assert isinstance(changes, list)
        self.decided, self.changes = decided, list(changes)


def snapshot(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detached copy of all, by name."""
    return {name: p.detach().clone() for name, p in parameters.items()}
