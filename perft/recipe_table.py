"""Many recipes in one file: grids of runs that share most of what they say.

    all: {model: ..., seed: 42}            # what every run has; may be left out
    runs:                                  # grids; a grid is a list of axes, an axis a mapping of name: values
      - - {math: {data: math.json}, code: {data: code.json}}
        - {small: {r: 4}, large: {r: 32}}

A run takes one entry of each axis of a grid, and is called by their names: `math-small`. Later axes override earlier ones, and
`output` is the folder above the runs' own: `output/math-small`. In: such a file, or a recipe alone. Out: values by field name,
as `perft.recipe.load_recipe` gives them. It knows no field but `output`.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perft.errors import PerftError
from perft.recipe import check_keys, read_mapping

_KEYS = {"all", "runs"}


def load_run(path: str | Path, name: str | None) -> dict[str, Any]:
    """The values of run `name` of the file; of a recipe alone with `None`.

    Raises:
        PerftError: the file is not as it should be, or `name` does not fit it.
    """
    runs = load_runs(path)
    if "" in runs:
        if name is not None:
            raise PerftError(f"{path} is one recipe and has no runs to choose from; leave --run out")
        return runs[""]
    if name not in runs:
        what = "holds many runs: give --run" if name is None else f"has no run {name!r}; give --run"
        raise PerftError(f"{path} {what}, one of {_listed(runs)}")
    return runs[name]


def load_runs(path: str | Path, patterns: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The values of each run of the file, by name; of a recipe alone under the name "".

    Args:
        path: YAML file; paths in it are relative to where the command runs.
        patterns: only runs that one of these shell patterns matches.

    Raises:
        PerftError: the file is not as it should be, or a pattern matches none of its runs.
    """
    values = read_mapping(path)
    if "runs" not in values:
        check_keys(values, path)
        runs = {"": values}
    else:
        runs = dict(_expand(values, path))
    if patterns is None:
        return runs
    if "" in runs:
        raise PerftError(f"{path} is one recipe and has no runs to choose from; leave --runs out")
    for pattern in patterns:
        if not fnmatch.filter(runs, pattern):
            raise PerftError(f"{path} has no run {pattern!r}; there are {_listed(runs)}")
    return {name: run for name, run in runs.items() if any(fnmatch.fnmatchcase(name, each) for each in patterns)}


def _expand(table: Mapping[str, Any], path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if table.keys() - _KEYS:
        raise PerftError(
            f"{path}: unknown key {min(map(str, table.keys() - _KEYS))!r} beside runs; known are all and runs"
        )
    common = table.get("all") or {}
    grids = table["runs"]
    if not isinstance(common, dict) or not isinstance(grids, list) or not grids:
        raise PerftError(f"{path}: `all` is a mapping of field: value, and `runs` a list of grids")
    check_keys(common, f"{path}, all")
    seen: set[str] = set()
    for number, grid in enumerate(grids, 1):
        _check_grid(grid, f"{path}, grid {number}")
        for entries in itertools.product(*(axis.items() for axis in grid)):
            name = "-".join(str(part) for part, _ in entries)
            if name in seen:
                raise PerftError(f"{path}: {name!r} is the name of two runs")
            seen.add(name)
            merged = dict(common)
            for _, values in entries:
                merged |= values
            if "output" in merged:
                merged["output"] = str(Path(str(merged["output"])) / name)
            yield name, merged


def _check_grid(grid: object, where: str) -> None:
    if not isinstance(grid, list) or not grid or not all(isinstance(axis, dict) and axis for axis in grid):
        raise PerftError(f"{where}: a grid is a list of axes, an axis a mapping of name: values")
    for axis in grid:
        for part, values in axis.items():
            if not isinstance(values, dict):
                raise PerftError(f"{where}, {part}: values are a mapping of field: value")
            if "/" in str(part):
                raise PerftError(f"{where}, {part}: a name becomes a folder's, so it cannot hold a /")
            check_keys(values, f"{where}, {part}")


def _listed(names: Mapping[str, Any]) -> str:
    """The names, but not pages of them."""
    first = list(names)[:12]
    return ", ".join(first) + (f" ... ({len(names)} in all)" if len(names) > len(first) else "")
