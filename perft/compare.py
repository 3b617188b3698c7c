"""`perft compare`: the paper's figure 4 from results of `perft eval`: score against activated-parameter efficiency.

In: output folders of `perft eval`, all of the same questions asked in the same way. Out: points, a table, a PNG, and one HTML
file that needs nothing beside it. Colour is the method, size the rank; bars are 95 % intervals; the dashed line is the base. It
runs no model and needs matplotlib (extra `train`).
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from perft.errors import PerftError
from perft.scores import Score, read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, which the colour-blind can tell apart
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_MARKERS = ("o", "s", "^", "D")
_VARIANTS = "RESDL"  # by their first letters
_SAME = ("mode", "num_beams", "max_new_tokens", "limit", "seed", "dtype")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One adapter's result.

    Args:
        run: the folder that it comes from.
        method: variant, adapter experts per token and in all, unit kind if it is not `lora`.
        rank: r.
        efficiency: activated parameters of the adapter over those of the base.
        num_parameters: all of the adapter's.
        score: the average over tasks.
        tasks: by task.
    """

    run: str
    name: str
    method: str
    rank: int
    efficiency: float
    num_parameters: int
    score: Score
    tasks: dict[str, Score]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """What runs say together: the adapters, the best first, and the base if it was evaluated."""

    base_model: str
    points: list[Point]
    base: Score | None
    base_tasks: dict[str, Score]
    task_names: list[str]


def gather(folders: Sequence[str | Path]) -> Overview:
    """Reads runs.

    Raises:
        PerftError: a folder holds no result, runs were not of the same questions on the same base, or there is no adapter.
    """
    runs = {str(folder): read_results(folder) for folder in folders}
    first_name, first = next(iter(runs.items()))
    points: list[Point] = []
    base: Score | None = None
    base_tasks: dict[str, Score] = {}
    for name, results in runs.items():
        try:
            _check_alike(first_name, first, name, results)
            for model, entry in results["models"].items():
                tasks = {task: Score(**score) for task, score in entry["tasks"].items()}
                average = Score(**entry["average"])
                if entry["adapter"] is None:
                    base, base_tasks = average, tasks
                else:
                    points.append(_point(name, model, entry["adapter"], average, tasks))
        except (KeyError, TypeError, AttributeError) as error:
            raise PerftError(f"{name}: results.json is not as `perft eval` writes it: {error!r}") from error
    if not points:
        raise PerftError(f"no adapter was evaluated in {', '.join(runs)}")
    points.sort(key=lambda point: -point.score.accuracy)
    return Overview(
        base_model=str(first["base"]),
        points=points,
        base=base,
        base_tasks=base_tasks,
        task_names=list(first["tasks"]),
    )


