"""Trackers: where metrics are drawn besides `metrics.jsonl`; TensorBoard, and Weights & Biases on request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from advgame.errors import InputError
from advgame.run.folder import RunFolder


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Draws `values` at `step`; values that are not finite are left out (`metrics.jsonl` counts them)."""

    def flush(self) -> None:
        """Writes what is buffered: a resume begins at a checkpoint, and draws nothing of the steps before it again."""

    def close(self) -> None:
        """Writes what is buffered. Call once."""


class TensorBoardTracker:
    """Event files in `folder`. `purge_step` hides what an earlier attempt drew from that step on."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second, and only trainers need it

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in _finite(values).items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases. Entity and mode come from its own environment variables and login, as usual.

    W&B runs cannot be rewound, so each attempt is a run of its own in one group named after the run folder.
    """

    def __init__(self, folder: RunFolder, project: str, config: Mapping[str, Any]) -> None:
        """Raises InputError when the package is missing."""
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                "run.wandb: package wandb is not installed; install advgame[wandb] or set run.wandb: false"
            ) from error
        suffix = f"-attempt{folder.attempt}" if folder.attempt else ""
        self._run: Any = wandb.init(
            project=project,
            group=folder.name,
            name=folder.name + suffix,
            config=dict(config),
            dir=str(folder.path),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(_finite(values), step=step)

    def flush(self) -> None:
        """W&B sends from a process of its own, as it comes."""

    def close(self) -> None:
        self._run.finish()


def make_trackers(
    folder: RunFolder,
    *,
    tensorboard: bool,
    wandb: bool = False,
    project: str = "advgame",
    config: Mapping[str, Any] | None = None,
    purge_step: int | None = None,
) -> list[Tracker]:
    """The trackers that were asked for. `purge_step` is the first step that a resumed run will play again."""
    trackers: list[Tracker] = []
    if wandb:  # first: it is the one that can be refused
        trackers.append(WandbTracker(folder, project, config or {}))
    if tensorboard:
        trackers.append(TensorBoardTracker(folder.tensorboard, purge_step))
    return trackers


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
