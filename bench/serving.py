"""Serving benchmark: requests on mixed adapters, against the same requests on the base alone and against Transformers + PEFT.

In: a base model and adapters (the demo's unless told). Out: a table, and one JSON line that is printed and appended to
`bench/results/serving.jsonl`. Three ways of serving the same prompts, greedily, every stream to its full length:

    mixed   our server, each stream on an adapter of its own, all in one batch
    base    our server, the same requests on the base model
    peft    Transformers' `generate` on the PEFT model, one adapter at a time: a batch per adapter, `set_adapter` between

First it checks that the tokens are right: the PEFT model, fed what our engine generated, must find each token (nearly) the
likeliest and as probable as our engine said, and much less so without the adapter. Then the three take turns, round by
round in changing order, because the machine is noisy; a ratio is the median of the rounds' ratios.
It does not know how the engine works: only the public faces (`LLM`, the HTTP server) are used. With `--compare` it measures
our server without adapters against other servers instead (`compare.py`; `--compare --help`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import compare
import torch
from harness import (
    RESULTS,
    ROOT,
    Job,
    Run,
    end_cleanly,
    make_jobs,
    measure,
    print_table,
    ratio,
    running_server,
    surroundings,
    write_result,
)
from in_process import MAX_GAP, Offline, Peft
from models import DEMO_BASE, AdapterMaker, find_adapters
from transformers.utils.logging import disable_progress_bar

from perft.demo_base import build_demo_base


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What determines a run; written into its result."""

    model: str
    adapters: tuple[str, ...]
    streams: int
    max_tokens: int
    rounds: int
    dtype: str
    seed: int
    transport: str


class Served(Protocol):
    """A way of serving: runs all jobs at once and says how long it took."""

    def run(self, jobs: Sequence[Job], max_tokens: int) -> Run: ...


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Mixed adapters against the base alone and Transformers + PEFT.")
    parser.add_argument(
        "--compare", action="store_true", help="measure against other servers instead (has options of its own)"
    )
    parser.add_argument("--model", default=str(DEMO_BASE), help="base model (default: the demo base, built if missing)")
    parser.add_argument("--adapters", type=Path, default=ROOT / "demo" / "adapters", help="folder of adapter folders")
    parser.add_argument("--random-adapters", type=int, default=0, help="use so many random PERFT-R adapters instead")
    parser.add_argument("--streams", type=int, default=8, help="concurrent requests")
    parser.add_argument("--max-tokens", type=int, default=48, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is measured")
    parser.add_argument("--dtype", choices=sorted(MAX_GAP), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offline", action="store_true", help="use the engine in this process instead of the server")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving.jsonl", help="JSON Lines file to append to")
    options = parser.parse_args(arguments)
    for name in ("streams", "max_tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--compare" in given:
        given.remove("--compare")
        compare.main(given)
        return
    end_cleanly()
    options = parse(given)
    load = os.getloadavg()[0]
    disable_progress_bar()
    if options.model == str(DEMO_BASE):
        build_demo_base(DEMO_BASE)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if options.random_adapters:
            adapters = AdapterMaker(options.model, options.seed).make(options.random_adapters, Path(folder))
        else:
            adapters = find_adapters(options.adapters)
        settings = Settings(
            model=Path(options.model).name,
            adapters=tuple(adapters),
            streams=options.streams,
            max_tokens=options.max_tokens,
            rounds=options.rounds,
            dtype=options.dtype,
            seed=options.seed,
            transport="offline" if options.offline else "http",
        )
        jobs = make_jobs(settings.adapters, settings.streams, settings.seed)

        peft = Peft(options.model, adapters, getattr(torch, settings.dtype))
        offline = Offline(options.model, adapters, settings.dtype)
        correctness = offline.check(jobs, settings.max_tokens, peft, settings.dtype)
        print("correct:", json.dumps(correctness), flush=True)

        ours: Served = offline
        if not options.offline:
            offline.close()
            del offline
            log = Path(folder) / "server.log"
            ours = stack.enter_context(
                running_server(
                    options.model, log, adapters=adapters, dtype=settings.dtype, options=for_streams(options)
                )
            )

        def run(served: Served, index: int, *, on_base: bool = False) -> Run:
            """One round, on prompts that no other round has."""
            jobs = make_jobs(settings.adapters, settings.streams, settings.seed + 1 + index)
            run = served.run([Job(prompt=job.prompt) for job in jobs] if on_base else jobs, settings.max_tokens)
            if run.tokens != settings.streams * settings.max_tokens:
                raise SystemExit(f"bench: {run.tokens} tokens came, not {settings.streams * settings.max_tokens}")
            return run

        for served in (ours, peft):
            served.run(jobs, 4)
        ways = {
            "mixed": lambda index: run(ours, index),
            "base": lambda index: run(ours, index, on_base=True),
            "peft": lambda index: run(peft, index),
        }
        series = measure(ways, settings.rounds)

    print_table(series)
    result = {
        "bench": "serving",
        **surroundings(load),
        "settings": asdict(settings),
        "correctness": correctness,
        **{name: one.summary() for name, one in series.items()},
        "ratios": {"mixed/base": ratio(series, "mixed", "base"), "mixed/peft": ratio(series, "mixed", "peft")},
    }
    write_result(options.results, result)


def for_streams(options: argparse.Namespace) -> list[str]:
    """Options of our server, so that all streams fit into one batch."""
    return ["--max-num-seqs", str(max(64, options.streams))]


if __name__ == "__main__":
    main()
