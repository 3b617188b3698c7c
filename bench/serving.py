"""Serving benchmark: requests on mixed adapters, against the same requests on the base alone and against Transformers + PEFT.

In: a base model and adapters (the demo's unless told). Out: a table, and one JSON line that is printed and appended to
`bench/results/serving.jsonl`. Three ways of serving the same prompts, greedily, every stream to its full length:

    mixed   our server, each stream on an adapter of its own, all in one batch
    base    our server, the same requests on the base model
    peft    Transformers' `generate` on the PEFT model, one adapter at a time: a batch per adapter, `set_adapter` between

First it checks that the tokens are right: the PEFT model, fed what our engine generated, must find each token (nearly) the
likeliest and as probable as our engine said, and much less so without the adapter. Then the three take turns, round by
round in changing order, because the machine is noisy; a ratio is the median of the rounds' ratios.
It does not know how the engine works: only the public faces (`LLM`, the HTTP server) are used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, Protocol

import httpx
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import perft
from perft.adapter import LayerTensors, write_adapter
from perft.base import load_skeleton
from perft.demo_base import build_demo_base
from perft.moe import find_moe_blocks
from perft_serve import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
DEMO_BASE = ROOT / ".cache" / "smolmixtral"
RESULTS = ROOT / "bench" / "results" / "serving.jsonl"

# How far the engine may be from the PEFT model in one dtype, as log-probability: bf16 rounds a logit of 20 to 0.06.
MAX_GAP = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
MAX_MEAN_ERROR = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request: a prompt on an adapter (`None`: the base)."""

    prompt: str
    adapter: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One timed pass over all jobs: output tokens, seconds, and what each stream saw, in seconds."""

    tokens: int
    seconds: float
    first: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()

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
        return {
            "output_tokens_per_s": round(median(run.rate for run in self.runs), 2),
            "rounds": [round(run.rate, 2) for run in self.runs],
            "ttft_ms": {"p50": milliseconds(first, 0.5), "p99": milliseconds(first, 0.99)},
            "itl_ms": {"p50": milliseconds(gaps, 0.5), "p99": milliseconds(gaps, 0.99)},
        }


class Served(Protocol):
    """A way of serving: runs all jobs at once and says how long it took."""

    def run(self, jobs: Sequence[Job], max_tokens: int) -> Run: ...


class Peft:
    """Transformers + PEFT, one adapter at a time; also what our tokens are checked against."""

    def __init__(self, model: str, adapters: dict[str, Path], dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # as the engine chooses
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map={"": self.device})
        first, *others = adapters
        self.model = PeftModel.from_pretrained(base, adapters[first], adapter_name=first).eval()
        for name in others:
            self.model.load_adapter(adapters[name], adapter_name=name)

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job], max_tokens: int) -> Run:
        groups: dict[str, list[str]] = {}
        for job in jobs:
            assert job.adapter is not None
            groups.setdefault(job.adapter, []).append(job.prompt)
        tokens, start = 0, time.perf_counter()
        for adapter, prompts in groups.items():
            self.model.set_adapter(adapter)
            inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
            inputs = inputs.to(self.device)
            output = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=max_tokens, min_new_tokens=max_tokens
            )
            tokens += len(prompts) * (output.shape[1] - inputs["input_ids"].shape[1])
        return Run(tokens=tokens, seconds=time.perf_counter() - start)

    @torch.inference_mode()
    def logprobs(self, prompt_ids: Sequence[int], output_ids: Sequence[int], adapter: str | None) -> Tensor:
        """Log-probabilities at each generated position, `[len(output_ids), V]`, float32."""
        if adapter is not None:
            self.model.set_adapter(adapter)
        with contextlib.nullcontext() if adapter is not None else self.model.disable_adapter():
            logits = self.model(input_ids=torch.tensor([[*prompt_ids, *output_ids]], device=self.device)).logits
        return logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1).cpu()


class Offline:
    """Our engine in this process, through `LLM`. No latencies: it gives the finished texts."""

    def __init__(self, model: str, adapters: dict[str, Path], dtype: str) -> None:
        self.llm = LLM(model, adapters={name: str(path) for name, path in adapters.items()}, dtype=dtype)

    def run(self, jobs: Sequence[Job], max_tokens: int) -> Run:
        start = time.perf_counter()
        results = self._generate(jobs, max_tokens)
        return Run(tokens=sum(len(ids) for _, ids, _ in results), seconds=time.perf_counter() - start)

    def _generate(self, jobs: Sequence[Job], max_tokens: int) -> list[tuple[list[int], list[int], list[float]]]:
        """Per job: prompt ids, generated ids, and the log-probability of each generated token."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
        found = []
        for result in self.llm.generate([job.prompt for job in jobs], params, adapter=[job.adapter for job in jobs]):
            output = result.outputs[0]
            assert output.logprobs is not None
            chosen = [at[token] for at, token in zip(output.logprobs, output.token_ids, strict=True)]
            found.append((list(result.prompt_token_ids), list(output.token_ids), chosen))
        return found

    def check(self, jobs: Sequence[Job], max_tokens: int, peft: Peft, dtype: str) -> dict[str, float]:
        """Holds what the engine generates, all jobs in one batch, against the PEFT model.

        Raises:
            SystemExit: the tokens are not the PEFT model's.
        """
        gaps, errors, effects, agreed = [], [], [], []
        for job, (prompt_ids, output_ids, ours) in zip(jobs, self._generate(jobs, max_tokens), strict=True):
            chosen = torch.tensor(output_ids)[:, None]
            theirs_LV = peft.logprobs(prompt_ids, output_ids, job.adapter)
            theirs, without = (
                logprobs_LV.gather(1, chosen)[:, 0]
                for logprobs_LV in (theirs_LV, peft.logprobs(prompt_ids, output_ids, None))
            )
            gaps += (theirs_LV.amax(-1) - theirs).tolist()
            agreed += (theirs_LV.argmax(-1) == chosen[:, 0]).tolist()
            errors += (torch.tensor(ours) - theirs).abs().tolist()
            effects += (without - theirs).abs().tolist()
        found = {
            "argmax_agreement": round(mean(agreed), 4),
            "max_logprob_gap": round(max(gaps), 4),
            "mean_logprob_error": round(mean(errors), 5),
            "mean_logprob_effect_of_adapter": round(mean(effects), 5),
        }
        wrong = max(gaps) > MAX_GAP[dtype] or mean(errors) > MAX_MEAN_ERROR[dtype]
        if wrong or mean(errors) * 2 > mean(effects):
            raise SystemExit(
                f"bench: the engine's tokens are not those of the PEFT model, nothing was measured: {found}"
            )
        return found


