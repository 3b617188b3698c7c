"""Our OpenAPI document against our server, by schemathesis: whatever fits the document, and whatever does not, by the thousand.

In: how many cases. Out: one JSON line with what was sent and what failed. A case fails if its reply is a 5xx, if the document
does not know its status, its content type or its shape, if what violates the document is accepted, or if a method that is not
in it is not refused as HTTP says.

Names of models are random texts to a fuzzer, and nearly all replies would be a 404; so the document it is given says which
names there are. It leaves out the longest lists that are allowed, which take a fuzzer minutes to make
(`tests/server` sends them). Nothing else is changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from conformance.environments import ENVIRONMENTS
from conformance.tiny import tiny_adapters, tiny_base
from harness import RESULTS, running_server, surroundings, write_result

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance"),
)
CONTEXT = 96  # what is not told to end ends there


def sharpened(document: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The document with the names of models, and without bounds on lists."""
    for kind in ("CompletionRequest", "ChatRequest"):
        document["components"]["schemas"][kind]["properties"]["model"]["enum"] = list(names)
    _unbound(document)
    return document


def _unbound(value: Any) -> None:
    """Leaves out the greatest lengths of lists, wherever they stand in a document."""
    if isinstance(value, dict):
        value.pop("maxItems", None)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _unbound(item)


def run(*, cases: int, seed: int, examples: int, workers: int) -> None:
    """Runs schemathesis, with one seed after the other, until so many cases were sent.

    Args:
        examples: at most so many random cases of each operation in a run.

    Raises:
        SystemExit: something failed.
    """
    environment = ENVIRONMENTS["schemathesis"]
    environment.require()
    totals: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    failures: list[str] = []
    seeds = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="conformance") as temporary:
        folder = Path(temporary)
        adapters = folder / "adapters"
        names = ["base", *tiny_adapters(adapters, 4)] if tiny_base() else []
        options = ["--adapter-dir", str(adapters), "--kv-memory", "64M", "--max-num-seqs", "16", "--device", "cpu"]
        options += ["--max-model-len", str(CONTEXT)]
        with running_server(str(tiny_base()), folder / "log", dtype="float32", options=options) as server:
            with urlopen(f"{server.url}/openapi.json", timeout=30) as answer:
                document = sharpened(json.load(answer), names)
            (folder / "openapi.json").write_text(json.dumps(document))
            # Else it leaves what has failed in a folder `.schemathesis`, and tries that first the next time
            (folder / "schemathesis.toml").write_text("[cache]\nenabled = false\n")
            while totals["cases"] < cases and not failures:
                seeds.append(seed)
                sent = _schemathesis(folder, server.url, seed=seed, examples=examples, workers=workers)
                seed += 1
                totals["cases"] += sum(sent["statuses"].values())
                statuses.update(sent["statuses"])
                failures += sent["failures"]
                print(f"  seed {seeds[-1]}: {totals['cases']} cases, {len(failures)} failures", flush=True)
            with urlopen(f"{server.url}/health", timeout=30) as answer:
                restarts = json.load(answer)["restarts"]
            log = (folder / "log").read_text(errors="replace")
    result = {
        "bench": "fuzz",
        **surroundings(os.getloadavg()[0]),
        "tools": environment.versions(),
        "settings": {"seeds": seeds, "examples": examples, "checks": CHECKS},
        "seconds": round(time.monotonic() - start, 1),
        "cases": totals["cases"],
        "statuses": dict(sorted(statuses.items())),
        "engine_restarts": restarts,
        "tracebacks": log.count("Traceback"),
        "failures": failures[:20],
    }
    write_result(RESULTS / "conformance.jsonl", result)
    if failures or restarts or result["tracebacks"]:
        raise SystemExit(f"conformance: {len(failures)} failures; the server's log ends:\n{log[-3000:]}")


def _schemathesis(folder: Path, url: str, *, seed: int, examples: int, workers: int) -> Mapping[str, Any]:
    """One run: replies by status, and what failed."""
    report = folder / f"report-{seed}.ndjson"
    command = [
        *(str(ENVIRONMENTS["schemathesis"].bin / "schemathesis"), "run", str(folder / "openapi.json"), "--url", url),
        *(
            "--checks",
            ",".join(CHECKS),
            "--max-examples",
            str(examples),
            "--seed",
            str(seed),
            "--workers",
            str(workers),
        ),
        *("--continue-on-failure", "--no-shrink", "--no-color", "--generation-database", "none"),
        *("--suppress-health-check", "all", "--request-timeout", "60", "--phases", "examples,coverage,fuzzing"),
        *("--warnings", "off", "--report", "ndjson", "--report-ndjson-path", str(report)),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    statuses: Counter[str] = Counter()
    for line in report.read_text().splitlines():
        _count(json.loads(line), statuses)
    failures: list[str] = []
    if done.returncode:
        print(done.stdout[-20_000:], done.stderr[-2_000:], flush=True)
        failures = [line for line in done.stdout.splitlines() if line.startswith(("____", "- "))] or ["it has failed"]
    return {"statuses": statuses, "failures": failures}


def _count(value: Any, statuses: Counter[str]) -> None:
    """Counts every reply in an event of the report."""
    if isinstance(value, dict):
        if "status_code" in value and "headers" in value:
            statuses[str(value["status_code"])] += 1
            return
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _count(item, statuses)
