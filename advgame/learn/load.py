"""Weights of a causal language model from its Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError  # of a weights-only load that meets something else

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from advgame.errors import InputError
from advgame.rollout.chat import first_line


def load_model(
    folder: Path, field: str, *, dtype: torch.dtype = torch.float32, remote_code: bool = False
) -> PreTrainedModel:
    """A causal LM from a Hugging Face folder; InputError names `field` if its weights do not load."""
    transformers_logging.disable_progress_bar()  # it would draw over the live view
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=remote_code, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise InputError(f"{field}: no weights load from {folder}: {first_line(error)}") from error
    sampling = model.generation_config
    if sampling is not None and not sampling.do_sample and (sampling.temperature or sampling.top_p or sampling.top_k):
        sampling.do_sample = True  # else transformers refuses to save the folder again
    return model