class Server:
    """Our server in a process of its own, used over HTTP with streaming, as a client would."""

    def __init__(self, url: str) -> None:
        self.url = url
        models = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]
        self.base = next(model["id"] for model in models if model.get("parent") is None)

    def run(self, jobs: Sequence[Job], max_tokens: int) -> Run:
        return asyncio.run(self._run(jobs, max_tokens))

    async def _run(self, jobs: Sequence[Job], max_tokens: int) -> Run:
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as client:
            start = time.perf_counter()
            runs = await asyncio.gather(*(self._stream(client, job, max_tokens) for job in jobs))
            seconds = time.perf_counter() - start
        return Run(
            tokens=sum(run.tokens for run in runs),
            seconds=seconds,
            first=tuple(value for run in runs for value in run.first),
            gaps=tuple(value for run in runs for value in run.gaps),
        )

    async def _stream(self, client: httpx.AsyncClient, job: Job, max_tokens: int) -> Run:
        body = {
            "model": job.adapter or self.base,
            "prompt": job.prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.perf_counter()
        arrivals, tokens = [], 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise SystemExit(f"bench: {response.status_code} {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise SystemExit(f"bench: {chunk['error']}")
                if chunk["choices"]:
                    arrivals.append(time.perf_counter())
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
        gaps = tuple(later - sooner for sooner, later in pairwise(arrivals))
        return Run(tokens=tokens, seconds=arrivals[-1] - start, first=(arrivals[0] - start,), gaps=gaps)


@contextlib.contextmanager
def running_server(model: str, adapters: dict[str, Path], dtype: str, log: Path) -> Iterator[Server]:
    """Starts `perft-serve serve` on a free port, waits until it is healthy, and stops it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "perft_serve.cli",
        "serve",
        "--model",
        model,
        "--dtype",
        dtype,
        "--port",
        str(port),
    ]
    for name, path in adapters.items():
        command += ["--adapter", f"{name}={path}"]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + 300
            while not is_healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"bench: the server did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.25)
            yield Server(url)
        finally:
            process.terminate()


def is_healthy(url: str) -> bool:
    """Whether the server answers."""
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def make_jobs(adapters: Sequence[str], streams: int, seed: int) -> list[Job]:
    """`streams` different prompts, the adapters dealt out in turn."""
    rng = random.Random(seed)
    jobs = []
    for stream in range(streams):
        prompt = rng.choice(OPENINGS).format(
            who=rng.choice(PEOPLE), place=rng.choice(PLACES), year=rng.randrange(1800, 2000)
        )
        jobs.append(Job(prompt=prompt, adapter=adapters[stream % len(adapters)]))
    return jobs


def make_adapters(model: str, count: int, folder: Path, seed: int) -> dict[str, Path]:
    """`count` random PERFT-R adapters (M 4, k 2, r 8), large enough to change the log-probabilities by some 0.3."""
    blocks = find_moe_blocks(load_skeleton(model))
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for index in range(count):
        config = perft.PerftConfig(variant="R", r=8, num_experts=4, top_k=2, norm_topk=True)
        layers = {}
        for block in blocks:
            shape = (4, config.r, block.hidden_size)
            layers[block.layer] = LayerTensors(
                down_MRD=torch.randn(shape, generator=rng) * block.hidden_size**-0.5,
                up_MRD=torch.randn(shape, generator=rng) * 0.4,
                gate_MD=torch.randn(4, block.hidden_size, generator=rng) * 0.02,
            )
        path = folder / f"random-{index}"
        write_adapter(path, config, layers, {block.layer: block.name for block in blocks})
        made[path.name] = path
    return made


def find_adapters(folder: Path) -> dict[str, Path]:
    """The adapters in a folder's sub-folders, by name."""
    found = {file.parent.name: file.parent for file in sorted(folder.glob("*/adapter_config.json"))}
    if not found:
        raise SystemExit(f"bench: no adapters in {folder}")
    return found


def measure(ways: dict[str, tuple[Served, Sequence[Job]]], settings: Settings) -> dict[str, Series]:
    """All rounds: every way once a round, the order turned by one from round to round."""
    for served, jobs in ways.values():
        served.run(jobs, 4)
    names = list(ways)
    series = {name: Series() for name in names}
    for index in range(settings.rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            served, jobs = ways[name]
            run = served.run(jobs, settings.max_tokens)
            if run.tokens != settings.streams * settings.max_tokens:
                raise SystemExit(
                    f"bench: {name} gave {run.tokens} tokens, not {settings.streams * settings.max_tokens}"
                )
            series[name].runs.append(run)
            print(f"  round {index + 1}  {name:<6} {run.rate:8.1f} tokens/s", flush=True)
    return series


def ratio(series: dict[str, Series], one: str, other: str) -> float:
    """Median over the rounds of rate over rate."""
    pairs = zip(series[one].runs, series[other].runs, strict=True)
    return round(median(first.rate / second.rate for first, second in pairs), 3)


def milliseconds(values: Sequence[float], quantile: float) -> float | None:
    """A quantile of sorted seconds (nearest rank), in milliseconds."""
    return round(1000 * values[min(len(values) - 1, int(quantile * len(values)))], 2) if values else None


def print_table(series: dict[str, Series]) -> None:
    """The result for people."""
    print(f"\n{'':<8}{'tokens/s':>10}{'TTFT p50':>12}{'p99':>9}{'ITL p50':>12}{'p99':>9}   (ms)")
    for name, one in series.items():
        row = one.summary()
        cells = [row["ttft_ms"]["p50"], row["ttft_ms"]["p99"], row["itl_ms"]["p50"], row["itl_ms"]["p99"]]
        a, b, c, d = ("-" if cell is None else f"{cell:.1f}" for cell in cells)
        print(f"{name:<8}{row['output_tokens_per_s']:>10.1f}{a:>12}{b:>9}{c:>12}{d:>9}")


def surroundings(load: float) -> dict[str, Any]:
    """Where the run took place: device, versions, commit, and what else kept the machine busy (`load`) before it."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    packages = ("perft-serve", "torch", "transformers", "peft")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "torch_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else ""),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Mixed adapters against the base alone and Transformers + PEFT.")
    parser.add_argument("--model", default=str(DEMO_BASE), help="base model (default: the demo base, built if missing)")
    parser.add_argument("--adapters", type=Path, default=ROOT / "demo" / "adapters", help="folder of adapter folders")
    parser.add_argument("--random-adapters", type=int, default=0, help="use so many random PERFT-R adapters instead")
    parser.add_argument("--streams", type=int, default=8, help="concurrent requests")
    parser.add_argument("--max-tokens", type=int, default=48, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is measured")
    parser.add_argument("--dtype", choices=sorted(MAX_GAP), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offline", action="store_true", help="use the engine in this process instead of the server")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON Lines file to append to")
    options = parser.parse_args(arguments)
    for name in ("streams", "max_tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    load = os.getloadavg()[0]
    disable_progress_bar()
    if options.model == str(DEMO_BASE):
        build_demo_base(DEMO_BASE)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if options.random_adapters:
            adapters = make_adapters(options.model, options.random_adapters, Path(folder), options.seed)
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
        on_base = [Job(prompt=job.prompt, adapter=None) for job in jobs]

        peft = Peft(options.model, adapters, getattr(torch, settings.dtype))
        offline = Offline(options.model, adapters, settings.dtype)
        correctness = offline.check(jobs, settings.max_tokens, peft, settings.dtype)
        print("correct:", json.dumps(correctness), flush=True)

        ours: Served = offline
        if not options.offline:
            del offline
            log = Path(folder) / "server.log"
            ours = stack.enter_context(running_server(options.model, adapters, settings.dtype, log))
        series = measure({"mixed": (ours, jobs), "base": (ours, on_base), "peft": (peft, jobs)}, settings)

    print_table(series)
    result = {
        "bench": "serving",
        "date": time.strftime("%Y-%m-%d"),
        **surroundings(load),
        "settings": asdict(settings),
        "correctness": correctness,
        **{name: one.summary() for name, one in series.items()},
        "ratios": {"mixed/base": ratio(series, "mixed", "base"), "mixed/peft": ratio(series, "mixed", "peft")},
    }
    line = json.dumps(result)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a") as file:
        file.write(line + "\n")
    print("\n" + line)


if __name__ == "__main__":
    main()
