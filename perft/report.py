"""What `perft inspect` says of an adapter: what it is, how large, and how much of the base's work it adds.

In: an adapter folder and, if it is at hand, the base (only its config is read). Out: an `AdapterReport`, as a table or as
plain data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from perft.adapter import Adapter, read_adapter, read_fields
from perft.base import count_activated, load_skeleton
from perft.config import PerftConfig
from perft.errors import AdapterError
from perft.lora import LoraAdapter, read_lora
from perft.moe import MoeBlock, find_moe_blocks
from perft.provenance import read_record


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterReport:
    """What there is to say of one adapter.

    Args:
        variant: R, E, D or S; LoRA for a plain one.
        unit: lora or parallel.
        num_experts: M, adapter experts per layer (E: one per base expert); `None` for a LoRA.
        top_k: adapter experts per token; `None` for E when the base is not at hand, and for a LoRA.
        r: rank.
        scale: factor on a unit's output; of a LoRA with several, the first one's.
        combine: whose weights combine R's experts; `None` for other variants.
        norm_topk: whether R's own weights sum to 1; `None` where that has no meaning.
        layers: decoder layers that have the adapter.
        dtypes: what its tensors are stored as.
        num_parameters: all of its parameters.
        num_activated: those that take part in one token; `None` where that depends on a base that is not at hand.
        base_activated: the base's parameters that take part in one token; `None` without the base.
        num_bytes: weight of its tensors on disk.
        digest: sha256 (hex) of what it computes.
        targets: what a LoRA is put on; `None` for PERFT.
        training: what its `perft_training.json` holds; `None` if it has none.
    """

    variant: str
    unit: str
    num_experts: int | None
    top_k: int | None
    r: int
    scale: float
    combine: str | None
    norm_topk: bool | None
    layers: list[int]
    dtypes: list[str]
    num_parameters: int
    num_activated: int | None
    base_activated: int | None
    num_bytes: int
    digest: str
    targets: list[str] | None = None
    training: dict[str, Any] | None = None

    @property
    def efficiency(self) -> float | None:
        """Activated-parameter efficiency: activated trainable / activated parameters of the base (the paper's x axis)."""
        if self.num_activated is None or self.base_activated is None:
            return None
        return self.num_activated / self.base_activated

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {**asdict(self), "efficiency": self.efficiency}


def describe_adapter(path: str | Path, *, base: str | Path | None = None) -> AdapterReport:
    """Reads and checks the adapter in folder `path`.

    Args:
        path: the adapter's folder.
        base: the base it belongs to (folder or hub id): checks that it fits, and gives the activated-parameter efficiency.

    Raises:
        AdapterError: the adapter is broken or does not fit the base.
        BaseModelError: the base cannot be had or has no MoE blocks.
    """
    is_lora = read_fields(path).get("peft_type") == "LORA"
    if base is None and is_lora:
        report = _lora_report(read_lora(path), expert_share=None, base_activated=None)
    elif base is None:
        report = _report(read_adapter(path), base_top_k=None, base_activated=None)
    else:
        model = load_skeleton(base)
        blocks = find_moe_blocks(model)
        top_k, base_activated = _common_top_k(blocks), count_activated(model, blocks)
        if is_lora:
            share = None if top_k is None else top_k / blocks[0].num_experts
            report = _lora_report(read_lora(path, model), expert_share=share, base_activated=base_activated)
        else:
            report = _report(read_adapter(path, blocks), base_top_k=top_k, base_activated=base_activated)
    return replace(report, training=read_record(Path(path)))


def activated_per_layer(
    config: PerftConfig, *, hidden_size: int, num_experts: int, base_top_k: int | None
) -> int | None:
    """Parameters of one layer of an adapter that take part in one token: its router, and the units the token uses.

    Args:
        config: the adapter's.
        hidden_size: D.
        num_experts: M (variant E: N).
        base_top_k: K, needed for variant E only.

    Returns:
        The count, or `None` if it depends on a base that is not known.
    """
    used = config.experts_per_token(num_experts, base_top_k)
    if used is None:
        return None
    router = num_experts * hidden_size if config.variant == "R" else 0
    return router + used * 2 * config.r * hidden_size


def render(report: AdapterReport) -> Table:
    """The report as a table for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    names = {"R": "Routed", "E": "Embedded", "D": "Dense", "S": "Single"}
    if report.targets is not None:
        rows = {"variant": "LoRA", "targets": ", ".join(report.targets)}
    else:
        rows = {
            "variant": f"PERFT-{report.variant} ({names[report.variant]})",
            "unit": report.unit,
            "adapter experts (M)": f"{report.num_experts}{' (one per base expert)' if report.variant == 'E' else ''}",
            "per token (k)": "as the base" if report.top_k is None else str(report.top_k),
        }
    rows |= {"rank (r)": str(report.r), "scale": f"{report.scale:g}"}
    if report.combine is not None:
        rows["combine"] = report.combine
    if report.norm_topk is not None:
        rows["weights sum to 1"] = "yes" if report.norm_topk else "no"
    rows["layers"] = f"{len(report.layers)} ({_ranges(report.layers)})"
    rows["parameters"] = f"{report.num_parameters:,}"
    if report.num_activated is not None:
        rows["activated"] = f"{report.num_activated:,}"
    if report.efficiency is not None:
        rows["activated-parameter efficiency"] = f"{report.efficiency:.3%} of the base's {report.base_activated:,}"
    else:
        rows["activated-parameter efficiency"] = "give --base to know it"
    rows["size"] = f"{report.num_bytes:,} bytes ({', '.join(report.dtypes)})"
    rows["digest"] = report.digest
    rows.update(_training_rows(report.training))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _training_rows(record: dict[str, Any] | None) -> dict[str, str]:
    """What the table says of where the adapter comes from."""
    if record is None:
        return {"training": "no record of it (no perft_training.json)"}
    base, outcome = record.get("base", {}), record.get("outcome")
    rows = {
        "trained on": f"{record['recipe'].get('model')} (digest {base.get('digest') or 'not known'})",
        "data": "; ".join(f"{name} (sha256 {digest[:12]})" for name, digest in record.get("data_sha256", {}).items()),
    }
    if outcome is None:
        rows["outcome"] = "training has not ended"
    else:
        measured = [f"{name} {value:.4g}" for name, value in outcome.get("metrics", {}).items()]
        rows["outcome"] = ", ".join([f"{outcome.get('steps')} steps", *measured])
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())
    return rows


def _report(adapter: Adapter, *, base_top_k: int | None, base_activated: int | None) -> AdapterReport:
    config = adapter.config
    per_layer = activated_per_layer(
        config, hidden_size=adapter.hidden_size, num_experts=adapter.num_experts, base_top_k=base_top_k
    )
    tensors = [tensor for layer in adapter.layers.values() for tensor in layer.named().values()]
    return AdapterReport(
        variant=config.variant,
        unit=config.unit,
        num_experts=adapter.num_experts,
        top_k=config.experts_per_token(adapter.num_experts, base_top_k),
        r=config.r,
        scale=config.scale,
        combine=config.combine if config.variant == "R" else None,
        norm_topk=config.norm_topk,
        layers=sorted(adapter.layers),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        num_parameters=adapter.num_parameters,
        num_activated=None if per_layer is None else per_layer * len(adapter.layers),
        base_activated=base_activated,
        num_bytes=adapter.num_bytes,
        digest=adapter.digest,
    )


def _lora_report(adapter: LoraAdapter, *, expert_share: float | None, base_activated: int | None) -> AdapterReport:
    """`expert_share`: K / N, the part of a LoRA on the base experts that one token meets."""
    on_experts = sum(pair.num_parameters for pair in adapter.pairs if pair.target == "experts")
    num_activated: int | None = adapter.num_parameters
    if on_experts:
        num_activated = (
            None if expert_share is None else adapter.num_parameters - on_experts + round(on_experts * expert_share)
        )
    return AdapterReport(
        variant="LoRA",
        unit="lora",
        num_experts=None,
        top_k=None,
        r=adapter.config.r,
        scale=adapter.pairs[0].scale,
        combine=None,
        norm_topk=None,
        layers=adapter.layers,
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in adapter.tensors}),
        num_parameters=adapter.num_parameters,
        num_activated=num_activated,
        base_activated=base_activated,
        num_bytes=adapter.num_bytes,
        digest=adapter.digest,
        targets=adapter.targets,
    )


def _common_top_k(blocks: list[MoeBlock]) -> int | None:
    counts = {block.top_k for block in blocks}
    if len(counts) > 1:
        raise AdapterError(
            f"the base uses different numbers of base experts per token in its layers: {sorted(map(str, counts))}"
        )
    return counts.pop()


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
