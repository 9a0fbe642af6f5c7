"""Our entry point in vLLM (`vllm.general_plugins`, and through the worker extension): backend, plain CPU products, and
an end with the trainer's."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
from contextlib import suppress
from typing import Any

from advgame.rollout import vllm_sockets

BACKEND = "advgame"
PARENT = "ADVGAME_PARENT"
"""The same names as in advgame/rollout/vllm_start.py, which must not import vLLM's side."""


def register() -> None:
    """Makes our weight-transfer engine known to vLLM's factory. May be called any number of times."""
    trainer = os.environ.get(PARENT)
    if trainer is not None and int(trainer) != os.getpid():  # one of an engine's processes
        die_with_parent(int(trainer))
        tempfile.tempdir = None  # a fork knows that of its parent, and has its own
        vllm_sockets.note_shared()  # the queues are to come; a start that is cut short leaves something too
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with suppress(ValueError):  # registered already: the plugin and the worker extension both come here
        WeightTransferEngineFactory.register_engine(BACKEND, "advgame.publish.worker", "PublishEngine")
    _keep_cpu_weights()


def die_with_parent(trainer: int) -> None:
    """This process ends when its parent does: the trainer, or an engine's process that does the same."""
    # PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if os.getppid() == 1 and trainer != 1:  # it ended before this call
        os.kill(os.getpid(), signal.SIGKILL)


def _keep_cpu_weights() -> None:
    """Leaves Linear weights as they were loaded, in engines of our backend.

    vLLM on the CPU repacks them for its matrix products and drops the originals, so that nothing could be written
    where the engine reads. Other engines in the process are served by vLLM's function as before.
    """
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm
    if getattr(original, "of_advgame", False):
        return

    def dispatch(layer: Any, remove_weight: bool) -> None:
        import torch
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        transfer = None if config is None else config.weight_transfer_config
        if transfer is not None and transfer.backend == BACKEND and layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
            return
        original(layer, remove_weight)

    dispatch.of_advgame = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch
