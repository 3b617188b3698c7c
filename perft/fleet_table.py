"""How a fleet's training looks to people: a table that is redrawn, or a line for each thing that happens.

In: the members of a fleet. Out: rich's renderables and lines.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from perft.fleet import Member

_STYLES = {"waiting": "dim", "training": "", "done": "green", "failed": "red"}


def fleet_table(members: Sequence[Member]) -> Table:
    """One row for each member."""
    table = Table(box=None, pad_edge=False)
    for title in ("recipe", "adapter", "state", "step", "loss", "eval loss", ""):
        table.add_column(title, overflow="fold", justify="right" if "loss" in title or title == "step" else "left")
    for member in members:
        config = member.adapter
        table.add_row(
            member.label,
            f"{config.variant} {config.unit} r{config.r}",
            member.state,
            f"{member.step}/{member.total_steps}" if member.total_steps else "",
            _number(member.last("loss")),
            _number(member.last("eval_loss")),
            member.reason,
            style=_STYLES[member.state],
        )
    return table


class LineProgress:
    """Prints a line when a member logs something, ends or fails: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: dict[str, tuple[int, str]] = {}

    def __call__(self, members: Sequence[Member]) -> None:
        for member in members:
            now = (len(member.history), member.state)
            if now == self._seen.get(member.label) or member.state == "waiting":
                continue
            self._seen[member.label] = now
            losses = [
                f"{name} {value:.4f}" for name in ("loss", "eval_loss") if (value := member.last(name)) is not None
            ]
            words = [member.label, member.state, f"step {member.step}/{member.total_steps}", *losses, member.reason]
            self._console.print(
                "  ".join(word for word in words if word), soft_wrap=True, highlight=False, markup=False
            )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
