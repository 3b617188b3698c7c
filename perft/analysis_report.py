"""How an `Analysis` looks: the paper's figure 3, loads and co-activation as PNG files, one HTML page of them, and a table.

In: an `Analysis`. Out: files in a folder; the page refers to nothing outside. It runs no model and needs matplotlib (extra
`train`), and umap-learn for UMAP.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from perft.analysis import Analysis, LayerAnalysis
from perft.errors import PerftError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Projection = Literal["pca", "umap"]
MAX_DRAWN = 6
"""Layers that are drawn one by one; of more, so many are taken evenly."""

_BASE, _HIDDEN = "#3B4CC0", "#BBBBBB"
_CAPTIONS = {
    "vectors": "What is compared with a layer's input, by direction: inputs (less their mean, at a scale that fits), the base "
    "router's vectors and the base experts' key memories; in colour, one for each adapter expert, the adapter's key "
    "memories (dots) and its router's vectors (stars).",
    "load": "Share of the choices that fell on each expert, over the share that balance would give it (1: white), by layer; "
    "and how balanced they are (entropy of the shares over the most it can be), with the mean entropy of the adapter router's "
    "probabilities.",
    "together": "Among tokens that took a base expert: where their adapter choices went. Equal rows mean that the adapter's "
    "choice does not depend on the base's.",
}


def require_plotting(projection: Projection) -> None:
    """Raises PerftError if what draws is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PerftError("perft analyze needs matplotlib: pip install 'perft-serve[train]'")
    if projection == "umap" and importlib.util.find_spec("umap") is None:
        raise PerftError("--projection umap needs umap-learn: pip install umap-learn; or leave it out for PCA")


def write_report(
    analysis: Analysis,
    folder: str | Path,
    *,
    projection: Projection = "pca",
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Path]:
    """Writes `vectors.png`, `load.png`, `together.png` (variants R and E), `analysis.html`, `analysis.json`; returns the paths.

    Args:
        analysis: what to show.
        folder: made if it is not there.
        projection: how vectors are brought into the plane.
        layers: which to draw one by one (default: up to `MAX_DRAWN`, evenly).
        seed: UMAP's.

    Raises:
        PerftError: a layer is not an adapted one, or what draws is not installed.
    """
    require_plotting(projection)
    chosen = choose_layers(analysis, layers)
    pictures = {"vectors": _png(draw_vectors(chosen, projection, seed)), "load": _png(draw_load(analysis))}
    if analysis.chooses:
        pictures["together"] = _png(draw_together(chosen, analysis.variant))
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures.items():
        paths.append(home / f"{name}.png")
        paths[-1].write_bytes(picture)
    page, data = home / "analysis.html", home / "analysis.json"
    page.write_text(render_html(analysis, pictures, projection), encoding="utf-8")
    data.write_text(json.dumps(analysis.to_dict()) + "\n", encoding="utf-8")
    return [*paths, page, data]


def choose_layers(analysis: Analysis, layers: Sequence[int] | None) -> list[LayerAnalysis]:
    """The layers to draw one by one."""
    if layers is None:
        count = len(analysis.layers)
        places = range(count) if count <= MAX_DRAWN else np.linspace(0, count - 1, MAX_DRAWN).round().astype(int)
        return [analysis.layers[place] for place in places]
    by_number = {each.layer: each for each in analysis.layers}
    missing = [layer for layer in layers if layer not in by_number]
    if missing:
        raise PerftError(f"layers {missing} are not adapted; there are {sorted(by_number)}")
    return [by_number[layer] for layer in dict.fromkeys(layers)]


def project(kinds: Mapping[str, Tensor], projection: Projection, seed: int) -> tuple[dict[str, Tensor], list[float]]:
    """Brings rows of several kinds, each scaled to length 1, into one plane.

    Principal components are those of all kinds but the inputs (`hidden`), each kind weighing the same, for a layer has a few
    router vectors and thousands of key memories. Inputs are far more spread out than either, and only their direction
    matters: they are drawn at a scale that fits.

    Args:
        kinds: rows `[S, D]` by kind.
        seed: UMAP's.

    Returns:
        Places `[S, 2]` by kind; for principal components the share of the variance on each axis.
    """
    unit = {name: F.normalize(rows_SD, dim=-1) for name, rows_SD in kinds.items()}
    if projection == "umap":
        import umap

        reducer = umap.UMAP(n_components=2, metric="cosine", random_state=seed, n_jobs=1)
        placed = torch.from_numpy(reducer.fit_transform(torch.cat(list(unit.values())).numpy()))
        return dict(zip(unit, placed.split([len(rows) for rows in unit.values()]), strict=True)), []
    fitted = {name: rows for name, rows in unit.items() if name != "hidden"}
    centre_D = torch.stack([rows.mean(0) for rows in fitted.values()]).mean(0)
    weighted = [(rows - centre_D) / math.sqrt(len(rows)) for rows in fitted.values()]
    _, sizes, axes = torch.linalg.svd(torch.cat(weighted), full_matrices=False)
    axes_2D = axes[:2]
    # a singular vector's sign is arbitrary: its largest entry is made positive, so that figures can be compared
    axes_2D = axes_2D * axes_2D.gather(1, axes_2D.abs().argmax(1, keepdim=True)).sign()
    places = {name: (rows - centre_D) @ axes_2D.T for name, rows in fitted.items()}
    if "hidden" in unit:
        inputs_S2 = unit["hidden"] @ axes_2D.T
        reach = max(float(rows.norm(dim=-1).max()) for rows in places.values())
        places["hidden"] = inputs_S2 * (reach / float(inputs_S2.norm(dim=-1).quantile(0.95).clamp_min(1e-12)))
    share = sizes.square() / sizes.square().sum().clamp_min(1e-12)
    return places, share[:2].tolist()


