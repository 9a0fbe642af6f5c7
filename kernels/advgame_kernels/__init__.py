"""Losses, log-probabilities and weight averaging for language-model training, from logits or straight from an LM head.

Each operation stands beside a torch reference of the same signature, its name ending in `_ref`. Only torch is
needed; Triton (CUDA) and the package's C++ extension (CPU) are used where they are there.
"""

from advgame_kernels.ema import ema_update_, ema_update_ref_
from advgame_kernels.ema_prepared import PreparedEma
from advgame_kernels.ema_schedule import ema_decay, power_decay, warmup_decay
from advgame_kernels.linear_logprobs import linear_logprobs, linear_logprobs_ref
from advgame_kernels.linear_policy import linear_policy_loss, linear_policy_loss_ref
from advgame_kernels.linear_preference import linear_preference_loss, linear_preference_loss_ref
from advgame_kernels.logprobs import selective_logprobs, selective_logprobs_ref
from advgame_kernels.policy import policy_loss, policy_loss_ref
from advgame_kernels.preference import preference_loss, preference_loss_ref
from advgame_kernels.preference_kinds import KINDS, REFERENCE_FREE
from advgame_kernels.sums import PreparedSums, byte_sums, byte_sums_ref
from advgame_kernels.types import LogProbs, PolicyOutput, PreferenceOutput

__all__ = [
    "KINDS",
    "REFERENCE_FREE",
    "LogProbs",
    "PolicyOutput",
    "PreferenceOutput",
    "PreparedEma",
    "PreparedSums",
    "byte_sums",
    "byte_sums_ref",
    "ema_decay",
    "ema_update_",
    "ema_update_ref_",
    "linear_logprobs",
    "linear_logprobs_ref",
    "linear_policy_loss",
    "linear_policy_loss_ref",
    "linear_preference_loss",
    "linear_preference_loss_ref",
    "policy_loss",
    "policy_loss_ref",
    "power_decay",
    "preference_loss",
    "preference_loss_ref",
    "selective_logprobs",
    "selective_logprobs_ref",
    "warmup_decay",
]
