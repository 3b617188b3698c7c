"""The command `perft eval`: adapters and their base on the paper's tasks, and whether one is better than another.

In: arguments. Out: a table; with `--output`, `results.json` and `examples.jsonl` as well. It is an entry point of the command
`perft` (group `perft.commands`), since it runs the engine, which the package `perft` knows nothing of. What it needs is
imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perft.errors import PerftError

if TYPE_CHECKING:
    from rich.table import Table

    from perft.scores import Comparison, Example, Score
    from perft.tasks import TaskData
    from perft_serve.evaluation import EvalSettings
    from perft_serve.llm import LLM

BASE = "base"
NUM_BEAMS = 4
HARNESS = "lm_eval:"
"""What names of lm-evaluation-harness' tasks begin with here."""
HARNESS_EXAMPLES = "lm_eval_examples.jsonl"
PAGE_SIZE = 4
"""Tokens in a page of the KV cache. The texts scored against one another begin alike for some twenty tokens, and what is found
again is whole pages: on PIQA and ARC-easy as clozes, a quarter of the tokens is at 16 a page, two fifths at 4."""


def add_eval(commands: Any) -> None:
    """Adds the command to those of `perft`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "eval",
        help="evaluate adapters on the paper's tasks",
        description="Asks a base and its adapters the questions of the paper's tasks, in mixed batches, with the paper's "
        "prompts, beam search and answer rules. With --compare and no --model, compares two earlier results.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="BASE", help="base model: a folder or a hub id")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter's folder; may be given several times",
    )
    parser.add_argument("--no-base", action="store_true", help="leave the base without an adapter out")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["commonsense"],
        metavar="TASK",
        help="tasks, commonsense or arithmetic (default: commonsense); lm_eval:NAME is a task of lm-evaluation-harness",
    )
    parser.add_argument("--data", metavar="DIR", help="folder of TASK/SPLIT.jsonl or .json (see `perft data fetch`)")
    parser.add_argument("--include-path", metavar="DIR", help="lm_eval: a folder with tasks of your own, as YAML")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="lm_eval: examples before each question (default: the task's own)"
    )
    parser.add_argument("--split", help="which file of a task (default: test, or validation where there is no test)")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="ask N questions of each task, drawn by --seed (lm_eval: the first N; default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw and of the bootstrap (default 0)")
    parser.add_argument(
        "--score",
        action="store_true",
        help="take the likeliest choice instead of generating a reply (tasks of choices only)",
    )
    parser.add_argument(
        "--cloze",
        action="store_true",
        help="ask the bare question and take the likeliest text, as lm-evaluation-harness does (piqa, ARC, openbookqa)",
    )
    parser.add_argument(
        "--num-beams", type=int, default=NUM_BEAMS, metavar="N", help="beams; 1 is greedy (default 4, as in the paper)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest reply (default as in the paper: 4, arithmetic 256)"
    )
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two names of this run, or FOLDER[:NAME] of earlier ones"
    )
    parser.add_argument("--output", metavar="DIR", help="write results.json and examples.jsonl here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    engine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    engine.add_argument(
        "--max-num-seqs", type=int, default=64, metavar="N", help="most sequences in a step (default 64)"
    )
    engine.add_argument(
        "--kv-memory", type=_size, default=1 << 30, metavar="SIZE", help="for the KV cache (default 1G)"
    )
    engine.add_argument(
        "--adapter-memory", type=_size, default=1 << 30, metavar="SIZE", help="for adapters (default 1G)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        PerftError: the arguments do not fit together, or data, base or adapters cannot be used.
    """
    from rich.console import Console

    if args.model is None:
        _refuse_without_model(args)
        results = {"comparison": asdict(_compare_earlier(*args.compare, seed=args.seed))}
        tables = [comparison_table(_compare_earlier(*args.compare, seed=args.seed))]
    else:
        results, tables = _evaluate(args)
    if args.json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        for table in tables:
            Console().print(table)
    if args.model is not None and args.output is not None and not args.json:
        print(f"results in {args.output}")


def _refuse_without_model(args: argparse.Namespace) -> None:
    if args.compare is None:
        raise PerftError("give --model to evaluate, or --compare A B to compare two earlier results")
    given = [
        option
        for option, value in {
            "--adapter": args.adapter,
            "--no-base": args.no_base,
            "--data": args.data,
            "--split": args.split,
            "--include-path": args.include_path,
            "--num-fewshot": args.num_fewshot is not None,
            "--limit": args.limit,
            "--score": args.score,
            "--cloze": args.cloze,
            "--max-new-tokens": args.max_new_tokens,
            "--output": args.output,
        }.items()
        if value
    ]
    if given:
        raise PerftError(
            f"{', '.join(given)} need --model: without it, earlier results are compared and nothing is run"
        )


def _compare_earlier(first: str, second: str, *, seed: int) -> Comparison:
    from perft.scores import compare, read_examples

    return compare(read_examples(first), read_examples(second), seed=seed)


