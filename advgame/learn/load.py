"""Weights of a causal language model from its Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError  # of a weights-only load that meets something else

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME
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
    _savable(model.generation_config)
    return model


def outline(folder: Path, field: str, *, remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder without values: names, shapes and settings, float32 on torch's meta device."""
    local = {"trust_remote_code": remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        with torch.device("meta"):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=remote_code
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{field}: no model is described in {folder}: {first_line(error)}") from error
    if (folder / GENERATION_CONFIG_NAME).is_file():
        made.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    _savable(made.generation_config)
    return made.eval()


def _savable(sampling: GenerationConfig | None) -> None:
    """Else transformers refuses to save the folder again."""
    if sampling is not None and not sampling.do_sample and (sampling.temperature or sampling.top_p or sampling.top_k):
        sampling.do_sample = True
