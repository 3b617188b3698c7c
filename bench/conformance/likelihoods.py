"""lm-eval through our server against lm-eval's own Transformers backend: the same base, the same adapter, the same numbers.

In: the demo base and a demo adapter, in float32, and the tasks beside this file. Out: one JSON line with the greatest
difference of a log-likelihood and the number of greedy texts that differ, for the base and for the adapter.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conformance.environments import ENVIRONMENTS
from harness import RESULTS, ROOT, running_server, surroundings, write_result
from models import DEMO_BASE

from perft.demo_base import build_demo_base

ADAPTER = "sql"
SCORED, GENERATED = ("facts_choice", "sql_answers"), ("facts_greedy", "sql_greedy")
TASKS = (*SCORED, *GENERATED)
TOLERANCE = 1e-4
# PEFT learns of PERFT by an import; lm-eval's command is the rest
COMMAND = "import sys, perft; from lm_eval.__main__ import cli_evaluate; sys.exit(cli_evaluate())"


def run(*, adapter: Path, limit: int) -> None:
    """Compares.

    Args:
        limit: so many questions of each task, at most.

    Raises:
        SystemExit: they differ.
    """
    environment = ENVIRONMENTS["lm-eval"]
    environment.require()
    build_demo_base(DEMO_BASE)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="conformance") as temporary:
        folder = Path(temporary)
        own = f"pretrained={DEMO_BASE},dtype=float32"
        theirs = {
            "base": _lm_eval(folder / "hf-base", "hf", own, limit),
            ADAPTER: _lm_eval(folder / "hf-adapter", "hf", f"{own},peft={adapter}", limit),
        }
        with running_server(str(DEMO_BASE), folder / "log", adapters={ADAPTER: adapter}, dtype="float32") as server:
            for model, expected in theirs.items():
                served = f"model={model},base_url={server.url}/v1/completions,tokenizer={DEMO_BASE},num_concurrent=4"
                found[model] = _compare(
                    _lm_eval(folder / f"served-{model}", "local-completions", served, limit), expected
                )
    effect = _compare(theirs["base"], theirs[ADAPTER])
    result = {
        "bench": "lm-eval",
        **surroundings(os.getloadavg()[0]),
        "tools": environment.versions(),
        "settings": {"adapter": ADAPTER, "tasks": TASKS, "limit": limit, "dtype": "float32", "tolerance": TOLERANCE},
        **found,
        "effect_of_adapter": effect,
    }
    write_result(RESULTS / "conformance.jsonl", result)
    wrong = [name for name, each in found.items() if each["max_difference"] > TOLERANCE or each["other_texts"]]
    if wrong or effect["max_difference"] < 1000 * TOLERANCE:
        raise SystemExit(f"conformance: lm-eval differs on {wrong}, or the adapter makes no difference")


def _lm_eval(output: Path, model: str, arguments: str, limit: int) -> dict[str, list[Any]]:
    """What lm-eval was answered, by task, in the order of its documents."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "HF_DATASETS_CACHE": str(output / "datasets"),
    }
    command: Sequence[str] = (
        *(str(ENVIRONMENTS["lm-eval"].bin / "python"), "-c", COMMAND, "--model", model, "--model_args", arguments),
        *("--tasks", ",".join(TASKS), "--include_path", str(Path(__file__).with_name("tasks"))),
        *("--batch_size", "1", "--log_samples", "--output_path", str(output), "--device", "cpu", "--limit", str(limit)),
    )
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"conformance: lm-eval has failed:\n{done.stderr[-4000:]}")
    answers = {}
    for task in TASKS:
        (file,) = output.rglob(f"samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        answers[task] = [answer for sample in samples for answer in sample["resps"]]
    return answers


def _compare(ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> dict[str, Any]:
    pairs = [pair for task in SCORED for pair in zip(ours[task], theirs[task], strict=True)]
    differences = [abs(float(one[0][0]) - float(other[0][0])) for one, other in pairs]
    greedy = [str(one[0][1]) != str(other[0][1]) for one, other in pairs]
    texts = [pair for task in GENERATED for pair in zip(ours[task], theirs[task], strict=True)]
    return {
        "log_likelihoods": len(differences),
        "max_difference": round(max(differences), 7),
        "other_is_greedy": sum(greedy),
        "texts": len(texts),
        "other_texts": sum(one != other for one, other in texts),
    }
