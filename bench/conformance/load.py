"""Load generators that others wrote, and our own `/metrics`: do both say the same of the same requests?

In: the demo base and a demo adapter, which all requests name. Out: one JSON line with what the generator reports and what our
metrics gained meanwhile: requests and tokens, which must be equal, and of three latencies the median, which must agree to a
tenth, and the mean.

Prometheus keeps no single observations. The mean is exact (sum over count); the median is `histogram_quantile` of what the
buckets gained, interpolated as Prometheus does, and can be off by as much as buckets are apart.

What the generators call inter-token latency is the mean gap of a request, of which they take the median over requests: that is
our `request_time_per_output_token_seconds`. Its mean is compared with `inter_token_latency_seconds`, over gaps: all requests
have as many.

The server computes with one thread, so that the generator has a core: our CPU kernels do not share cores gladly, and how fast
they are is not asked here.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from urllib.request import urlopen

from conformance.environments import ENVIRONMENTS
from harness import RESULTS, make_jobs, running_server, surroundings, write_result
from models import DEMO_BASE
from prometheus_client.parser import text_string_to_metric_families

from perft.demo_base import build_demo_base

ADAPTER = "sql"
TOLERANCE = 0.1
TOOLS = ("guidellm", "aiperf")
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 32
SEED = 0

# Sample's name and `le` (or nothing) to what it gained
Gains = Mapping[tuple[str, str], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Seconds: of a request's first token, between tokens, or of a whole request."""

    median: float
    mean: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What somebody says of all requests together.

    Args:
        counts: requests, tokens.
        latencies: by name.
    """

    counts: Mapping[str, int]
    latencies: Mapping[str, Latency]


def run(*, tool: str, adapter: Path, requests: int, streams: int) -> None:
    """Lets a load generator send `requests`, `streams` at a time, and compares.

    Raises:
        SystemExit: the accounts differ.
    """
    environment = ENVIRONMENTS[tool]
    environment.require()
    build_demo_base(DEMO_BASE)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="conformance") as temporary:
        folder = Path(temporary)
        with running_server(
            str(DEMO_BASE), folder / "log", adapters={ADAPTER: adapter}, environ={"OMP_NUM_THREADS": "1"}
        ) as server:
            # What is done once is not what is compared: the adapter's loading, the recording of programs
            server.run(make_jobs([ADAPTER], 3 * streams, seed=SEED), 8, streams)
            before = scrape(server.url)
            report = {"guidellm": _guidellm, "aiperf": _aiperf}[tool](server.url, folder, requests, streams)
            after = scrape(server.url)
    ours = account({sample: value - before.get(sample, 0) for sample, value in after.items()})
    theirs = Account(
        counts={name: report.counts[name] for name in ours.counts if name in report.counts}, latencies=report.latencies
    )
    off = {
        name: {
            kind: round(getattr(ours.latencies[name], kind) / getattr(latency, kind) - 1, 4)
            for kind in ("median", "mean")
        }
        for name, latency in theirs.latencies.items()
    }
    result = {
        "bench": tool,
        **surroundings(load),
        "tools": environment.versions(),
        "settings": {
            "adapter": ADAPTER,
            "requests": requests,
            "streams": streams,
            "prompt_tokens": PROMPT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "server_threads": 1,
            "tolerance": TOLERANCE,
        },
        "counts": {name: {"theirs": count, "ours": ours.counts[name]} for name, count in theirs.counts.items()},
        "seconds": {
            name: {"theirs": _rounded(latency), "ours": _rounded(ours.latencies[name])}
            for name, latency in theirs.latencies.items()
        },
        "ours_off_by": off,
    }
    write_result(RESULTS / "conformance.jsonl", result)
    wrong = [name for name, count in theirs.counts.items() if count != ours.counts[name]]
    wrong += [name for name, each in off.items() if abs(each["median"]) > TOLERANCE]
    if theirs.counts["requests"] != requests:
        wrong.append("number of requests")
    if wrong:
        raise SystemExit(f"conformance: {tool} and /metrics differ on {', '.join(wrong)}")


def scrape(url: str) -> Gains:
    """The samples of `/metrics` that have no label, and those of `ADAPTER` under `NAME@`; buckets by their bound."""
    with urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            bound = labels.pop("le", "")
            if labels.get("adapter") == ADAPTER:
                key = f"{sample.name}@", bound
            elif "adapter" in labels or family.name.startswith("perft_http"):
                continue
            else:
                key = sample.name, bound
            found[key] = found.get(key, 0) + sample.value  # over what is left of the labels
    return found


def account(gains: Gains) -> Account:
    """What our metrics say of the requests between two scrapes."""

    def latency(name: str, mean_of: str) -> Latency:
        mean = gains[f"perft_{mean_of}_sum", ""] / gains[f"perft_{mean_of}_count", ""]
        buckets = [
            (float(bound), count) for (sample, bound), count in gains.items() if sample == f"perft_{name}_bucket"
        ]
        return Latency(median=histogram_quantile(0.5, buckets), mean=mean)

    return Account(
        counts={
            "requests": int(gains["perft_request_success_total", ""]),
            "output_tokens": int(gains["perft_generation_tokens_total", ""]),
            "prompt_tokens": int(gains["perft_prompt_tokens_total", ""]),
            "requests_of_the_adapter": int(gains["perft_adapter_requests_total@", ""]),
            "output_tokens_of_the_adapter": int(gains["perft_adapter_generation_tokens_total@", ""]),
        },
        latencies={
            "time_to_first_token": latency("time_to_first_token_seconds", "time_to_first_token_seconds"),
            "inter_token_latency": latency("request_time_per_output_token_seconds", "inter_token_latency_seconds"),
            "request_latency": latency("e2e_request_latency_seconds", "e2e_request_latency_seconds"),
        },
    )


def histogram_quantile(quantile: float, buckets: Sequence[tuple[float, float]]) -> float:
    """As Prometheus computes it: linear between the bounds of the bucket in which it lies, the lowest from zero on.

    Args:
        buckets: upper bound and cumulative count.
    """
    ordered = sorted(buckets)
    rank = quantile * ordered[-1][1]
    lower, below = 0.0, 0.0
    for upper, count in ordered:
        if count >= rank:
            if upper == inf:
                return lower
            return lower + (upper - lower) * (rank - below) / (count - below)
        lower, below = upper, count
    raise AssertionError("the last bucket has all")


def _guidellm(url: str, folder: Path, requests: int, streams: int) -> Account:
    output = folder / "guidellm.json"
    command = [
        *(str(ENVIRONMENTS["guidellm"].bin / "guidellm"), "run"),
        *("--backend", f"kind=openai_http,target={url},model={ADAPTER},request_format=/v1/completions"),
        *("--profile", f"kind=concurrent,streams={streams}", "--constraint", f"kind=max_requests,count={requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={DEMO_BASE}", "--seed", f"kind=static,value={SEED}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
        *("--output", f"kind=json,path={output}", "--disable-console-interactive"),
    ]
    _run(command, folder, {"HF_HUB_OFFLINE": "1"})
    return read_guidellm(output)


def read_guidellm(output: Path) -> Account:
    """What its report says."""
    (benchmark,) = json.loads(output.read_text())["benchmarks"]
    metrics = {name: each["successful"] for name, each in benchmark["metrics"].items() if "successful" in (each or {})}

    def latency(name: str, unit: float) -> Latency:
        return Latency(median=metrics[name]["median"] * unit, mean=metrics[name]["mean"] * unit)

    done, tokens = metrics["request_totals"], int(metrics["output_token_count"]["total_sum"])
    return Account(
        counts={
            "requests": done,
            "output_tokens": tokens,
            "prompt_tokens": int(metrics["prompt_token_count"]["total_sum"]),
            "requests_of_the_adapter": done,
            "output_tokens_of_the_adapter": tokens,
        },
        latencies={
            "time_to_first_token": latency("time_to_first_token_ms", 1e-3),
            "inter_token_latency": latency("inter_token_latency_ms", 1e-3),
            "request_latency": latency("request_latency", 1.0),
        },
    )


def _aiperf(url: str, folder: Path, requests: int, streams: int) -> Account:
    command = [
        *(str(ENVIRONMENTS["aiperf"].bin / "aiperf"), "profile", "--model", ADAPTER, "--url", url),
        *("--endpoint-type", "completions", "--streaming", "--tokenizer", str(DEMO_BASE), "--ui", "simple"),
        *("--concurrency", str(streams), "--request-count", str(requests), "--random-seed", str(SEED)),
        *("--synthetic-input-tokens-mean", str(PROMPT_TOKENS), "--output-tokens-mean", str(OUTPUT_TOKENS)),
        *("--extra-inputs", "ignore_eos:true", "--use-server-token-count"),
        *("--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", str(folder / "aiperf")),
    ]
    _run(command, folder, {})
    return read_aiperf(folder / "aiperf" / "profile_export_aiperf.json")


def read_aiperf(output: Path) -> Account:
    """What its report says; it names tokens it has counted itself otherwise than those it was told of."""
    report = json.loads(output.read_text())

    def latency(name: str) -> Latency:
        return Latency(median=report[name]["p50"] / 1000, mean=report[name]["avg"] / 1000)

    done, tokens = int(report["request_count"]["avg"]), int(report["total_osl"]["avg"])
    return Account(
        counts={
            "requests": done,
            "output_tokens": tokens,
            "prompt_tokens": int(report["total_usage_prompt_tokens"]["avg"]),
            "requests_of_the_adapter": done,
            "output_tokens_of_the_adapter": tokens,
        },
        latencies={name: latency(name) for name in ("time_to_first_token", "inter_token_latency", "request_latency")},
    )


def _run(command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
    """Runs a generator.

    Raises:
        SystemExit: it has failed.
    """
    # aiperf takes a tokenizer's folder for a name on the Hub when it is told to stay offline
    left_out = ("PYTHONPATH", "HF_HUB_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(command, cwd=folder, env={**kept, **environ}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"conformance: {Path(command[0]).name} has failed:\n{(done.stdout + done.stderr)[-4000:]}")


def _rounded(latency: Latency) -> dict[str, float]:
    return {"median": round(latency.median, 5), "mean": round(latency.mean, 5)}