def write_comparison(overview: Overview, folder: str | Path) -> list[Path]:
    """Writes `comparison.png` and `comparison.html`; returns their paths."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    draw(overview).savefig(buffer, format="png", dpi=160)
    picture, page = home / "comparison.png", home / "comparison.html"
    picture.write_bytes(buffer.getvalue())
    page.write_text(render_html(overview, buffer.getvalue()), encoding="utf-8")
    return [picture, page]


def draw(overview: Overview) -> Figure:
    """The figure.

    Raises:
        PerftError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError as error:
        raise PerftError("perft compare needs matplotlib: pip install 'perft-serve[train]'") from error
    methods = _methods(overview)
    ranks = sorted({point.rank for point in overview.points})
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for point in overview.points:
        colour, marker = methods[point.method]
        x, y = 100 * point.efficiency, 100 * point.score.accuracy
        low, high = 100 * point.score.low, 100 * point.score.high
        axes.plot([x, x], [low, high], color=colour, alpha=0.45, linewidth=1.2, zorder=1)
        axes.scatter(
            [x], [y], s=_area(ranks, point.rank), color=colour, marker=marker, alpha=0.85, edgecolors="white", zorder=2
        )
    if overview.base is not None:
        axes.axhline(100 * overview.base.accuracy, color="#777777", linestyle="--", linewidth=1, zorder=0)
    axes.set_xscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    spread = [point.efficiency for point in overview.points]
    axes.xaxis.set_minor_formatter(plain if max(spread) < 10 * min(spread) else NullFormatter())
    axes.set_xlabel("activated parameters of the adapter, % of the base's")
    axes.set_ylabel(f"accuracy, %, average of {len(overview.task_names)} task{'s' * (len(overview.task_names) > 1)}")
    axes.grid(alpha=0.25)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=method)
        for method, (colour, marker) in methods.items()
    ]
    handles += [
        Line2D(
            *([], []),
            color="#999999",
            marker="o",
            linestyle="",
            markersize=_area(ranks, rank) ** 0.5,
            label=f"rank {rank}",
        )
        for rank in ranks
    ]
    if overview.base is not None:
        handles.append(Line2D([], [], color="#777777", linestyle="--", label="base"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, labelspacing=0.9)
    return figure


def rows(overview: Overview) -> tuple[list[str], list[list[str]]]:
    """The table: its head, and a row for each adapter and for the base, as text."""
    head = ["model", "method", "rank", "parameters", "activated, %", *overview.task_names, "average"]
    body = [
        [
            point.name,
            point.method,
            str(point.rank),
            f"{point.num_parameters:,}",
            f"{100 * point.efficiency:.3g}",
            *(_percent(point.tasks[task]) for task in overview.task_names),
            _percent(point.score),
        ]
        for point in overview.points
    ]
    if overview.base is not None:
        base_tasks = [_percent(overview.base_tasks[task]) for task in overview.task_names]
        body.append(["base", "", "", "", "", *base_tasks, _percent(overview.base)])
    return head, body


def render(overview: Overview) -> Table:
    """The table for a terminal."""
    head, body = rows(overview)
    table = Table(*head, title="accuracy, % (95 % interval: +-)")
    for row in body:
        table.add_row(*row)
    return table


def render_html(overview: Overview, png: bytes) -> str:
    """One page with figure and table that refers to nothing outside."""
    head, body = rows(overview)
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    picture = base64.b64encode(png).decode("ascii")
    num_questions = overview.points[0].score.num_examples
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Adapters of {html.escape(overview.base_model)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
</style>
</head>
<body>
<h1>Adapters of {html.escape(overview.base_model)}</h1>
<p>Accuracy against activated-parameter efficiency. Colour is the method (adapter experts per token / in all), size the rank;
bars are 95 % intervals over {num_questions:,} questions, the dashed line is the base alone. What another training run
would give is not in the intervals.</p>
<p><img alt="accuracy against activated-parameter efficiency" src="data:image/png;base64,{picture}"></p>
<div><table>
<thead><tr>{cells}</tr></thead>
<tbody>
{lines}
</tbody>
</table></div>
</body>
</html>
"""


def _check_alike(first_name: str, first: Mapping[str, Any], name: str, results: Mapping[str, Any]) -> None:
    def questions(of: Mapping[str, Any]) -> dict[str, str]:
        return {task: source["sha256"] for task, source in of["tasks"].items()}

    differing = [key for key in _SAME if first["settings"][key] != results["settings"][key]]
    if first["base"] != results["base"]:
        differing.insert(0, "base")
    if questions(first) != questions(results):
        differing.insert(0, "tasks or their data")
    if differing:
        raise PerftError(f"{first_name} and {name} cannot be compared: they differ in {', '.join(differing)}")


def _point(run: str, name: str, report: Mapping[str, Any], score: Score, tasks: dict[str, Score]) -> Point:
    variant, num_experts, top_k = report["variant"], report["num_experts"], report["top_k"]
    targets = ", ".join(target.removesuffix("_proj") for target in report.get("targets") or ())
    method = {
        "R": f"R {top_k}/{num_experts}",
        "E": f"E {top_k}/{num_experts}",
        "D": f"D {num_experts}",
        "S": "S",
        "LoRA": f"LoRA {targets}",
    }[variant]
    if report["unit"] != "lora":
        method += f" {report['unit']}"
    return Point(
        run=run,
        name=name,
        method=method,
        rank=report["r"],
        efficiency=report["efficiency"],
        num_parameters=report["num_parameters"],
        score=score,
        tasks=tasks,
    )


def _methods(overview: Overview) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each method; the marker tells apart what has the same colour."""
    names = sorted({point.method for point in overview.points}, key=lambda name: (_VARIANTS.index(name[0]), name))
    looks = ((colour, marker) for marker in itertools.cycle(_MARKERS) for colour in _COLOURS)
    return dict(zip(names, looks, strict=False))


def _area(ranks: Sequence[int], rank: int) -> float:
    """A marker's area, in square points: by the place of the rank among those there are."""
    return 40.0 + 45.0 * ranks.index(rank)


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} +-{50 * (score.high - score.low):.1f}"
