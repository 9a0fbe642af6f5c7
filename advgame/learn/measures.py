"""What an update of pairs tells of itself, gathered micro-batch by micro-batch."""

from __future__ import annotations

from advgame_kernels import PreferenceOutput
from jaxtyping import Float
from torch import Tensor

from advgame.learn.meter import Meter
from advgame.learn.objective import coefficient_change, sequence_lengths, sequence_sums
from advgame.learn.packing import PackedBatch
from advgame.learn.settings import LearnSettings


def measure_pairs(meter: Meter, out: PreferenceOutput, share: float) -> None:
    """Loss, margin, accuracy and entropy; `share`: this batch's part of all pairs of the update."""
    meter.add("loss", out.loss)
    meter.add("margin", out.margins.mean() * share)
    meter.add("accuracy", out.accuracies.mean() * share)
    if out.entropy is not None:
        meter.add("entropy", out.entropy.mean() * share)


def measure_reference(
    meter: Meter,
    margins: Float[Tensor, " pairs"],
    batch: PackedBatch,
    reference: Float[Tensor, " sequences"],
    share: float,
    settings: LearnSettings,
) -> None:
    """How far the sampler's log-probs are from the recomputed `reference`, and what taking them would change."""
    gap = sequence_sums(batch.sampler_logps, batch) - reference
    meter.add("reference_gap", gap.abs().mean() * share)
    meter.most("reference_gap_max", gap.abs().max())
    if settings.length_normalised:
        gap = gap / sequence_lengths(batch)
    shift = gap[0::2] - gap[1::2]
    margins = margins.detach()
    meter.most("reference_change", coefficient_change(margins - shift, margins, settings))