def _evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[Table]]:
    from perft.report import describe_adapter
    from perft.scores import write_results
    from perft.tasks import load_task, select_tasks
    from perft_serve.evaluation import EvalSettings
    from perft_serve.llm import LLM

    adapters = _adapters(args.adapter)
    models = [*([] if args.no_base else [BASE]), *adapters]
    harness = [name.removeprefix(HARNESS) for name in args.tasks if name.startswith(HARNESS)]
    names = [name for name in args.tasks if not name.startswith(HARNESS)]
    _check(args, models, names, harness)
    settings = EvalSettings(
        mode="cloze" if args.cloze else "score" if args.score else "generate",
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
        seed=args.seed,
    )
    tasks = [load_task(task, args.data, args.split) for task in select_tasks(names)]
    reports = {name: describe_adapter(path, base=args.model).to_dict() for name, path in adapters.items()}
    results: dict[str, Any] = {
        "base": args.model,
        "settings": asdict(settings) | {"dtype": args.dtype},
        "versions": _versions(),
        "tasks": {data.task.name: _source(data) for data in tasks},
        "models": {},
    }
    tables: list[Table] = []
    examples: list[Example] = []
    samples: list[dict[str, Any]] = []
    llm = LLM(
        args.model,
        adapters,
        dtype=args.dtype,
        device=args.device,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max(512, args.max_num_seqs),
        kv_memory=args.kv_memory,
        adapter_memory=args.adapter_memory,
        page_size=PAGE_SIZE,
    )
    try:
        if tasks:
            examples = _ask(llm, models, tasks, settings, args, results, tables, reports)
        if harness:
            results["lm_eval"], samples = _run_harness(llm, models, harness, args)
            results["adapters"] = reports
            tables.append(harness_table(results["lm_eval"]))
    finally:
        llm.close()
    if args.output is not None:
        write_results(args.output, results, examples)
        if samples:
            lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
            (Path(args.output) / HARNESS_EXAMPLES).write_text(lines, encoding="utf-8")
    return results, tables


def _check(args: argparse.Namespace, models: Sequence[str], names: Sequence[str], harness: Sequence[str]) -> None:
    """The arguments fit together."""
    if not models:
        raise PerftError("nothing to evaluate: --no-base without an --adapter")
    if args.score and args.cloze:
        raise PerftError("--score and --cloze are two ways to ask; give one")
    for name in args.compare or ():
        if name not in models:
            raise PerftError(f"--compare: {name!r} is not evaluated here; there are {', '.join(models)}")
    if names and args.data is None:
        raise PerftError("give --data DIR, the folder of the tasks' data; `perft data fetch all --to DIR` makes one")
    if harness and importlib.util.find_spec("lm_eval") is None:
        raise PerftError(f"{HARNESS}{harness[0]} needs lm-evaluation-harness: pip install 'perft-serve[lm-eval]'")
    if not harness and (args.include_path is not None or args.num_fewshot is not None):
        raise PerftError(f"--include-path and --num-fewshot are for tasks of lm-evaluation-harness ({HARNESS}NAME)")
    if not names:
        given = {
            "--data": args.data,
            "--split": args.split,
            "--score": args.score,
            "--cloze": args.cloze,
            "--max-new-tokens": args.max_new_tokens,
            "--num-beams": args.num_beams != NUM_BEAMS,
            "--compare": args.compare,
        }
        if any(given.values()):
            unused = ", ".join(option for option, value in given.items() if value)
            raise PerftError(f"{unused}: not for tasks of lm-evaluation-harness, and there are no others in --tasks")


