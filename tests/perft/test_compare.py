"""`perft compare`: what is gathered from runs, what the table, the figure and the page say, and what cannot be compared."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perft.cli import main
from perft.compare import draw, gather, render_html
from perft.errors import PerftError
from perft.scores import Score

SETTINGS = {"mode": "generate", "num_beams": 4, "max_new_tokens": None, "limit": 50, "seed": 0, "dtype": "auto"}


def score(accuracy: float, n: int = 50) -> dict[str, Any]:
    return asdict(Score(accuracy=accuracy, low=accuracy - 0.1, high=accuracy + 0.1, num_examples=n, unanswered=0))


def adapter(variant: str, r: int, efficiency: float, *, unit: str = "lora", m: int = 4, k: int = 2) -> dict[str, Any]:
    counts = {"num_experts": m, "top_k": k, "num_parameters": 1000 * r}
    return {"variant": variant, "r": r, "efficiency": efficiency, "unit": unit, **counts}


def run(folder: Path, models: Mapping[str, tuple[dict[str, Any] | None, float]], **changes: Any) -> str:
    results = {
        "base": "tiny",
        "settings": SETTINGS,
        "tasks": {"piqa": {"sha256": "aa"}, "boolq": {"sha256": "bb"}},
        "models": {
            name: {
                "adapter": report,
                "tasks": {"piqa": score(accuracy + 0.05), "boolq": score(accuracy - 0.05)},
                "average": score(accuracy, 100),
            }
            for name, (report, accuracy) in models.items()
        },
        **changes,
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    first = {"base": (None, 0.4), "r8": (adapter("R", 8, 0.001), 0.5), "<r16>": (adapter("R", 16, 0.002), 0.62)}
    second = {"e4": (adapter("E", 4, 0.004, m=8), 0.55), "s": (adapter("S", 8, 0.0005, unit="parallel"), 0.45)}
    return [run(tmp_path / "one", first), run(tmp_path / "two", second)]


def test_what_is_gathered(runs: list[str]) -> None:
    overview = gather(runs)
    assert [point.name for point in overview.points] == ["<r16>", "e4", "r8", "s"]
    assert [point.method for point in overview.points] == ["R 2/4", "E 2/8", "R 2/4", "S parallel"]
    assert overview.base is not None
    assert (overview.base.accuracy, overview.task_names) == (0.4, ["piqa", "boolq"])


def test_the_figure_shows_what_was_gathered(runs: list[str]) -> None:
    figure = draw(gather(runs))
    (axes,) = figure.axes
    shown: dict[tuple[float, ...], Any] = {tuple(np.asarray(each.get_offsets())[0]): each for each in axes.collections}
    assert np.array(sorted(shown)) == pytest.approx(np.array([(0.05, 45.0), (0.1, 50.0), (0.2, 62.0), (0.4, 55.0)]))
    by_x = [shown[key] for key in sorted(shown)]  # s, r8, r16, e4
    single, routed_8, routed_16, embedded = by_x
    assert tuple(routed_8.get_facecolor()[0]) == tuple(routed_16.get_facecolor()[0])
    assert len({tuple(each.get_facecolor()[0]) for each in by_x}) == 3
    assert embedded.get_sizes()[0] < routed_8.get_sizes()[0] == single.get_sizes()[0] < routed_16.get_sizes()[0]
    assert axes.get_xscale() == "log"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["R 2/4", "E 2/8", "S parallel", "rank 4", "rank 8", "rank 16", "base"]


def test_the_page_needs_nothing_outside(runs: list[str]) -> None:
    page = render_html(gather(runs), b"\x89PNG")
    assert base64.b64encode(b"\x89PNG").decode() in page
    assert "&lt;r16&gt;" in page
    assert "<r16>" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|https?://|@import", page)
    assert page.count("<tr>") == 1 + 4 + 1


def test_the_command(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "r16" in printed
    assert "comparison.html" in printed
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/comparison.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"piqa": {"sha256": "aa"}, "boolq": {"sha256": "cc"}}}, "differ in tasks or their data"),
        ({"settings": SETTINGS | {"limit": 3, "num_beams": 1}}, "differ in num_beams, limit"),
        ({"base": "other"}, "differ in base"),
        ({"settings": {}}, "not as `perft eval` writes it"),
        ({"tasks": None}, "not as `perft eval` writes it"),
    ],
)
def test_runs_that_cannot_be_compared(runs: list[str], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    other = run(tmp_path / "other", {"x": (adapter("S", 8, 0.001), 0.5)}, **changes)
    with pytest.raises(PerftError, match=message):
        gather([runs[0], other])


def test_a_run_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(PerftError, match="no adapter was evaluated"):
        gather([run(tmp_path / "base", {"base": (None, 0.5)})])
