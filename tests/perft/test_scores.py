"""Intervals, the paired comparison and results on disk, against numbers from the literature and against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perft.errors import PerftError
from perft.scores import (
    Example,
    answer_bits,
    average,
    compare,
    mcnemar,
    normalised,
    read_examples,
    read_results,
    score_tasks,
    wilson,
    write_results,
)


def examples(model: str, right: Sequence[bool], task: str = "piqa") -> list[Example]:
    return [
        Example(
            model=model,
            task=task,
            index=index,
            answer="solution1",
            predicted="solution1" if correct else "",
            correct=correct,
        )
        for index, correct in enumerate(right)
    ]


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)],
)
def test_wilson_as_published(correct: int, total: int, low: float, high: float) -> None:
    """The values of Newcombe (Statistics in Medicine 17, 1998), table I, and their mirror image."""
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-4)


def cloze(index: int, answer: str, scores: Sequence[float], lengths: Sequence[int]) -> Example:
    words = ("solution1", "solution2")
    by_word = dict(zip(words, scores, strict=True))
    predicted = max(words, key=by_word.__getitem__)
    return Example(
        model="base",
        task="piqa",
        index=index,
        answer=answer,
        predicted=predicted,
        correct=predicted == answer,
        scores=by_word,
        choice_lengths=dict(zip(words, lengths, strict=True)),
    )


def test_likelihood_per_character() -> None:
    short_wins = cloze(0, "solution2", [-8.0, -12.0], [4, 12])  # -2 and -1 a character
    clear = cloze(1, "solution1", [-3.0, -9.0], [3, 3])
    assert [example.correct for example in (short_wins, clear)] == [False, True]
    found = normalised([short_wins, clear, *examples("base", [True])])
    assert [(each.index, each.predicted, each.correct) for each in found] == [
        (0, "solution2", True),
        (1, "solution1", True),
    ]
    bits = answer_bits([short_wins, clear])
    assert bits is not None
    assert bits.value == pytest.approx((12 + 3) / (12 + 3) / np.log(2))
    # both questions have one nat a character, so no resampling changes anything
    assert (bits.low, bits.high) == pytest.approx((bits.value, bits.value))
    mixed = answer_bits([cloze(n, "solution1", [-float(n % 5), -9.0], [3, 3]) for n in range(50)])
    assert mixed is not None
    assert mixed.low < mixed.value < mixed.high
    assert answer_bits(examples("base", [True, False])) is None


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (6, 2), (2, 6), (4, 4)])
def test_mcnemar_counts_the_splits_that_are_as_uneven(wins: int, losses: int) -> None:
    n = wins + losses
    as_uneven = sum(abs(2 * sum(coins) - n) >= abs(wins - losses) for coins in itertools.product((0, 1), repeat=n))
    assert mcnemar(wins, losses) == pytest.approx(as_uneven / 2**n)


def test_mcnemar_of_thousands() -> None:
    assert 0 < mcnemar(2000, 2200) < 0.01


def test_scores_by_model_and_task() -> None:
    scores = score_tasks([*examples("base", [True, False, False, True]), *examples("a", [False] * 3, task="boolq")])
    assert list(scores) == ["base", "a"]
    score = scores["base"]["piqa"]
    assert (score.accuracy, score.num_examples, score.unanswered) == (0.5, 4, 2)
    assert scores["a"]["boolq"].low == 0
    assert scores["a"]["boolq"].high > 0.3, "three wrong answers do not prove that all are"


def test_the_average_counts_tasks_alike() -> None:
    one = score_tasks([*examples("m", [True] * 10), *examples("m", [True, False] * 50, task="boolq")])["m"]
    mean = average([one["piqa"], one["boolq"]])
    assert mean.accuracy == 0.75
    assert mean.low == pytest.approx(0.70, abs=0.01)  # half of a binomial's two standard deviations, 0.1
    assert mean.high == pytest.approx(0.80, abs=0.01)
    assert average([one["piqa"], one["boolq"]]) == mean


def test_the_paired_interval_is_that_of_resampled_pairs() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.random(80) < 0.7, generator.random(80) < 0.5
    found = compare(examples("a", first.tolist()), examples("b", second.tolist())).tasks["piqa"]
    picks = generator.integers(0, 80, (20_000, 80))
    differences = first[picks].mean(axis=1) - second[picks].mean(axis=1)
    assert found.difference == pytest.approx(first.mean() - second.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, (2.5, 97.5))), abs=0.014)
    assert (found.only_first, found.only_second) == ((first & ~second).sum(), (second & ~first).sum())
    assert found.p_value == mcnemar(found.only_first, found.only_second)


def test_the_comparison_over_tasks() -> None:
    first = [*examples("a", [True] * 10), *examples("a", [True, False] * 2, task="boolq")]
    second = [*examples("b", [False] * 10), *examples("b", [True, False] * 2, task="boolq")]
    comparison = compare(first, second)
    assert (comparison.first, comparison.second) == ("a", "b")
    assert comparison.overall.difference == 0.5  # the mean of 1 and 0, not 10/14
    assert (comparison.overall.only_first, comparison.overall.num_examples) == (10, 14)
    other_way = compare(second, first)
    assert other_way.overall.difference == -0.5
    assert other_way.overall.p_value == comparison.overall.p_value


def test_only_what_both_were_asked_is_compared() -> None:
    comparison = compare(examples("a", [True] * 5), examples("b", [False] * 3))
    assert comparison.tasks["piqa"].num_examples == 3
    with pytest.raises(PerftError, match="no question was asked of both"):
        compare(examples("a", [True]), examples("b", [True], task="boolq"))
    with pytest.raises(PerftError, match="question 0: the answer is 'solution1'.*not asked from the same file"):
        compare(examples("a", [True]), [replace(examples("b", [True])[0], answer="solution2")])
    with pytest.raises(PerftError, match="no examples"):
        compare([], examples("b", [True]))


def test_results_on_disk(tmp_path: Path) -> None:
    both = [*examples("base", [True]), replace(examples("a", [False])[0], scores={"solution1": -1.5}, reply="ü\n")]
    write_results(tmp_path / "out", {"models": {"base": {}}}, both)
    assert read_results(tmp_path / "out") == {"models": {"base": {}}}
    assert read_examples(f"{tmp_path}/out:a") == [both[1]]
    with pytest.raises(PerftError, match="holds 2 models"):
        read_examples(f"{tmp_path}/out")
    with pytest.raises(PerftError, match="no model 'b'; there are base, a"):
        read_examples(f"{tmp_path}/out:b")
    write_results(tmp_path / "one", {"models": {}}, both[:1])
    assert read_examples(str(tmp_path / "one")) == both[:1]


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_results_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(PerftError, match="results.json is not"):
        read_results(tmp_path)
    with pytest.raises(PerftError, match="no output folder"):
        read_examples(str(tmp_path))
    with pytest.raises(PerftError, match="holds no results.json"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "examples.jsonl").write_text('{"model": "a"}\n')
    with pytest.raises(PerftError, match="line 1: not an example"):
        read_examples(str(tmp_path))
