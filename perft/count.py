"""`perft count`: how many parameters recipes would train, on bases of their real size, without weights or data.

In: recipes. Out: a `BaseCount` for each base, in it an `AdapterCount` for each adapter that differs. Base and adapter are built
on the meta device by what would train them, and their parameters counted; nothing comes out of a formula.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import get_peft_model
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from perft.base import count_activated, load_skeleton
from perft.config import PerftConfig
from perft.layer import PerftLayer
from perft.lora import LoraRecipe
from perft.moe import MoeBlock, find_moe_blocks
from perft.recipe import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterCount:
    """Parameters of one adapter.

    Args:
        runs: names of the recipes that would train it.
        num_parameters: all that are trained.
        num_activated: those that take part in one token.
        efficiency: activated over the base's activated (the paper's activated-parameter efficiency).
    """

    runs: list[str]
    num_parameters: int
    num_activated: int
    efficiency: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseCount:
    """Parameters of one base, and of the adapters for it."""

    base: str
    num_parameters: int
    num_activated: int
    adapters: list[AdapterCount] = field(default_factory=list)


def count(
    recipes: Sequence[tuple[str, TrainConfig, PerftConfig | LoraRecipe]], *, bases: str | Path | None = None
) -> list[BaseCount]:
    """Counts.

    Args:
        recipes: name, how and what of each.
        bases: folder where a base's config is looked for first, as `bases/NAME/config.json`.

    Raises:
        BaseModelError: a base's config cannot be had, or it has no MoE blocks.
        PerftError: an adapter does not fit its base.
    """
    counted: dict[str, BaseCount] = {}
    models: dict[str, PreTrainedModel] = {}
    blocks: dict[str, list[MoeBlock]] = {}
    seen: dict[str, AdapterCount] = {}
    for name, config, adapter in recipes:
        base = config.model
        if base not in models:
            models[base] = load_skeleton(_config_of(base, bases))
            blocks[base] = find_moe_blocks(models[base])
            counted[base] = BaseCount(
                base=base,
                num_parameters=sum(parameter.numel() for parameter in models[base].parameters()),
                num_activated=count_activated(models[base], blocks[base]),
            )
        key = f"{base} {adapter}"
        if key in seen:
            seen[key].runs.append(name)
            continue
        total, activated = _trained(models[base], adapter, blocks[base])
        seen[key] = AdapterCount(
            runs=[name],
            num_parameters=total,
            num_activated=activated,
            efficiency=activated / counted[base].num_activated,
        )
        counted[base].adapters.append(seen[key])
    return list(counted.values())


def render(counted: Sequence[BaseCount]) -> list[Table]:
    """A table for each base."""
    tables = []
    for base in counted:
        table = Table(
            title=f"{base.base}: {base.num_parameters:,} parameters, {base.num_activated:,} activated",
            caption="%: activated parameters of the adapter, of the base's",
        )
        table.add_column("runs", overflow="fold")
        for head in ("parameters", "activated", "%"):
            table.add_column(head, justify="right")
        for each in base.adapters:
            numbers = (f"{each.num_parameters:,}", f"{each.num_activated:,}", f"{100 * each.efficiency:.3f}")
            table.add_row(_folded(each.runs), *numbers)
        tables.append(table)
    return tables


def _folded(names: Sequence[str]) -> str:
    """Names that end alike, as a shell would take them: `{math,code}-small`."""
    if len(names) == 1:
        return names[0]
    words = [name.split("-") for name in names]
    alike = itertools.takewhile(
        lambda column: len(set(column)) == 1, zip(*(each[::-1] for each in words), strict=False)
    )
    ending = "".join(f"-{column[0]}" for column in list(alike)[::-1])
    return f"{{{','.join(name.removesuffix(ending) for name in names)}}}{ending}"


def _config_of(base: str, bases: str | Path | None) -> str | Path:
    if bases is not None and (Path(bases) / base / "config.json").is_file():
        return Path(bases) / base
    return base


def _trained(model: PreTrainedModel, adapter: PerftConfig | LoraRecipe, blocks: Sequence[MoeBlock]) -> tuple[int, int]:
    """Parameters that training would change, all and activated; the model is left as it was."""
    with warnings.catch_warnings():
        # PEFT asks Transformers by a name that Transformers renames
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        tuned = get_peft_model(
            model, adapter.to_peft(model) if isinstance(adapter, LoraRecipe) else copy.deepcopy(adapter)
        )
    total = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    idle = sum(_idle(tuned.get_base_model().get_submodule(block.name), block) for block in blocks)
    tuned.unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # as PEFT found them
    return total, total - idle


def _idle(experts: nn.Module, block: MoeBlock) -> int:
    """Trained parameters beside or in the base experts of one block that a token does not use."""
    trained = {name: parameter for name, parameter in experts.named_parameters() if parameter.requires_grad}
    if not isinstance(experts, PerftLayer):  # LoRA in every base expert, of which a token uses K of N
        share = 1 if block.top_k is None else block.top_k / block.num_experts
        return round((1 - share) * sum(parameter.numel() for parameter in trained.values()))
    (config,) = experts.perft_config.values()
    num_experts = block.num_experts if config.num_experts is None else config.num_experts
    used = config.experts_per_token(num_experts, block.top_k)
    assert used is not None
    units = sum(parameter.numel() for name, parameter in trained.items() if "perft_gate" not in name)
    return units * (num_experts - used) // num_experts
