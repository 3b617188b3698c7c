"""What the runs of the small world say: a table and the figure. In: their lines. Out: text and a PNG."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

NUM_RESAMPLES = 2000
# Okabe and Ito's, which the colour-blind can tell apart
COLOURS = {"qvLoRA": "#777777", "S": "#0072B2", "D": "#56B4E9", "R": "#D55E00", "E": "#009E73"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What the seeds of a method on a base say together.

    Args:
        lines: one a seed.
        accuracy: by task, the mean over seeds.
        averages: over tasks, of each seed.
        difference: of the average from the base's, with its 95 % interval over questions; `None` of the base, or without it.
        bits: by task, per character of the right answer, the mean over seeds.
        bits_difference: of them from the base's, likewise.
    """

    base: str
    method: str
    lines: list[dict[str, Any]]
    accuracy: dict[str, float]
    averages: list[float]
    difference: tuple[float, float, float] | None
    bits: dict[str, float]
    bits_difference: dict[str, tuple[float, float, float]]

    def mean(self, *path: str) -> float:
        """Over seeds, of what lies in a line at `path`."""
        values = [functools.reduce(lambda found, key: found[key], path, line) for line in self.lines]
        return float(np.mean(np.asarray(values, dtype=float)))


def summarise(lines: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Lines by base and method, in the order in which they come; the base's own first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["base"], line["method"]), []).append(dict(line))
    found = []
    for (base, method), own in groups.items():
        reference = groups.get((base, "base"))
        found.append(
            Summary(
                base=base,
                method=method,
                lines=own,
                accuracy={
                    task: float(np.mean([line["tasks"][task]["accuracy"] for line in own])) for task in own[0]["tasks"]
                },
                averages=[line["average"]["accuracy"] for line in own],
                difference=None
                if method == "base" or reference is None
                else between(own, reference, accuracy, resample_seeds=False),
                bits={
                    task: float(np.mean([line["answer_bits"][task]["value"] for line in own]))
                    for task in own[0]["answer_bits"]
                },
                bits_difference=(
                    {}
                    if method == "base" or reference is None
                    else {
                        task: between(own, reference, bits, [task], resample_seeds=False)
                        for task in own[0]["answer_bits"]
                    }
                ),
            )
        )
    return found


Measure: TypeAlias = "Callable[[Mapping[str, Any], str], tuple[np.ndarray, np.ndarray]]"


def accuracy(line: Mapping[str, Any], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each question: 1 if the answer was right, and its weight."""
    right = np.array([answer == "1" for answer in line["right"][task]], dtype=float)
    return right, np.ones_like(right)


def bits(line: Mapping[str, Any], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each question: the right answer's bits, and its characters."""
    return -np.array(line["answer_nats"][task]) / np.log(2), np.array(line["answer_characters"][task], dtype=float)


def between(
    own: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    measure: Measure,
    tasks: Sequence[str] | None = None,
    *,
    resample_seeds: bool = True,
) -> tuple[float, float, float]:
    """How much more one method has than another, question by question, averaged over tasks (default: all): the mean over
    seeds, and its 95 % interval, for which questions are resampled, and seeds unless told otherwise."""
    generator = np.random.default_rng(0)
    draws = np.zeros(NUM_RESAMPLES)
    value = 0.0
    picks = [
        generator.integers(len(lines), size=(NUM_RESAMPLES, len(lines)))
        if resample_seeds
        else np.tile(np.arange(len(lines)), (NUM_RESAMPLES, 1))
        for lines in (own, other)
    ]
    tasks = list(own[0]["right"]) if tasks is None else tasks
    for task in tasks:
        mine, its = (np.array([measure(line, task)[0] for line in lines]) for lines in (own, other))
        weights = measure(own[0], task)[1]
        value += (mine.mean(axis=0) - its.mean(axis=0)).sum() / weights.sum() / len(tasks)
        rows = generator.integers(len(weights), size=(NUM_RESAMPLES, len(weights)))
        for i, row in enumerate(rows):
            difference = mine[picks[0][i]].mean(axis=0) - its[picks[1][i]].mean(axis=0)
            draws[i] += difference[row].sum() / weights[row].sum() / len(tasks)
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(value), float(low), float(high)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines as Markdown, a table for each base."""
    summaries = summarise(lines)
    text = ["Written by `recipes/small_world/run.py` from `small_world.jsonl`; accuracies in per cent.", ""]
    for base in dict.fromkeys(summary.base for summary in summaries):
        own = [summary for summary in summaries if summary.base == base]
        tasks = list(own[0].accuracy)
        head = ["method", "r", "parameters", "activated, %", "seeds", *tasks, "average", "seeds from .. to"]
        head += ["against the base (95 %)", "average, by character"]
        head += [f"{task}, bits" for task in tasks] + ["held-out loss"]
        text += [f"## {base}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for each in own:
            is_base = each.method == "base"
            averages = [100 * value for value in each.averages]
            row = [each.method]
            row += ["", "", ""] if is_base else [f"{each.lines[0]['r']}", f"{each.lines[0]['trainable']:,}"]
            row += [] if is_base else [f"{100 * each.lines[0]['efficiency']:.3f}"]
            row += ["" if is_base else str(len(each.lines)), *(f"{100 * each.accuracy[task]:.1f}" for task in tasks)]
            row += [f"{np.mean(averages):.1f}", "" if is_base else f"{min(averages):.1f} .. {max(averages):.1f}"]
            row += [
                "" if each.difference is None else "{:+.1f} ({:+.1f} .. {:+.1f})".format(*_percent(each.difference)),
                f"{100 * each.mean('average_norm', 'accuracy'):.1f}",
                *(
                    f"{each.bits[task]:.3f}"
                    + ("" if is_base else "; {:+.3f} ({:+.3f} .. {:+.3f})".format(*each.bits_difference[task]))
                    for task in tasks
                ),
                "" if is_base else f"{each.mean('train', 'held_out_loss'):.3f}",
            ]
            text.append(f"| {' | '.join(row)} |")
        trained = [each for each in own if each.method != "base"]
        text += ["", *_pairs(trained, "Accuracy in points", accuracy, "+.1f", unit=100)]
        text += _pairs(trained, "Bits per character", bits, "+.3f")
    return "\n".join(text)


def _pairs(summaries: Sequence[Summary], title: str, measure: Measure, form: str, unit: float = 1.0) -> list[str]:
    """Every method against every other, as lines of Markdown."""
    names = [each.method for each in summaries]
    text = [
        f"{title}, average of the tasks: the row's less the column's (95 % over questions and seeds).",
        "",
        f"| | {' | '.join(names[1:])} |",
        f"|{'---|' * len(names)}",
    ]
    for i, one in enumerate(summaries[:-1]):
        cells = [""] * i
        for other in summaries[i + 1 :]:
            value, low, high = (format(unit * number, form) for number in between(one.lines, other.lines, measure))
            cells.append(f"{value} ({low} .. {high})")
        text.append(f"| {one.method} | {' | '.join(cells)} |")
    return [*text, ""] if len(names) > 1 else []


def _shifts(count: int) -> list[float]:
    """Places of seeds beside each other."""
    return [0.0] if count < 2 else [float(shift) for shift in np.linspace(-0.18, 0.18, count)]


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The paper's figure 4 at one activated-parameter efficiency: what would be one x for all is a place for each method. A
    dot is a seed, its bar the 95 % interval over questions; the dashed line is the base, the band its interval. Beside it the
    bits per character of the right answers, by task."""
    from matplotlib.figure import Figure

    summaries = summarise(lines)
    bases = list(dict.fromkeys(summary.base for summary in summaries))
    tasks = list(summaries[0].accuracy)
    figure = Figure(figsize=(4.0 + 3.6 * len(tasks), 3.7 * len(bases)), layout="constrained")
    axes = figure.subplots(
        len(bases), 1 + len(tasks), squeeze=False, gridspec_kw={"width_ratios": [1.5] + [1] * len(tasks)}
    )
    for (left, *others), base in zip(axes, bases, strict=True):
        methods = [summary for summary in summaries if summary.base == base and summary.method != "base"]
        reference = next((each for each in summaries if each.base == base and each.method == "base"), None)
        if reference is not None:
            score = reference.lines[0]["average"]
            left.axhline(100 * score["accuracy"], color="#333333", linestyle="--", linewidth=1)
            left.axhspan(100 * score["low"], 100 * score["high"], color="#333333", alpha=0.07, linewidth=0)
            for axis, task in zip(others, tasks, strict=True):
                axis.axhline(reference.bits[task], color="#333333", linestyle="--", linewidth=1)
        for place, summary in enumerate(methods):
            colour = COLOURS.get(summary.method, "#000000")
            for shift, line in zip(_shifts(len(summary.lines)), summary.lines, strict=True):
                score = line["average"]
                left.plot([place + shift] * 2, [100 * score["low"], 100 * score["high"]], color=colour, alpha=0.4)
                left.plot([place + shift], [100 * score["accuracy"]], "o", color=colour)
                for axis, task in zip(others, tasks, strict=True):
                    axis.plot([place + shift], [line["answer_bits"][task]["value"]], "o", color=colour)
        for axis in (left, *others):
            axis.set_xticks(range(len(methods)), [summary.method for summary in methods])
            axis.set_xlim(-0.6, max(len(methods), 1) - 0.4)
            axis.grid(alpha=0.25, axis="y")
            axis.tick_params(labelsize=9)
        shares = [100 * summary.lines[0]["efficiency"] for summary in methods]
        alike = bool(shares) and max(shares) - min(shares) < 5e-4
        left.set_title(f"{base}, activated {f'{shares[0]:.3f} %' if alike else 'as in the table'}", fontsize=10)
        left.set_ylabel(f"accuracy, %, average of {' and '.join(tasks)}", fontsize=9)
        for axis, task in zip(others, tasks, strict=True):
            axis.set_title(f"{task}, bits per character", fontsize=10)
    figure.savefig(path, dpi=130)