def draw_vectors(layers: Sequence[LayerAnalysis], projection: Projection, seed: int) -> Figure:
    """The paper's figure 3: a panel for each layer."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(3, len(layers))
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(1.4 + 4.2 * columns, 1.0 + 3.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    has_router = has_base_router = has_base_keys = False
    for panel, each in zip(panels, layers, strict=False):
        vectors = each.vectors
        num_adapter, rank, hidden_size = vectors.adapter_keys_MRD.shape
        parts = {
            # what all inputs have in common tells no token from another, and would fill the picture
            "hidden": vectors.hidden_SD - vectors.hidden_SD.mean(0),
            "base_keys": vectors.base_keys_SD,
            "base_router": vectors.base_router_ND,
            "keys": vectors.adapter_keys_MRD.reshape(-1, hidden_size),
            "router": vectors.adapter_router_MD,
        }
        there = {name: rows_SD for name, rows_SD in parts.items() if rows_SD is not None}
        at, share = project(there, projection, seed)
        colours = colormaps["hsv"](np.linspace(0, 1, num_adapter, endpoint=False))
        panel.scatter(*at["hidden"].T, s=7, color=_HIDDEN, alpha=0.45, linewidths=0)
        if "base_keys" in at:
            has_base_keys = True
            panel.scatter(*at["base_keys"].T, s=9, color=_BASE, alpha=0.22, linewidths=0)
        owner = np.repeat(np.arange(num_adapter), rank)
        panel.scatter(*at["keys"].T, s=16, color=colours[owner], alpha=0.75, linewidths=0)
        if "base_router" in at:
            has_base_router = True
            panel.scatter(*at["base_router"].T, s=60, marker="D", color=_BASE, edgecolors="white", linewidths=0.8)
        if "router" in at:
            has_router = True
            panel.scatter(*at["router"].T, s=190, marker="*", color=colours, edgecolors="black", linewidths=0.7)
        panel.set_title(f"layer {each.layer}", fontsize=10)
        if share:
            panel.set_xlabel(f"PC 1 ({share[0]:.0%} of the variance)", fontsize=8)
            panel.set_ylabel(f"PC 2 ({share[1]:.0%})", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.2)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    wanted = [
        (True, "input of the block", "o", _HIDDEN, 4),
        (has_base_router, "base router", "D", _BASE, 7),
        (has_base_keys, "base key memory", "o", "#AAB2E5", 5),
        (has_router, "adapter router", "*", "#DD6666", 13),
        (True, "adapter key memory", "o", "#DD6666", 5),
    ]
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=size, label=label)
        for there_is, label, marker, colour, size in wanted
        if there_is
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def draw_load(analysis: Analysis) -> Figure:
    """Loads of all layers, and how balanced they are; of the adapter only where there is a choice (variants R and E)."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = analysis.layers
    numbers = [each.layer for each in layers]
    loads = [("base expert", torch.stack([each.base_load_N for each in layers]))]
    if analysis.chooses:
        loads.append(("adapter expert", torch.stack([each.adapter_load_M for each in layers])))
    figure = Figure(figsize=(4.4 + 4.3 * len(loads), 1.6 + max(2.6, 0.16 * len(layers))), layout="constrained")
    *left, right = figure.subplots(1, len(loads) + 1)
    for panel, (name, load) in zip(left, loads, strict=True):
        relative = (load * load.shape[1]).numpy()
        top = min(max(2.0, float(relative.max())), 8.0)
        image = panel.imshow(
            relative,
            aspect="auto",
            cmap="RdBu_r",
            norm=TwoSlopeNorm(vmin=0, vcenter=1, vmax=top),
            interpolation="nearest",
        )
        panel.set_xlabel(name)
        panel.set_ylabel("layer")
        panel.set_xticks(_ticks(load.shape[1]))
        panel.set_yticks(_ticks(len(layers)), [numbers[place] for place in _ticks(len(layers))])
        extend = "max" if float(relative.max()) > top else "neither"
        figure.colorbar(image, ax=panel, label="load over balanced load", extend=extend)
    right.plot(numbers, [each.base_balance for each in layers], marker=".", color=_BASE, label="load of base experts")
    if analysis.chooses:
        right.plot(
            numbers,
            [each.adapter_balance for each in layers],
            marker=".",
            color="#D55E00",
            label="load of adapter experts",
        )
    entropy = [each.router_entropy for each in layers]
    if all(value is not None for value in entropy):
        right.plot(numbers, entropy, marker=".", color="#009E73", label="adapter router, per token")
    right.set_ylim(0, 1.04)
    right.set_xlabel("layer")
    right.set_ylabel("entropy over the most it can be")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.grid(alpha=0.25)
    right.legend(fontsize=8, loc="lower left")
    return figure


