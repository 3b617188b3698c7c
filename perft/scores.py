"""Results of an evaluation: what each example gave, what that says of accuracy and how surely, and whether of two the one is
better.

In: examples, one for each question and model. Out: accuracies with confidence intervals, paired comparisons, and both on
disk: `results.json` and `examples.jsonl`. It runs no model.

Intervals are of 95 %: Wilson's for one task, the bootstrap's for the average over tasks, in which every task counts alike, as
in the paper. Two models are compared on the questions that both answered: the difference with its paired bootstrap interval,
and McNemar's exact test on the questions where they differ. All of it is of the questions at hand; that another training
run would differ is not in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from perft.errors import PerftError
from perft.tasks import write_jsonl

RESULTS = "results.json"
EXAMPLES = "examples.jsonl"
NUM_RESAMPLES = 10_000

_Z = 1.959963984540054
_TAILS = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What one model made of one question.

    Args:
        model: the adapter's name, or `base`.
        index: place in the task's file, from 0.
        reply: what was generated; empty if choices were scored.
        predicted: the answer in it; empty if there is none.
        scores: log-probability of each choice, if they were scored.
        choice_lengths: characters of each choice, if it was their texts that were scored.
        num_prompt_tokens: as given to the model.
        truncated: whether the prompt lost its beginning, being longer than the context.
    """

    model: str
    task: str
    index: int
    answer: str
    predicted: str
    correct: bool
    reply: str = ""
    scores: dict[str, float] | None = None
    choice_lengths: dict[str, int] | None = None
    num_prompt_tokens: int = 0
    truncated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """An accuracy with its 95 % confidence interval.

    Args:
        num_examples: it is over so many questions.
        unanswered: of these, so many replies held no answer.
    """

    accuracy: float
    low: float
    high: float
    num_examples: int
    unanswered: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much better the first of two models is than the second, on the same questions.

    Args:
        difference: of their accuracies.
        low, high: its 95 % interval by the paired bootstrap.
        only_first, only_second: questions that only the one got right.
        p_value: McNemar's exact test, two-sided: how likely a split at least so uneven is among equals.
    """

    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    num_examples: int
    p_value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models compared, by task and over all tasks.

    In `overall`, `difference` and its interval are of the averages over tasks; the counts and the test pool all questions.
    """

    first: str
    second: str
    tasks: dict[str, Difference]
    overall: Difference


