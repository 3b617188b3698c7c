"""Base models by name: whole, to train on or to serve, with random weights, or as a skeleton without any.

In: what names a base (a folder, a hub id) or its config. Out: the model, or its skeleton on the meta device, which is enough
to find its MoE blocks and to count its parameters: no tensor is read or made, so an 8x7B costs a second and no memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from perft.errors import BaseModelError
from perft.moe import MoeBlock


def load_base(base: str, dtype: str, device: torch.device | None = None) -> PreTrainedModel:
    """The base model `base` with its weights.

    Args:
        base: a folder or a hub id.
        dtype: `auto` (as the checkpoint) or the name of one.
        device: where its weights go; `None` leaves it to Transformers.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=None if device is None else {"": device},
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"cannot load the base model {base!r}: {first_line(error)}") from error
    return model


def random_base(config: PreTrainedConfig, dtype: str, device: torch.device | None = None) -> PreTrainedModel:
    """A model of this config with weights as random as its family begins with: to measure a base without having it. The same
    for the same config, dtype and kind of device.

    Args:
        dtype, device: as of `load_base`; `auto` is the config's own, or float32.

    Raises:
        BaseModelError: Transformers has no causal language model for the config.
    """
    device = device or torch.device("cpu")
    wanted = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return _from_config(config, dtype=wanted)


def load_config(base: str | Path) -> PreTrainedConfig:
    """The config of the base model `base`.

    Raises:
        BaseModelError: there is none to be had.
    """
    try:
        return AutoConfig.from_pretrained(str(base))
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"no base model at {str(base)!r}: {first_line(error)}") from error


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` on the meta device.

    Raises:
        BaseModelError: Transformers has no causal language model for it.
    """
    with torch.device("meta"):
        return _from_config(config)


def _from_config(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **settings)
    except ValueError as error:
        raise BaseModelError(
            f"no causal language model for model type {config.model_type!r}: {first_line(error)}"
        ) from error
    return model


def load_skeleton(base: str | Path) -> PreTrainedModel:
    """`build_skeleton` of `load_config`."""
    return build_skeleton(load_config(base))


def count_activated(model: PreTrainedModel, blocks: list[MoeBlock]) -> int:
    """Parameters of the base that take part in one token: all of them, but of N base experts only K.

    Raises:
        BaseModelError: a block does not say its K.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    for block in blocks:
        if block.top_k is None:
            raise BaseModelError(f"the model does not say how many base experts {block.name} uses per token")
        experts = sum(parameter.numel() for parameter in model.get_submodule(block.name).parameters())
        total -= experts * (block.num_experts - block.top_k) // block.num_experts
    return total


def first_line(error: Exception) -> str:
    """What an exception says, without the pages that some libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
