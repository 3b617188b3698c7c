"""What adapters cost, over HTTP, on our server: mixed, unused, switched, many more than fit, and cold.

In: a base model (the demo base unless told); random adapters are made for it. Out: a table and a JSON line in
`bench/results/adapter_costs.jsonl` for each of

    mixed        every stream on an adapter of its own, PERFT-R and PERFT-E, against the same server's base (1, 8, 32 streams);
                 and the base of a server with adapters, none used, against that of a server without
    switching    32 adapters, one request each: ours in one batch against Transformers + PEFT, one adapter after the other
    zipf         2,000 registered names, Zipf(1.0) traffic, room for 64: against 10 names, and against room for all of them
    working-set  64, 65, 96 and 128 adapters asked for in turn, room for 64: is there a cliff?
    cold         first token of a request on an adapter that was never read, against a resident one, while others decode; and
                 the others' gaps between tokens

`mixed` and `switching` check first that our tokens are those of the PEFT model, in float32 (`in_process.py`); the rest uses
the same server.
The adapters of zipf and working-set have rank 4 and bf16 rows, M 4, all layers (1.2 MB each on the demo base): half a demo
adapter, so that 2,000 take 2.5 GB of disk. All their contents differ: equal ones would share memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import (
    CACHE,
    RESULTS,
    Client,
    Job,
    Reply,
    Run,
    Sent,
    Series,
    StreamError,
    comma_separated,
    end_cleanly,
    make_jobs,
    measure,
    milliseconds,
    print_table,
    ratio,
    running_server,
    surroundings,
    write_result,
)
from in_process import Offline, Peft
from models import AdapterMaker, find_model, num_bytes_of
from transformers.utils.logging import disable_progress_bar

DTYPE = "bfloat16"
ARENA = 64  # adapters that the arena of zipf and working-set holds
SMALL_RANK = 4
FEW = 10
NUM_CHECKED = 8
PROBE_TOKENS = 4
BACKGROUND_TOKENS = 64
PROBE_PAUSE = 0.25  # seconds between a probe's end and the next
METRICS = "perft_adapter"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What every part is told."""

    options: argparse.Namespace
    model: str
    maker: AdapterMaker
    folder: Path

    def server(
        self, name: str, *, adapters: Mapping[str, Path] | None = None, options: Sequence[str] = ()
    ) -> contextlib.AbstractContextManager[Client]:
        """Our server on the model, with room for all streams in one batch."""
        seats = ["--max-num-seqs", str(max(64, 2 * max(self.options.concurrency)))]
        log = self.folder / f"{name}.log"
        return running_server(self.model, log, adapters=adapters, dtype=DTYPE, options=[*seats, *options])

    def memory(self, num_adapters: int, r: int) -> list[str]:
        """Options for an arena that holds so many adapters of rank `r`, and not one more."""
        return ["--adapter-memory", str((2 * num_adapters + 1) * self.maker.num_bytes(r=r) // 2)]

    def jobs(self, adapters: Sequence[str | None], count: int, *seed: object) -> list[Job]:
        """Prompts that no other part, way or round asks."""
        return make_jobs(adapters, count, random.Random(repr((self.options.seed, *seed))).randrange(1 << 40))

    def check(self, adapters: Iterable[tuple[str, Path]]) -> dict[str, float]:
        """Our tokens on these adapters against the PEFT model's.

        In float32: in bf16 a base with many experts has near ties in its router, which fall either way, and a bound that
        allows for that allows for errors too.
        """
        given = dict(adapters)
        offline = Offline(self.model, given, "float32")
        try:
            peft = Peft(self.model, given, torch.float32)
            found = offline.check(self.jobs(list(given), len(given), "check"), 16, peft, "float32")
        finally:
            offline.close()
        print("correct:", json.dumps(found), flush=True)
        return found


def mixed(bench: Bench) -> Iterator[dict[str, Any]]:
    """Number 2: adapters in use, and adapters that are there but not in use."""
    options = bench.options
    count = max(options.concurrency)
    kinds = {kind: bench.maker.make(count, bench.folder / kind, variant=kind) for kind in ("R", "E")}
    everything = {name: path for made in kinds.values() for name, path in made.items()}
    correctness = bench.check(item for made in kinds.values() for item in islice(made.items(), NUM_CHECKED // 2))
    with bench.server("with", adapters=everything) as ours, bench.server("without") as without:
        for streams in options.concurrency:
            print(f" {streams} streams", flush=True)
            requests = max(4, streams * options.requests_per_stream)

            def run(client: Client, adapters: Sequence[str | None], index: int) -> Run:
                client.run(bench.jobs(adapters, streams, "warm", index), 2)  # noqa: B023 - called within the loop
                jobs = bench.jobs(adapters, requests, streams, index)  # noqa: B023
                return client.run(jobs, options.max_tokens, streams)  # noqa: B023

            ways = {f"mixed {kind}": partial(run, ours, list(made)[:streams]) for kind, made in kinds.items()}
            ways |= {"base": partial(run, ours, [None]), "without adapters": partial(run, without, [None])}
            series = measure(ways, options.rounds)
            print_table(series)
            ratios = {f"{way}/base": ratio(series, way, "base") for way in ("mixed R", "mixed E")}
            ratios["base/without adapters"] = ratio(series, "base", "without adapters")
            yield {
                "correctness": correctness,
                **_settings(bench, streams=streams, requests=requests, max_tokens=options.max_tokens, r=8),
                **{name: one.summary() for name, one in series.items()},
                "ratios": ratios,
            }


def switching(bench: Bench) -> Iterator[dict[str, Any]]:
    """Number 3: one request on each of many adapters."""
    options = bench.options
    count = max(options.concurrency)
    adapters = bench.maker.make(count, bench.folder / "R")
    correctness = bench.check(islice(adapters.items(), NUM_CHECKED))
    peft = Peft(bench.model, adapters, getattr(torch, DTYPE))
    with bench.server("ours", adapters=adapters) as ours:
        names = list(adapters)
        for served in (ours, peft):
            served.run(bench.jobs(names, count, "warm"), 2)
        ways = {
            "ours": lambda index: ours.run(bench.jobs(names, count, index), options.max_tokens),
            "peft": lambda index: peft.run(bench.jobs(names, count, index), options.max_tokens),
        }
        series = measure(ways, options.rounds)
    print_table(series)
    yield {
        "correctness": correctness,
        **_settings(bench, streams=count, requests=count, max_tokens=options.max_tokens, r=8),
        **{name: one.summary() for name, one in series.items()},
        "ratios": {"ours/peft": ratio(series, "ours", "peft")},
    }


def zipf(bench: Bench) -> Iterator[dict[str, Any]]:
    """Number 4, first half: many more adapters than fit."""
    options = bench.options
    streams, requests = max(options.concurrency), options.requests
    made = bench.maker.make(options.names, bench.folder / "many", r=SMALL_RANK)
    print(f"  {len(made)} adapters, {num_bytes_of(made) / 1e9:.2f} GB on disk", flush=True)
    names = list(made)
    random.Random(options.seed).shuffle(names)
    few = names[:FEW]
    (bench.folder / "few").mkdir()
    for name in few:
        (bench.folder / "few" / name).symlink_to(made[name], target_is_directory=True)
    all_of_them = len(names) * bench.maker.num_bytes(r=SMALL_RANK)
    host = ["--host-adapter-memory", str(options.host_adapter_memory or 2 * all_of_them)]

    def traffic(asked: Sequence[str], *seed: object) -> list[Job]:
        weights = [1 / (rank + 1) for rank in range(len(asked))]
        chosen = random.Random(repr((options.seed, *seed))).choices(asked, weights, k=requests)
        return bench.jobs(chosen, requests, "zipf", *seed)

    many = ["--adapter-dir", str(bench.folder / "many"), *host]
    with contextlib.ExitStack() as stack:
        few_names = f"{FEW} names"
        room_for_all = f"{len(names)} names, room for all"
        room_for_some = f"{len(names)} names, room for {ARENA}"
        clients = {
            few_names: bench.server(
                "few", options=["--adapter-dir", str(bench.folder / "few"), *bench.memory(ARENA, SMALL_RANK), *host]
            ),
            room_for_all: bench.server("all", options=[*many, *bench.memory(len(names) + 1, SMALL_RANK)]),
            room_for_some: bench.server("some", options=[*many, *bench.memory(ARENA, SMALL_RANK)]),
        }
        servers = {name: stack.enter_context(server) for name, server in clients.items()}
        asked = {few_names: few, room_for_all: names, room_for_some: names}
        # resident means resident; where only some fit, the traffic itself brings what it brings
        servers[few_names].run(bench.jobs(few, len(few), "warm"), 1, streams)
        servers[room_for_all].run(bench.jobs(names, len(names), "warm"), 1, streams)
        servers[room_for_some].run(traffic(names, "warm"), 1, streams)
        before = servers[room_for_some].counters(METRICS)

        def run(name: str, index: int) -> Run:
            return servers[name].run(traffic(asked[name], index), options.zipf_tokens, streams)

        series = measure({name: partial(run, name) for name in servers}, options.rounds)
        after = servers[room_for_some].counters(METRICS)
    print_table(series)
    yield {
        **_settings(bench, streams=streams, requests=requests, max_tokens=options.zipf_tokens, r=SMALL_RANK),
        **{name: one.summary() for name, one in series.items()},
        "counters": _difference(before, after),
        "ratios": {
            f"{room_for_some}/{few_names}": ratio(series, room_for_some, few_names),
            f"{room_for_some}/{room_for_all}": ratio(series, room_for_some, room_for_all),
            **{
                f"p99 TTFT {room_for_some}/{other}": _p99_ratio(series, room_for_some, other)
                for other in (room_for_all, few_names)
            },
        },
    }


def working_set(bench: Bench) -> Iterator[dict[str, Any]]:
    """Number 4, second half: a little more than fits, in the order that is worst for an LRU."""
    options = bench.options
    streams, requests = max(options.concurrency), options.requests
    sizes = (ARENA, ARENA + 1, ARENA * 3 // 2, ARENA * 2)
    folder = bench.folder / "many"
    names = list(bench.maker.make(max(sizes), folder, r=SMALL_RANK))
    with bench.server("ours", options=["--adapter-dir", str(folder), *bench.memory(ARENA, SMALL_RANK)]) as ours:
        ours.run(bench.jobs(names, len(names), "warm"), 1, streams)  # all of them in host memory
        moved: dict[str, float] = {}

        def run(size: int, index: int) -> Run:
            ours.run(bench.jobs(names[:size], size, "warm", size, index), 1, streams)
            before = ours.counters(METRICS)
            run = ours.run(bench.jobs(names[:size], requests, size, index), options.zipf_tokens, streams)
            for name, value in _difference(before, ours.counters(METRICS)).items():
                moved[f"{size}: {name}"] = moved.get(f"{size}: {name}", 0) + value
            return run

        series = measure({f"{size} adapters": partial(run, size) for size in sizes}, options.rounds)
    print_table(series)
    first, *others = series
    yield {
        **_settings(bench, streams=streams, requests=requests, max_tokens=options.zipf_tokens, r=SMALL_RANK),
        **{name: one.summary() for name, one in series.items()},
        "counters": moved,
        "ratios": {
            **{f"{other}/{first}": ratio(series, other, first) for other in others},
            **{f"p99 TTFT {other}/{first}": _p99_ratio(series, other, first) for other in others},
        },
    }


def cold(bench: Bench) -> Iterator[dict[str, Any]]:
    """Number 5: loading while others decode. Demo-size adapters (R, M 4, r 8), dropped from the system's file cache."""
    options = bench.options
    folder = bench.folder / "many"
    made = bench.maker.make(2 * options.cold_streams + options.probes * options.rounds, folder)
    names = list(made)
    background, names = names[: options.cold_streams], names[options.cold_streams :]
    resident, never_read = names[: options.cold_streams], names[options.cold_streams :]
    found: dict[str, list[Reply]] = {way: [] for way in ("warm", "cold")}
    gaps: dict[str, list[list[float]]] = {way: [] for way in ("quiet", "warm", "cold")}
    with bench.server("ours", options=["--adapter-dir", str(folder)]) as ours:
        ours.run(bench.jobs(background + resident, 2 * options.cold_streams, "warm"), 2)
        for index in range(options.rounds):
            start = index * options.probes
            ways = {
                "quiet": list[Job](),
                "warm": bench.jobs(resident, options.probes, "warm", index),
                "cold": bench.jobs(never_read[start : start + options.probes], options.probes, "cold", index),
            }
            turn = index % len(ways)
            for way in [*list(ways)[turn:], *list(ways)[:turn]]:
                for job in ways[way] if way == "cold" else ():
                    _forget(made[job.adapter or ""])
                others = bench.jobs(background, 10_000, "background", index, way)
                probed, rest = _probe(ours, others, options.cold_streams, ways[way], options.probes)
                gaps[way].append(sorted(gap for reply in rest for gap in reply.gaps))
                if way in found:
                    found[way] += probed
                print(
                    f"  round {index + 1}  {way:<6} others' p99 gap {milliseconds(gaps[way][-1], 0.99)} ms"
                    + (f", first token {1000 * median(reply.first for reply in probed):.1f} ms" if probed else ""),
                    flush=True,
                )
        counters = ours.counters(METRICS)
    first = {way: sorted(reply.first for reply in replies) for way, replies in found.items()}
    added = {
        name: round((milliseconds(first["cold"], at) or 0) - (milliseconds(first["warm"], at) or 0), 2)
        for name, at in (("p50", 0.5), ("p99", 0.99))
    }
    p99 = {way: [milliseconds(each, 0.99) or 0.0 for each in rounds] for way, rounds in gaps.items()}
    print(f"\na cold load adds {added['p50']} ms to the first token (p50), {added['p99']} ms (p99)")
    yield {
        **_settings(bench, streams=options.cold_streams, requests=options.probes, max_tokens=PROBE_TOKENS, r=8),
        "ttft_ms": {
            way: {"p50": milliseconds(each, 0.5), "p99": milliseconds(each, 0.99)} for way, each in first.items()
        },
        "cold_adds_ms": added,
        "others_itl_p99_ms": p99,
        "counters": counters,
        "ratios": {
            f"others' p99 ITL cold/{other}": round(
                median(a / b for a, b in zip(p99["cold"], p99[other], strict=True)), 3
            )
            for other in ("warm", "quiet")
        },
    }


def _probe(
    client: Client, others: Sequence[Job], streams: int, probes: Sequence[Job], num: int
) -> tuple[list[Reply], list[Reply]]:
    """Sends `probes` one after the other (none: waits as long as some would take) while `streams` streams decode.

    Returns:
        The probes' replies, and the others'.
    """

    async def drive() -> tuple[list[Sent], list[Sent]]:
        waiting, done = iter(others), asyncio.Event()
        probed: list[Sent] = []
        rest: list[Sent] = []

        async def decode() -> None:
            while not done.is_set():
                rest.append(await client.send(next(waiting), BACKGROUND_TOKENS))

        tasks = [asyncio.create_task(decode()) for _ in range(streams)]
        await asyncio.sleep(1)
        for probe in probes:
            probed.append(await client.send(probe, PROBE_TOKENS))
            await asyncio.sleep(PROBE_PAUSE)
        if not probes:
            await asyncio.sleep(num * 2 * PROBE_PAUSE)
        done.set()
        await asyncio.gather(*tasks)
        return probed, rest

    try:
        probed, rest = asyncio.run(drive())
        return [sent.reply() for sent in probed], [sent.reply() for sent in rest]
    except StreamError as error:
        raise SystemExit(f"bench: {error}") from error


def _forget(folder: Path) -> None:
    """Has the system drop a folder's files from its cache, where it can be asked to: to read them is to read the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _settings(bench: Bench, *, streams: int, requests: int, max_tokens: int, r: int) -> dict[str, Any]:
    return {
        "settings": {
            "model": bench.options.model,
            "dtype": DTYPE,
            "streams": streams,
            "requests": requests,
            "max_tokens": max_tokens,
            "rounds": bench.options.rounds,
            "adapter": {"variant": "R", "num_experts": 4, "top_k": 2, "r": r, "num_bytes": bench.maker.num_bytes(r=r)},
            "seed": bench.options.seed,
        }
    }


def _p99_ratio(series: Mapping[str, Series], one: str, other: str) -> float:
    first, second = (series[name].summary()["ttft_ms"]["p99"] for name in (one, other))
    return round(first / second, 3)


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """How far counters went on."""
    return {
        name: round(value - before.get(name, 0), 6)
        for name, value in after.items()
        if name.endswith(("_total", "_sum"))
    }


PARTS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "mixed": mixed,
    "switching": switching,
    "zipf": zipf,
    "working-set": working_set,
    "cold": cold,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What adapters cost on our server.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--model", default="S", help="S, R or a model folder")
    parser.add_argument(
        "--concurrency", type=comma_separated, default=["1", "8", "32"], help="of mixed; the rest: the most"
    )
    parser.add_argument("--max-tokens", type=int, default=48, help="of a request in mixed and switching")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests-per-stream", type=int, default=2, help="mixed: one after the other")
    parser.add_argument("--requests", type=int, default=192, help="zipf, working-set: requests in a round")
    parser.add_argument("--zipf-tokens", type=int, default=16, help="zipf, working-set: output tokens of each")
    parser.add_argument("--names", type=int, default=2000, help="zipf: registered names")
    parser.add_argument(
        "--host-adapter-memory", type=int, default=0, help="zipf: bytes (default: enough for all names)"
    )
    parser.add_argument("--cold-streams", type=int, default=8, help="cold: streams that decode meanwhile")
    parser.add_argument("--probes", type=int, default=16, help="cold: requests a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "adapter_costs.jsonl", help="JSON Lines file to append to"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    try:
        options.concurrency = [int(text) for text in options.concurrency]
    except ValueError:
        parser.error("--concurrency takes numbers, such as 1,8,32")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts that are asked for."""
    end_cleanly()
    options = parse(arguments)
    load = os.getloadavg()[0]
    disable_progress_bar()
    model = str(find_model(options.model).folder)
    around = surroundings(load)
    scratch = CACHE / "bench"
    scratch.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        print(f"\n{part}", flush=True)
        with tempfile.TemporaryDirectory(dir=scratch, prefix="adapters-") as folder:
            maker = AdapterMaker(model, options.seed)
            bench = Bench(options=options, model=model, maker=maker, folder=Path(folder))
            for found in PARTS[part](bench):
                write_result(options.results, {"bench": f"adapter-costs/{part}", **around, **found})


if __name__ == "__main__":
    main()