def wilson(correct: int, num_examples: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a proportion."""
    share, n = correct / num_examples, num_examples
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of the exact test: of the questions where two models differ, each wins one with probability 1/2."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)  # Python's integers divide exactly, however large


def score_tasks(examples: Iterable[Example]) -> dict[str, dict[str, Score]]:
    """Scores by model and task, in the order in which they come."""
    groups: dict[str, dict[str, list[Example]]] = {}
    for example in examples:
        groups.setdefault(example.model, {}).setdefault(example.task, []).append(example)
    return {
        model: {task: _score(its_examples) for task, its_examples in tasks.items()} for model, tasks in groups.items()
    }


def normalised(examples: Iterable[Example]) -> list[Example]:
    """The examples whose choices' texts were scored, answered by log-probability per character: lm-evaluation-harness's
    `acc_norm`, which does not favour short choices."""
    found = []
    for example in examples:
        if example.scores and example.choice_lengths:
            per_character = {
                word: score / max(1, example.choice_lengths[word]) for word, score in example.scores.items()
            }
            predicted = max(per_character, key=per_character.__getitem__)
            found.append(replace(example, predicted=predicted, correct=predicted == example.answer))
    return found


def answer_bits(examples: Sequence[Example], seed: int = 0) -> Mean | None:
    """Bits per character of the right answers' texts: all their bits over all their characters, the less the better. It says
    more than accuracy does where few answers change. `None` if no texts were scored; the interval resamples questions."""
    pairs = [
        (-example.scores[example.answer] / math.log(2), example.choice_lengths[example.answer])
        for example in examples
        if example.scores and example.choice_lengths
    ]
    if not pairs:
        return None
    bits, characters = np.array(pairs).T
    generator = np.random.default_rng(seed)
    draws = [
        bits[rows].sum() / characters[rows].sum()
        for rows in (generator.integers(len(pairs), size=len(pairs)) for _ in range(NUM_RESAMPLES // 10))
    ]
    low, high = np.percentile(draws, _TAILS)
    return Mean(value=float(bits.sum() / characters.sum()), low=float(low), high=float(high))


def average(scores: Sequence[Score], seed: int = 0) -> Score:
    """The average over tasks. Resampling a task's questions is a binomial draw, so that is what is drawn."""
    generator = np.random.default_rng(seed)
    draws = np.stack(
        [generator.binomial(each.num_examples, each.accuracy, NUM_RESAMPLES) / each.num_examples for each in scores]
    ).mean(axis=0)
    low, high = np.percentile(draws, _TAILS)
    return Score(
        accuracy=sum(each.accuracy for each in scores) / len(scores),
        low=float(low),
        high=float(high),
        num_examples=sum(each.num_examples for each in scores),
        unanswered=sum(each.unanswered for each in scores),
    )


def compare(first: Sequence[Example], second: Sequence[Example], *, seed: int = 0) -> Comparison:
    """Compares two models on the questions that both were asked.

    Args:
        first, second: the examples of one model each.

    Raises:
        PerftError: they share no question, or disagree on an answer, so that their data are not the same.
    """
    if not first or not second:
        raise PerftError("there is nothing to compare: one side has no examples")
    theirs = {(example.task, example.index): example for example in second}
    pairs: dict[str, list[tuple[Example, Example]]] = {}
    for example in first:
        other = theirs.get((example.task, example.index))
        if other is not None:
            if other.answer != example.answer:
                raise PerftError(
                    f"{example.task}, question {example.index}: the answer is {example.answer!r} in one and {other.answer!r} "
                    "in the other: these were not asked from the same file"
                )
            pairs.setdefault(example.task, []).append((example, other))
    if not pairs:
        raise PerftError("there is nothing to compare: no question was asked of both")
    generator = np.random.default_rng(seed)
    tasks: dict[str, Difference] = {}
    draws = []
    for task, both in pairs.items():
        wins = sum(a.correct and not b.correct for a, b in both)
        losses = sum(b.correct and not a.correct for a, b in both)
        n = len(both)
        # resampling pairs is a multinomial draw of wins, losses and ties
        drawn = generator.multinomial(n, [wins / n, losses / n, (n - wins - losses) / n], NUM_RESAMPLES)
        draws.append((drawn[:, 0] - drawn[:, 1]) / n)
        tasks[task] = _difference((wins - losses) / n, draws[-1], wins, losses, n)
    overall = _difference(
        sum(each.difference for each in tasks.values()) / len(tasks),
        np.stack(draws).mean(axis=0),
        sum(each.only_first for each in tasks.values()),
        sum(each.only_second for each in tasks.values()),
        sum(each.num_examples for each in tasks.values()),
    )
    return Comparison(first=first[0].model, second=second[0].model, tasks=tasks, overall=overall)


def write_results(folder: str | Path, results: Mapping[str, Any], examples: Sequence[Example]) -> None:
    """Writes `results.json` and `examples.jsonl` into `folder`."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    write_jsonl(home / EXAMPLES, [asdict(example) for example in examples])
    temporary = home / f"{RESULTS}.part"
    temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(home / RESULTS)


def read_results(folder: str | Path) -> dict[str, Any]:
    """What `write_results` wrote as `results.json`.

    Raises:
        PerftError: there is none, or it is something else.
    """
    file = Path(folder) / RESULTS
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PerftError(f"{folder} holds no {RESULTS}: give the output folder of `perft eval`") from error
    except ValueError as error:
        raise PerftError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("models"), dict):
        raise PerftError(f"{file} is not a result of `perft eval`: it has no models")
    return results


def read_examples(reference: str) -> list[Example]:
    """The examples of one model: `FOLDER:NAME`, or `FOLDER` if only one model was evaluated there.

    Raises:
        PerftError: there are none, or of more than one model.
    """
    folder, name = reference, None
    if not (Path(folder) / EXAMPLES).is_file():
        folder, _, name = reference.rpartition(":")
        if not folder or not (Path(folder) / EXAMPLES).is_file():
            raise PerftError(f"{reference} is no output folder of `perft eval` (FOLDER or FOLDER:NAME)")
    known = {each.name for each in fields(Example)}
    examples = []
    for number, line in enumerate((Path(folder) / EXAMPLES).read_text(encoding="utf-8").split("\n"), start=1):
        if line:
            try:
                row = json.loads(line)
                examples.append(Example(**{key: value for key, value in row.items() if key in known}))
            except (ValueError, TypeError, AttributeError) as error:
                raise PerftError(f"{folder}/{EXAMPLES}, line {number}: not an example: {error}") from error
    models = list(dict.fromkeys(example.model for example in examples))
    if name is None and len(models) > 1:
        raise PerftError(f"{folder} holds {len(models)} models: say which, as {folder}:{models[0]}")
    if name is not None and name not in models:
        raise PerftError(f"{folder} holds no model {name!r}; there are {', '.join(models)}")
    return [example for example in examples if name is None or example.model == name]


def _score(examples: Sequence[Example]) -> Score:
    n, correct = len(examples), sum(example.correct for example in examples)
    low, high = wilson(correct, n)
    return Score(
        accuracy=correct / n,
        low=low,
        high=high,
        num_examples=n,
        unanswered=sum(example.predicted == "" for example in examples),
    )


def _difference(difference: float, draws: np.ndarray, wins: int, losses: int, num_examples: int) -> Difference:
    low, high = np.percentile(draws, _TAILS)
    return Difference(
        difference=difference,
        low=float(low),
        high=float(high),
        only_first=wins,
        only_second=losses,
        num_examples=num_examples,
        p_value=mcnemar(wins, losses),
    )