def _ask(
    llm: LLM,
    models: Sequence[str],
    tasks: Sequence[TaskData],
    settings: EvalSettings,
    args: argparse.Namespace,
    results: dict[str, Any],
    tables: list[Table],
    reports: Mapping[str, Any],
) -> list[Example]:
    """The paper's tasks: asks, and adds what came out to `results` and `tables`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from perft.scores import answer_bits, average, compare, normalised, score_tasks
    from perft_serve.evaluation import draw, evaluate

    bar = Progress(
        *(TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
        disable=args.json,
    )
    with bar:
        total = len(models) * sum(len(draw(data, settings.limit, settings.seed)) for data in tasks)
        row = bar.add_task("questions", total=total)
        examples = evaluate(llm, models, tasks, settings, done=lambda count: bar.advance(row, count))
    scores = score_tasks(examples)
    averages = {model: average(list(scores[model].values()), args.seed) for model in models}
    results["models"] = {
        model: {
            "adapter": reports.get(model),
            "tasks": {task: asdict(score) for task, score in scores[model].items()},
            "average": asdict(averages[model]),
            "truncated_prompts": sum(example.truncated for example in examples if example.model == model),
        }
        for model in models
    }
    tables.append(score_table(scores, averages))
    if settings.mode == "cloze":
        by_length = score_tasks(normalised(examples))
        for model, entry in results["models"].items():
            its = [example for example in examples if example.model == model]
            bits = {task: answer_bits([e for e in its if e.task == task], args.seed) for task in scores[model]}
            entry["tasks_norm"] = {task: asdict(score) for task, score in by_length[model].items()}
            entry["average_norm"] = asdict(average(list(by_length[model].values()), args.seed))
            entry["answer_bits"] = {task: asdict(mean) for task, mean in bits.items() if mean is not None}
        tables.append(cloze_table(by_length, results["models"]))
    if args.compare:
        sides = [[example for example in examples if example.model == name] for name in args.compare]
        comparison = compare(*sides, seed=args.seed)
        results["comparison"] = asdict(comparison)
        tables.append(comparison_table(comparison))
    return examples


def _run_harness(
    llm: LLM, models: Sequence[str], names: Sequence[str], args: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tasks of lm-evaluation-harness: by model what it reports, and each of its samples."""
    from perft_serve.harness import EngineLM, find_tasks, run_tasks

    found: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    manager = find_tasks(names, args.include_path)
    for model in models:
        report = run_tasks(
            EngineLM(llm, None if model == BASE else model, args.seed),
            names,
            manager,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            seed=args.seed,
        )
        for task, rows in report["samples"].items():
            samples += [{"model": model, "task": task, **row} for row in rows]
        found[model] = {
            name: report[name] for name in ("results", "versions", "n-shot", "n-samples", "higher_is_better")
        }
    return found, samples


def harness_table(found: Mapping[str, Any]) -> Table:
    """What lm-evaluation-harness measured, a row for each task and metric, a column for each model."""
    from rich.table import Table

    table = Table("task", "metric", *found, title="lm-evaluation-harness (+- standard error)")
    for task, metrics in next(iter(found.values()))["results"].items():
        for metric in metrics:
            name, comma, filtered = metric.partition(",")
            if not comma or name.endswith("_stderr"):  # what has no filter is the task's name, or how many were asked
                continue
            cells = []
            for each in found.values():
                value, error = each["results"][task][metric], each["results"][task].get(f"{name}_stderr,{filtered}")
                spread = f" +-{error:.4f}" if isinstance(error, float) else ""
                cells.append(f"{value:.4f}{spread}" if isinstance(value, (int, float)) else str(value))
            table.add_row(task, name if filtered == "none" else f"{name} ({filtered})", *cells)
    return table


def score_table(scores: dict[str, dict[str, Score]], averages: dict[str, Score]) -> Table:
    """Accuracies in per cent, with half the width of their intervals; a row for each model."""
    from rich.table import Table

    tasks = list(next(iter(scores.values())))
    table = Table("model", *tasks, "average", title="accuracy, % (95 % interval: +-)")
    for model, by_task in scores.items():
        table.add_row(model, *(_percent(by_task[task]) for task in tasks), _percent(averages[model]))
    return table


def cloze_table(by_length: dict[str, dict[str, Score]], models: dict[str, Any]) -> Table:
    """What else the likelihoods say: accuracy by log-probability per character, and bits per character of the right texts."""
    from rich.table import Table

    tasks = list(next(iter(by_length.values())))
    table = Table(
        *("model", *(f"{task}, %" for task in tasks), *(f"{task}, bits" for task in tasks)),
        title="accuracy by likelihood per character; bits per character of the right answer",
    )
    for model, scores in by_length.items():
        bits = models[model]["answer_bits"]
        table.add_row(
            model, *(_percent(scores[task]) for task in tasks), *(f"{bits[task]['value']:.3f}" for task in tasks)
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """A comparison by task."""
    from rich.table import Table

    table = Table(
        *("task", "difference", "95 % interval", f"only {comparison.first}", f"only {comparison.second}", "questions"),
        "p (McNemar)",
        title=f"{comparison.first} against {comparison.second}, percentage points",
    )
    for name, each in [*comparison.tasks.items(), ("all", comparison.overall)]:
        table.add_row(
            name,
            f"{100 * each.difference:+.1f}",
            f"{100 * each.low:+.1f} .. {100 * each.high:+.1f}",
            str(each.only_first),
            str(each.only_second),
            str(each.num_examples),
            f"{each.p_value:.3g}",
        )
    return table


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} +-{50 * (score.high - score.low):.1f}"


def _adapters(given: Sequence[str]) -> dict[str, str]:
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise PerftError(f"--adapter {text!r} is not of the form NAME=PATH")
        if name in adapters or name == BASE:
            raise PerftError(
                f"--adapter names {name!r} twice" if name in adapters else f"{BASE!r} is the base's own name"
            )
        adapters[name] = path
    return adapters


def _source(data: TaskData) -> dict[str, Any]:
    return {"file": str(Path(data.path)), "split": data.split, "items": len(data.items), "sha256": data.sha256}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("perft-serve", "torch", "transformers")}


def _size(text: str) -> int:
    from perft_serve.cli import parse_size

    return parse_size(text)
