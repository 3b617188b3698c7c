"""What the benchmarks share: requests, servers in processes of their own, a lean HTTP client, rounds, statistics, results.

In: prompts, adapters, command lines of servers. Out: runs (tokens, seconds, latencies), tables, JSON lines in `bench/results/`.

The client shares the machine with the server it measures, so while requests run it only reads bytes and notes the time; what
they say is parsed when all have ended. It speaks the streaming OpenAI API to any server. It knows no engine and no tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
RESULTS = ROOT / "bench" / "results"
START_TIMEOUT = 300  # seconds that a server may take to start
READ_TIMEOUT = 300  # seconds of silence on a stream after which it counts as broken

PLACES = (
    "harbour",
    "mountain village",
    "old library",
    "railway station",
    "market square",
    "lighthouse",
    "school",
    "farm",
)
PEOPLE = (
    "a young doctor",
    "two brothers",
    "the new teacher",
    "a retired sailor",
    "the baker",
    "an engineer",
    "a painter",
)
OPENINGS = (
    "Write a short story about {who} who came to the {place} in the winter of {year}.",
    "Explain to {who} why the {place} was rebuilt in {year}, and what it cost.",
    "In {year}, {who} kept a diary at the {place}. The first entry reads:",
    "List three questions that {who} would ask on a visit to the {place} in {year}, and answer them.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request: a prompt on an adapter (`None`: the base)."""

    prompt: str
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What came of one request. `arrivals`: when each chunk with text came, on `time.perf_counter`'s clock."""

    job: Job
    start: float
    end: float
    tokens: int
    text: str
    arrivals: tuple[float, ...]

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return (self.arrivals[0] if self.arrivals else self.end) - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks."""
        return [later - sooner for sooner, later in pairwise(self.arrivals)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One timed pass: output tokens, seconds, and what each stream saw, in seconds."""

    tokens: int
    seconds: float
    first: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()
    cpu_seconds: float | None = None

    @classmethod
    def of(cls, replies: Sequence[Reply], cpu_seconds: float | None = None) -> Run:
        """From the first request's start to the last token."""
        return cls(
            tokens=sum(reply.tokens for reply in replies),
            seconds=max(reply.end for reply in replies) - min(reply.start for reply in replies),
            first=tuple(reply.first for reply in replies),
            gaps=tuple(gap for reply in replies for gap in reply.gaps),
            cpu_seconds=cpu_seconds,
        )

    @property
    def rate(self) -> float:
        """Output tokens per second over all streams."""
        return self.tokens / self.seconds


