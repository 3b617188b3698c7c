"""What the demo's adapters change: exact-match accuracy on held-out prompts, base against adapter, and example answers.

    python demo/evaluate.py [--model .cache/smolmixtral] [--limit 100] [--task sql ...]

An answer counts if it is the expected text, letter for letter but for blanks around it; decoding is greedy. The last line is
the figures as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perft.data import read_records
from perft_serve import LLM, SamplingParams

DEMO = Path(__file__).parent
ADAPTERS = DEMO / "adapters"
DEFAULT_MODEL = DEMO.parent / ".cache" / "smolmixtral"
MAX_NEW_TOKENS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One held-out question and the right answer."""

    question: str
    expected: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """Answers of the base and of the adapter to the same cases."""

    task: str
    cases: list[Case]
    base_answers: list[str]
    adapter_answers: list[str]

    def accuracy(self, answers: Sequence[str]) -> float:
        """Share of the answers that are right."""
        right = [answer.strip() == case.expected.strip() for case, answer in zip(self.cases, answers, strict=True)]
        return sum(right) / len(right)

    @property
    def base_accuracy(self) -> float:
        """Of the base model alone."""
        return self.accuracy(self.base_answers)

    @property
    def adapter_accuracy(self) -> float:
        """Of the base model with the adapter."""
        return self.accuracy(self.adapter_answers)


def task_names() -> list[str]:
    """The tasks that have an adapter."""
    return sorted(entry.name for entry in ADAPTERS.iterdir() if (entry / "adapter_config.json").is_file())


def evaluate(model_path: str | Path, tasks: Sequence[str], *, limit: int, dtype: str = "auto") -> list[TaskResult]:
    """Answers of the base and of each task's adapter, from one engine.

    Args:
        model_path: the demo base.
        tasks: names of tasks.
        limit: held-out cases per task.
        dtype: of the base.
    """
    llm = LLM(str(model_path), adapters={task: str(ADAPTERS / task) for task in tasks}, dtype=dtype)
    return [_evaluate_task(llm, task, limit) for task in tasks]


def _evaluate_task(llm: LLM, task: str, limit: int) -> TaskResult:
    """Every case twice in one batch: base and adapter side by side."""
    records = read_records(DEMO / "data" / f"{task}.heldout.jsonl")[:limit]
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS)
    names = [None] * len(records) + [task] * len(records)
    if "messages" in records[0]:
        questions = [record["messages"][:-1] for record in records]
        cases = [
            Case(question=record["messages"][-2]["content"], expected=record["messages"][-1]["content"])
            for record in records
        ]
        outputs = llm.chat(questions * 2, sampling, adapter=names)
    else:
        cases = [Case(question=record["prompt"], expected=record["completion"]) for record in records]
        outputs = llm.generate([case.question for case in cases] * 2, sampling, adapter=names)
    answers = [output.outputs[0].text for output in outputs]
    return TaskResult(task=task, cases=cases, base_answers=answers[: len(cases)], adapter_answers=answers[len(cases) :])


def main() -> int:
    """Prints the table and the examples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="demo base (perft demo-base makes it)")
    parser.add_argument("--task", nargs="+", choices=task_names(), default=task_names())
    parser.add_argument("--limit", type=int, default=100, help="held-out cases per task")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--examples", type=int, default=2, help="example answers per task")
    args = parser.parse_args()
    results = evaluate(args.model, args.task, limit=args.limit, dtype=args.dtype)
    print("| adapter | held-out prompts | base exact match | adapter exact match |\n|---|---|---|---|")
    for result in results:
        print(f"| {result.task} | {len(result.cases)} | {result.base_accuracy:.0%} | {result.adapter_accuracy:.0%} |")
    for result in results:
        for number in range(min(args.examples, len(result.cases))):
            print(f"\n[{result.task}] {result.cases[number].question}")
            print(f"  expected: {result.cases[number].expected.strip()}")
            print(f"  base:     {result.base_answers[number].strip()!r}")
            print(f"  adapter:  {result.adapter_answers[number].strip()!r}")
    figures = {r.task: {"n": len(r.cases), "base": r.base_accuracy, "adapter": r.adapter_accuracy} for r in results}
    print("\n" + json.dumps(figures))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