def draw_together(layers: Sequence[LayerAnalysis], variant: str) -> Figure:
    """Co-activation: a panel for each layer."""
    from matplotlib.figure import Figure

    columns = min(3, len(layers))
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(1.4 + 3.6 * columns, 0.4 + 3.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    top = max(float(each.together_NM.max()) for each in layers)
    image: Any = None
    for panel, each in zip(panels, layers, strict=False):
        image = panel.imshow(
            each.together_NM.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest"
        )
        panel.set_title(f"layer {each.layer}: {each.information:.2f} bits in common", fontsize=10)
        panel.set_xlabel("adapter expert" if variant != "E" else "adapter expert (of the base expert)", fontsize=8)
        panel.set_ylabel("base expert", fontsize=8)
        panel.set_xticks(_ticks(each.together_NM.shape[1]))
        panel.set_yticks(_ticks(each.together_NM.shape[0]))
        panel.tick_params(labelsize=7)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    figure.colorbar(image, ax=list(panels), label="share of adapter choices")
    return figure


def rows(analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    """The table: its head, and a row for each layer, as text. What has no meaning for the variant is left out."""
    columns: list[tuple[str, list[str | None]]] = [
        ("layer", [str(each.layer) for each in analysis.layers]),
        ("base balance", [_number(each.base_balance) for each in analysis.layers]),
        ("adapter balance", [_number(each.adapter_balance) if analysis.chooses else None for each in analysis.layers]),
        ("router entropy", [_number(each.router_entropy) for each in analysis.layers]),
        (
            "busiest adapter expert",
            [f"{float(each.adapter_load_M.max()):.0%}" if analysis.chooses else None for each in analysis.layers],
        ),
        (
            "unused adapter experts",
            [str(int((each.adapter_load_M == 0).sum())) if analysis.chooses else None for each in analysis.layers],
        ),
        ("bits in common", [_number(each.information) if analysis.chooses else None for each in analysis.layers]),
        ("|cos| own keys", [_number(each.own_keys) for each in analysis.layers]),
        ("|cos| others' keys", [_number(each.other_keys) for each in analysis.layers]),
        (
            "max cos base router",
            [
                None if each.nearest_base_router_M is None else _number(float(each.nearest_base_router_M.mean()))
                for each in analysis.layers
            ],
        ),
    ]
    there = [(name, [cell or "" for cell in cells]) for name, cells in columns if any(cells)]
    return [name for name, _ in there], [list(row) for row in zip(*(cells for _, cells in there), strict=True)]


def render(analysis: Analysis) -> Table:
    """The table for a terminal."""
    head, body = rows(analysis)
    table = Table(title=_title(analysis))
    for name in head:
        table.add_column(name, justify="right")
    for row in body:
        table.add_row(*row)
    return table


def render_html(analysis: Analysis, pictures: dict[str, bytes], projection: Projection) -> str:
    """One page that refers to nothing outside."""
    head, body = rows(analysis)
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    titles = {"vectors": "Routers and memories", "load": "Load", "together": "Base and adapter experts together"}
    how = {
        "pca": "Principal components, routers and memories weighing the same.",
        "umap": "UMAP of cosine distances: only nearness has a meaning.",
    }[projection]
    figures = "\n".join(
        f"<h2>{titles[name]}</h2>\n<p>{html.escape(_CAPTIONS[name])}{' ' + how if name == 'vectors' else ''}</p>\n"
        f'<p><img alt="{titles[name]}" src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}"></p>'
        for name, picture in pictures.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{html.escape(_title(analysis))}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }}
</style>
</head>
<body>
<h1>{html.escape(_title(analysis))}</h1>
<p>Base: {html.escape(analysis.base)}, {analysis.base_top_k} of {len(analysis.layers[0].base_load_N)} base experts a token.
Data: {html.escape(", ".join(analysis.data))}; {analysis.num_examples:,} examples, {analysis.num_tokens:,} tokens.</p>
{figures}
<h2>By layer</h2>
<p>Balance and entropies are shares of the most they can be. Bits in common: mutual information of a token's base choice and its
adapter choice. |cos|: of a router vector with its own adapter expert's key memories and with the others'; max cos: with the
nearest vector of the base router; means over the adapter's experts.</p>
<div><table>
<thead><tr>{cells}</tr></thead>
<tbody>
{lines}
</tbody>
</table></div>
</body>
</html>
"""


def _title(analysis: Analysis) -> str:
    num_adapter = len(analysis.layers[0].adapter_load_M)
    kind = "" if analysis.unit == "lora" else f", {analysis.unit}"
    return f"{Path(analysis.adapter).name}: PERFT-{analysis.variant}, {analysis.top_k} of {num_adapter} adapter experts{kind}"


def _ticks(count: int) -> list[int]:
    """Some of `count` places, a dozen at most."""
    return list(range(0, count, -(-count // 12)))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