@dataclass(slots=True)
class Series:
    """All rounds of one way of serving."""

    runs: list[Run] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Medians over the rounds; latencies over all streams of all rounds, in milliseconds."""
        first = sorted(value for run in self.runs for value in run.first)
        gaps = sorted(value for run in self.runs for value in run.gaps)
        found: dict[str, Any] = {
            "output_tokens_per_s": round(median(run.rate for run in self.runs), 2),
            "rounds": [round(run.rate, 2) for run in self.runs],
            "ttft_ms": {"p50": milliseconds(first, 0.5), "p99": milliseconds(first, 0.99)},
            "itl_ms": {"p50": milliseconds(gaps, 0.5), "p99": milliseconds(gaps, 0.99)},
        }
        busy = [run.cpu_seconds / run.seconds for run in self.runs if run.cpu_seconds is not None]
        if busy:
            found["cores_used"] = round(median(busy), 2)
        return found


class Process:
    """A server in a process group of its own, with what it starts itself."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environ},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.group = self._process.pid

    def wait_until_healthy(self, url: str) -> None:
        """Returns when `url` answers 200.

        Raises:
            SystemExit: the process ended, or took too long; with the end of its log.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(OSError), urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench: the server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.25)

    def freeze(self) -> None:
        """Stops it where it is: some servers keep a core busy when they have nothing to do."""
        os.killpg(self.group, signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        os.killpg(self.group, signal.SIGCONT)

    def cpu_seconds(self) -> float | None:
        """Processor time that it and all it started have used, of what lives; `None` where there is no /proc."""
        if not Path("/proc/self/stat").exists():
            return None
        parents, ticks = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()  # from the state on: the name may hold spaces
                parents[int(stat.parent.name)] = int(fields[1])
                ticks[int(stat.parent.name)] = int(fields[11]) + int(fields[12])
        family = {self.group}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends it, kindly at first."""
        for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, number)
                os.killpg(self.group, signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        # what the server started may outlive it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)


class StreamError(Exception):
    """A request that did not end as it should: what the server said."""


class Client:
    """Sends requests to an OpenAI server and streams the replies.

    Args:
        url: of the server, `http://HOST:PORT`.
        base: the base model's name in requests.
        route: `/v1/completions` or `/v1/chat/completions`.
        fields: of the body, beside the common ones.
        adapter_fields: what of the body names an adapter (default: the model's name is the adapter's).
        process: the server's, to count its processor time.
    """

    def __init__(
        self,
        url: str,
        base: str,
        *,
        route: str = "/v1/completions",
        fields: Mapping[str, object] | None = None,
        adapter_fields: Callable[[str], Mapping[str, object]] | None = None,
        process: Process | None = None,
    ) -> None:
        self.url = url
        self.base = base
        self.process = process
        self._route = route
        self._fields = {"ignore_eos": True} if fields is None else dict(fields)
        self._adapter_fields = adapter_fields or (lambda name: {"model": name})
        self._host, _, port = url.removeprefix("http://").rpartition(":")
        self._port = int(port)

    def counters(self, prefix: str) -> dict[str, float]:
        """The server's metrics whose names begin so, without labels."""
        with urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.split() for line in lines if line.startswith(prefix) and "{" not in line)
        return {name: float(value) for name, value, *_ in pairs}

    def run(self, jobs: Sequence[Job], max_tokens: int, streams: int | None = None) -> Run:
        """All jobs, `streams` at a time (default: all at once). Every one has to give `max_tokens` tokens.

        Raises:
            SystemExit: one did not.
        """
        before = self.process.cpu_seconds() if self.process else None
        replies = self.replies(jobs, max_tokens, streams)
        after = self.process.cpu_seconds() if self.process else None
        for reply in replies:
            if reply.tokens != max_tokens:
                raise SystemExit(f"bench: a request gave {reply.tokens} tokens, not {max_tokens}")
        return Run.of(replies, None if before is None or after is None else after - before)

    def replies(self, jobs: Sequence[Job], max_tokens: int, streams: int | None = None) -> list[Reply]:
        """The same, each reply by itself, in the order of `jobs`.

        Raises:
            SystemExit: one failed.
        """
        try:
            return asyncio.run(self._all(jobs, max_tokens, streams or len(jobs)))
        except StreamError as error:
            raise SystemExit(f"bench: {error}") from error

    async def _all(self, jobs: Sequence[Job], max_tokens: int, streams: int) -> list[Reply]:
        waiting = iter(enumerate(jobs))
        sent: dict[int, Sent] = {}

        async def work() -> None:
            for index, job in waiting:
                sent[index] = await self.send(job, max_tokens)

        await asyncio.gather(*(work() for _ in range(min(streams, len(jobs)))))
        return [sent[index].reply() for index in range(len(jobs))]

    async def send(self, job: Job, max_tokens: int) -> Sent:
        """One request; returns when the last byte has come."""
        asked: dict[str, object]
        if self._route.endswith("/chat/completions"):
            asked = {"messages": [{"role": "user", "content": job.prompt}]}
        else:
            asked = {"prompt": job.prompt}
        common = {"max_tokens": max_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        named = (
            {"model": self.base} if job.adapter is None else {"model": self.base, **self._adapter_fields(job.adapter)}
        )
        body = json.dumps({**named, **asked, **common, **self._fields}).encode()
        head = (
            f"POST {self._route} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(self._host, self._port)
        reads: list[tuple[float, bytes]] = []
        start = time.perf_counter()
        try:
            writer.write(head.encode() + body)
            while data := await asyncio.wait_for(reader.read(1 << 16), READ_TIMEOUT):
                reads.append((time.perf_counter(), data))
        finally:
            writer.close()
        return Sent(job=job, start=start, reads=reads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A request that has ended, as it came: bytes and when each of them was there."""

    job: Job
    start: float
    reads: list[tuple[float, bytes]]

    def reply(self) -> Reply:
        """What it says.

        Raises:
            StreamError: it is an error.
        """
        data = b"".join(part for _, part in self.reads)
        ends = list(accumulate(len(part) for _, part in self.reads))
        head, _, _ = data.partition(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise StreamError(data.decode(errors="replace")[-2000:] or "no reply")
        is_chunked = b"transfer-encoding: chunked" in head.lower()
        arrivals, texts, tokens = [], [], None
        for position, event in _events(data, len(head) + 4, is_chunked):
            if event == b"[DONE]":
                continue
            chunk = json.loads(event)
            if "error" in chunk:
                raise StreamError(str(chunk["error"]))
            for choice in chunk["choices"]:
                text = choice.get("text") or choice.get("delta", {}).get("content")
                if text:
                    texts.append(text)
                    arrivals.append(self.reads[bisect_left(ends, position)][0])
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            elif "timings" in chunk:  # llama.cpp's way to say it
                tokens = chunk["timings"]["predicted_n"]
        return Reply(
            job=self.job,
            start=self.start,
            end=self.reads[-1][0],
            tokens=len(arrivals) if tokens is None else tokens,
            text="".join(texts),
            arrivals=tuple(arrivals),
        )


def _events(data: bytes, start: int, is_chunked: bool) -> Iterator[tuple[int, bytes]]:
    """The `data:` lines of a stream of server-sent events, each with the number of bytes that had come when it was whole."""
    pieces = _chunks(data, start) if is_chunked else iter([(start, data[start:])])
    line, rest = b"", b""
    for offset, piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            if line.startswith(b"data: "):
                # a chunk is hardly ever larger than an event: its end will do
                yield offset + len(piece), line.removeprefix(b"data: ").strip()


def _chunks(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """The pieces of a chunked body, each with its place in `data`."""
    while True:
        end = data.find(b"\r\n", start)
        size = int(data[start:end].partition(b";")[0], 16) if end >= 0 else 0
        if not size:
            return
        yield end + 2, data[end + 2 : end + 2 + size]
        start = end + 2 + size + 2


def end_cleanly() -> None:
    """Makes a signal to end unwind the stack, so that no server is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_server(
    model: str,
    log: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    dtype: str = "bfloat16",
    options: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Iterator[Client]:
    """Starts `perft-serve serve` on a free port, waits until it is ready, and stops it at the end."""
    port = free_port()
    command = [sys.executable, "-m", "perft_serve.cli", "serve", "--model", model, "--dtype", dtype]
    command += ["--port", str(port), "--served-model-name", "base", *options]
    for name, path in (adapters or {}).items():
        command += ["--adapter", f"{name}={path}"]
    process = Process(command, environ or {}, log)
    try:
        url = f"http://127.0.0.1:{port}"
        process.wait_until_healthy(f"{url}/health")
        yield Client(url, "base", process=process)
    finally:
        process.close()


def make_jobs(adapters: Sequence[str | None], count: int, seed: int) -> list[Job]:
    """`count` different prompts, the adapters dealt out in turn. Each begins with a number of its own: no two share a prefix
    that a cache could use.
    """
    rng = random.Random(seed)
    jobs = []
    for index in range(count):
        text = rng.choice(OPENINGS).format(
            who=rng.choice(PEOPLE), place=rng.choice(PLACES), year=rng.randrange(1800, 2000)
        )
        jobs.append(Job(prompt=f"{rng.randrange(1_000_000)}. {text}", adapter=adapters[index % len(adapters)]))
    return jobs


def measure(ways: Mapping[str, Callable[[int], Run]], rounds: int) -> dict[str, Series]:
    """All rounds: every way once a round, the order turned by one from round to round.

    Args:
        ways: name to a function of the round's number, from which it takes its prompts: no round asks what another asked.
        rounds: how many.
    """
    names = list(ways)
    series = {name: Series() for name in names}
    width = max(map(len, names))
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            run = ways[name](index)
            series[name].runs.append(run)
            print(f"  round {index + 1}  {name:<{width}} {run.rate:8.1f} tokens/s", flush=True)
    return series


def ratio(series: Mapping[str, Series], one: str, other: str) -> float:
    """Median over the rounds of rate over rate."""
    pairs = zip(series[one].runs, series[other].runs, strict=True)
    return round(median(first.rate / second.rate for first, second in pairs), 3)


def milliseconds(values: Sequence[float], quantile: float) -> float | None:
    """A quantile of sorted seconds (nearest rank), in milliseconds."""
    return round(1000 * values[min(len(values) - 1, int(quantile * len(values)))], 2) if values else None


def print_table(series: Mapping[str, Series]) -> None:
    """The result for people."""
    width = max(8, *(len(name) + 2 for name in series))
    print(f"\n{'':<{width}}{'tokens/s':>10}{'TTFT p50':>12}{'p99':>9}{'ITL p50':>12}{'p99':>9}   (ms)")
    for name, one in series.items():
        row = one.summary()
        cells = [row["ttft_ms"]["p50"], row["ttft_ms"]["p99"], row["itl_ms"]["p50"], row["itl_ms"]["p99"]]
        a, b, c, d = ("-" if cell is None else f"{cell:.1f}" for cell in cells)
        print(f"{name:<{width}}{row['output_tokens_per_s']:>10.1f}{a:>12}{b:>9}{c:>12}{d:>9}")


def surroundings(load: float) -> dict[str, Any]:
    """Where the run took place: device, versions, commit, and what else kept the machine busy (`load`) before it."""
    # for versions and device; the client itself needs no tensors
    import torch

    from perft.provenance import package_versions  # also where the project runs without being installed

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu,
        "cores": num_cores(),
        "load_before": round(load, 2),
        "torch_threads": torch.get_num_threads(),
        "versions": package_versions(),
        "commit": commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else ""),
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Appends one line of JSON, and prints it."""
    line = json.dumps(result)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as output:
        output.write(line + "\n")
    print("\n" + line, flush=True)


def comma_separated(text: str) -> list[str]:
    """`a,b,c` as a list, for options."""
    return [part.strip() for part in text.split(",") if part.strip()]
