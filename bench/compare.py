"""`bench/serving.py --compare`: our server, without adapters, against other servers on the same base model, over HTTP.

In: the models S and R (`models.py`), the peers that were set up (`peers.py`). Out: per model and concurrency a table, and
one JSON line in `bench/results/compare.jsonl`: output tokens/s, time to first text, gaps between chunks, ours over the best.

Everybody generates the same number of tokens from the same prompts, greedily, in bf16, with as many threads as there are
cores; no prompt is asked twice. First each peer's greedy text is held against ours: it must serve the same model. All servers
of a model are started once and take turns, round by round in changing order; whoever is not being measured is stopped by a
signal (ours is not: it sleeps when it has nothing to do, and its supervisor would take the stop for a hang).

With `--adapters 4` everything is measured a second time with each stream on one of so many adapters: ours on routed ones
(PERFT-R, `ours`), ours and a peer that can on the same LoRA adapters of the same rank on attention; other peers are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from harness import (
    RESULTS,
    Client,
    Job,
    Process,
    Run,
    Series,
    comma_separated,
    end_cleanly,
    free_port,
    make_jobs,
    measure,
    num_cores,
    print_table,
    ratio,
    running_server,
    surroundings,
    write_result,
)
from models import AdapterMaker, Model, find_model, make_loras
from peers import MAX_MODEL_LEN, PEERS, Peer, convert_lora_to_gguf

OURS = "ours"
OURS_ON_LORA = "ours-lora"
CHECKED_PROMPTS, CHECKED_TOKENS = 16, 16
# Share of the prompts whose text must begin alike: bf16 rounds, and near ties fall either way; another model shares none
MIN_AGREEMENT = 0.5


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="serving.py --compare", description="Our server without adapters against other servers on the same base."
    )
    parser.add_argument(
        "--models", type=comma_separated, default=["S", "R"], help="S, R or model folders (default S,R)"
    )
    parser.add_argument("--concurrency", type=comma_separated, default=["1", "8", "32"], help="default 1,8,32")
    parser.add_argument("--peers", type=comma_separated, default=list(PEERS), help=f"default {','.join(PEERS)}")
    parser.add_argument("--max-tokens", type=int, default=48, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, default=5, help="how often each server is measured")
    parser.add_argument("--requests-per-stream", type=int, default=2, help="one after the other (4 with one stream)")
    parser.add_argument(
        "--adapters", type=int, default=0, help="measure with so many adapters in turn as well (default 0: not)"
    )
    parser.add_argument("--threads", type=int, default=num_cores(), help="for servers that want to be told")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "compare.jsonl", help="JSON Lines file to append to")
    options = parser.parse_args(arguments)
    try:
        options.concurrency = [int(text) for text in options.concurrency]
    except ValueError:
        parser.error("--concurrency takes numbers, such as 1,8,32")
    unknown = sorted(set(options.peers) - set(PEERS))
    if unknown:
        parser.error(f"unknown peers: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if min(options.max_tokens, options.rounds, options.requests_per_stream, *options.concurrency) < 1:
        parser.error("numbers must be at least 1")
    if options.adapters < 0:
        parser.error("--adapters must be at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    end_cleanly()
    options = parse(arguments)
    load = os.getloadavg()[0]
    peers = [PEERS[name] for name in options.peers if PEERS[name].is_there]
    skipped = [name for name in options.peers if not PEERS[name].is_there]
    for name in skipped:
        print(f"{name} is skipped: it is not there (python bench/peers.py setup {PEERS[name].environment})")
    around = {**surroundings(load), "threads": options.threads}
    around["versions"] |= {peer.name: peer.version() for peer in peers}
    for name in options.models:
        compare(find_model(name), peers, skipped, options, around)


def compare(
    model: Model, peers: Sequence[Peer], skipped: Sequence[str], options: argparse.Namespace, around: dict[str, Any]
) -> None:
    """One model: everybody on it, at every concurrency."""
    print(f"\nmodel {model.name}", flush=True)
    slots = max(options.concurrency)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        clients: dict[str, Client] = {}
        adapters = _make_adapters(model, peers, options.adapters, Path(folder))
        for peer in peers:
            clients[peer.name] = stack.enter_context(
                running_peer(
                    peer, model, Path(folder) / f"{peer.name}.log", options.threads, slots, adapters.get(peer.name, {})
                )
            )
            _process(clients[peer.name]).freeze()
        log = Path(folder) / "ours.log"
        settings = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(max(64, slots))]
        ours = stack.enter_context(
            running_server(
                str(model.folder),
                log,
                adapters={**adapters.get(OURS, {}), **adapters.get(OURS_ON_LORA, {})},
                options=settings,
            )
        )
        clients[OURS] = ours

        correctness = {
            peer.name: check(ours, clients[peer.name], peer, seed=options.seed - 1, slots=slots) for peer in peers
        }
        idle = _idle_cores(ours)
        for concurrency in options.concurrency:
            for with_adapters in (False, True) if options.adapters else (False,):
                names = (
                    {name: list(adapters[name]) for name in adapters}
                    if with_adapters
                    else {name: [None] for name in clients}
                )
                print(f" {concurrency} streams{' on adapters' if with_adapters else ''}", flush=True)
                series = _measure({name: clients.get(name, ours) for name in names}, names, concurrency, options)
                print_table(series)
                ratios = {
                    f"{OURS}/{name}": ratio(series, OURS, name) for name in names if name not in (OURS, OURS_ON_LORA)
                }
                on_lora = {}
                if with_adapters:
                    on_lora = {
                        f"{OURS_ON_LORA}/{name}": ratio(series, OURS_ON_LORA, name) for name in names if name in clients
                    }
                result = {
                    "bench": "compare",
                    **around,
                    "settings": {
                        "model": model.name,
                        "concurrency": concurrency,
                        "adapters": options.adapters if with_adapters else 0,
                        "max_tokens": options.max_tokens,
                        "requests": _num_requests(concurrency, options),
                        "rounds": options.rounds,
                        "dtype": "bfloat16",
                        "seed": options.seed,
                    },
                    "skipped": [*skipped, *(set(clients) - set(names))],
                    "correctness": correctness,
                    "idle_cores_ours": idle,
                    **{name: one.summary() for name, one in series.items()},
                    "ratios": {**ratios, **on_lora, f"{OURS}/best peer": min(ratios.values(), default=None)},
                }
                write_result(options.results, result)


def _make_adapters(model: Model, peers: Sequence[Peer], count: int, folder: Path) -> dict[str, dict[str, Path]]:
    """Random adapters of rank 8 for everyone who can serve them, by series and by name: routed ones for us, LoRA for all."""
    if not count:
        return {}
    loras = make_loras(model.folder, count, folder)
    adapters = {OURS: AdapterMaker(model.folder).make(count, folder), OURS_ON_LORA: loras}
    for peer in peers:
        if peer.serves_loras:
            files = {name: folder / f"{name}.gguf" for name in loras}
            for name, file in files.items():
                convert_lora_to_gguf(loras[name], model.portable(), file)
            adapters[peer.name] = files
    return adapters


@contextlib.contextmanager
def running_peer(
    peer: Peer, model: Model, log: Path, threads: int, slots: int, loras: Mapping[str, Path]
) -> Iterator[Client]:
    """A peer's server on a model, until the end of the block."""
    port = free_port()
    folder = model.portable()
    gguf = model.gguf if peer.uses_gguf else Path()
    process = Process(
        [*peer.serve(peer.env, folder, gguf, port, threads, slots), *map(str, loras.values())],
        {"HF_HUB_OFFLINE": "1", **peer.environ},
        log,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        start = time.monotonic()
        process.wait_until_healthy(url + peer.health)
        numbers = list(loras)
        client = Client(
            url,
            peer.model_id or str(folder),
            route="/v1/completions",
            fields=peer.fields,
            adapter_fields=lambda name: {"lora": [{"id": numbers.index(name), "scale": 1.0}]},
            process=process,
        )
        client.run(make_jobs([None], 2, -2), 4)
        print(f"  {peer.name} {peer.version()} serves after {time.monotonic() - start:.0f} s", flush=True)
        yield client
    finally:
        process.close()


def check(ours: Client, theirs: Client, peer: Peer, *, seed: int, slots: int) -> dict[str, float]:
    """Holds a peer's greedy texts against ours.

    Raises:
        SystemExit: it cannot be the same model.
    """
    # Broken off in the middle, so that no text ends at once: told to ignore the end, some servers write it and go on, others
    # write what is second likeliest
    jobs = [Job(prompt=job.prompt[: len(job.prompt) // 2]) for job in make_jobs([None], CHECKED_PROMPTS, seed)]
    expected = [reply.text for reply in ours.replies(jobs, CHECKED_TOKENS)]
    with _awake(theirs):
        # as many as will be measured, so that it is warm
        theirs.run(make_jobs([None], slots, seed - 1), 4)
        found = [reply.text for reply in theirs.replies(jobs, CHECKED_TOKENS)]
    shared = [_num_shared(*pair) for pair in zip(expected, found, strict=True)]
    agreement = mean(length >= 3 for length in shared)
    result = {
        "texts_that_begin_alike": round(agreement, 3),
        "mean_share_alike": round(mean(n / max(1, len(text)) for n, text in zip(shared, expected, strict=True)), 3),
    }
    print(f"  {peer.name} against our text:", result, flush=True)
    if agreement < MIN_AGREEMENT:
        raise SystemExit(
            f"bench: {peer.name} writes something else, nothing was measured:\n  ours: {expected}\n  theirs: {found}"
        )
    return result


def _measure(
    clients: Mapping[str, Client],
    adapters: Mapping[str, Sequence[str | None]],
    concurrency: int,
    options: argparse.Namespace,
) -> dict[str, Series]:
    requests = _num_requests(concurrency, options)

    def run(name: str, index: int) -> Run:
        client = clients[name]
        seed = options.seed + 1000 * concurrency + index
        with contextlib.nullcontext() if name.startswith(OURS) else _awake(client):
            client.run(make_jobs(adapters[name], concurrency, -3 - seed), 2)
            return client.run(make_jobs(adapters[name], requests, seed), options.max_tokens, concurrency)

    return measure({name: partial(run, name) for name in clients}, options.rounds)


def _num_requests(concurrency: int, options: argparse.Namespace) -> int:
    return max(4, concurrency * int(options.requests_per_stream))


def _num_shared(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _process(client: Client) -> Process:
    assert client.process is not None
    return client.process


@contextlib.contextmanager
def _awake(client: Client) -> Iterator[None]:
    """Within the block the server runs; outside it is stopped."""
    _process(client).thaw()
    try:
        yield
    finally:
        _process(client).freeze()


def _idle_cores(client: Client, seconds: float = 2.0) -> float | None:
    """How many cores a server keeps busy with nothing to do."""
    process = _process(client)
    before = process.cpu_seconds()
    time.sleep(seconds)
    after = process.cpu_seconds()
    return None if before is None or after is None else round((after - before) / seconds, 3)
