"""The settings of a run's length, repeatability and outputs, which the config tree includes as `run:`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from advgame.settings import Section


class RunSettings(Section):
    root: Path = Field(Path("runs"), description="Folder that holds run folders.")
    name: str | None = Field(None, description="Name of this run's folder; null: time and a random suffix.")
    seed: int = Field(0, ge=0, description="Seeds data order and every sampling stream.")
    steps: PositiveInt = Field(1000, description="Game steps.")
    deterministic: bool = Field(True, description="Form engine batches by tree index: runs repeat bit for bit.")
    ahead: Literal[0, 1] = Field(
        0, description="1: play the next step's trees while this one learns; samples are then one step stale."
    )
    carry_over: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of a step's trees that may end late, for the next step to learn from (not deterministic).",
    )
    validate_every: int = Field(25, ge=0, description="Steps between validations; 0: at start and end only.")
    exact_every: int = Field(0, ge=0, description="World only: steps between exact worst-case evaluations; 0: ends.")
    checkpoint_every: int = Field(50, ge=0, description="Steps between checkpoints (also at the end); 0: end only.")
    checkpoint_beside: bool = Field(
        True,
        description="Write a checkpoint while the next steps are played, from a copy in host memory (16 bytes a "
        "parameter).",
    )
    keep_checkpoints: PositiveInt = Field(2, description="How many of the newest checkpoints stay on disk.")
    tensorboard: bool = Field(True, description="Write TensorBoard event files into the run folder.")
    wandb: bool = Field(False, description="Log to Weights & Biases (needs the extra `wandb`; sends metrics there).")
    wandb_project: str = Field("advgame", description="Weights & Biases project.")
    carbon: float = Field(0.4, ge=0, description="kg CO2e a kWh of the grid, for `energy/co2e_g`; 0.4: world average.")
    threads: PositiveInt | None = Field(None, description="torch CPU threads; null: torch's default.")
    purpose: str = Field(
        "", description="Why an Attacker is trained; recorded, and required unless the tiny world is played."
    )
