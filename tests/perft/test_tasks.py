"""The paper's tasks: wording, prompts and answer rules to the letter, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perft.errors import PerftError
from perft.tasks import (
    NO_ANSWER,
    TASKS,
    Item,
    cloze_prompt,
    extract_answer,
    instruction,
    is_correct,
    load_task,
    prompt,
    question_and_choices,
    record,
    select_tasks,
)

WORDED = {
    "boolq": (
        "Please answer the following question with true or false, question: is tea a drink?\n\nAnswer format: true/false",
        (),
    ),
    "piqa": (
        "Please choose the correct solution to the question: Dry a cup.\n\nSolution1: Use a towel.\n\nSolution2: Use a brick."
        "\n\nAnswer format: solution1/solution2",
        ("Use a towel.", "Use a brick."),
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Kim slept. Why?\n\nAnswer1: tired Answer2: hungry Answer3: late"
        "\n\nAnswer format: answer1/answer2/answer3",
        ("tired", "hungry", "late"),
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Baking: A man\n\nEnding1: bakes. Ending2: swims. "
        "Ending3: flies. Ending4: rings.\n\nAnswer format: ending1/ending2/ending3/ending4",
        ("bakes.", "swims.", "flies.", "rings."),
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: The _ was wet.\n\nOption1: road "
        "Option2: fire Answer format: option1/option2",
        ("road", "fire"),
    ),
}
QUESTIONS = {
    "boolq": "is tea a drink?",
    "piqa": "Dry a cup.",
    "social_i_qa": "Kim slept. Why?",
    "hellaswag": "Baking: A man",
    "winogrande": "The _ was wet.",
}


@pytest.mark.parametrize("name", WORDED)
def test_items_are_worded_as_in_the_papers_data(name: str) -> None:
    text, choices = WORDED[name]
    assert instruction(TASKS[name], QUESTIONS[name], choices) == text


@pytest.mark.parametrize("name", [name for name in WORDED if name != "boolq"])
@pytest.mark.parametrize("blanks", ["", " "])
def test_question_and_choices_are_found_again(name: str, blanks: str) -> None:
    task, choices = TASKS[name], [choice + blanks for choice in WORDED[name][1]]
    text = instruction(task, QUESTIONS[name], choices)
    item = Item(instruction=text, input="", answer=task.words[0], words=task.words[: len(choices)])
    assert question_and_choices(task, item) == (QUESTIONS[name], choices)
    for spoilt in (text.replace("1: ", "1 "), text.replace("Please", "please"), text.removesuffix(task.words[0])[:-9]):
        with pytest.raises(PerftError, match="cannot be told from the instruction"):
            question_and_choices(task, Item(instruction=spoilt, input="", answer="", words=item.words))


def test_clozes_are_those_of_the_harness() -> None:
    """Its templates of piqa, arc_easy and openbookqa (lm-eval 0.4); a blank and the choice follow."""
    assert cloze_prompt(TASKS["piqa"], "Dry a cup.") == "Question: Dry a cup.\nAnswer:"
    assert cloze_prompt(TASKS["ARC-Easy"], "Why {x}?") == "Question: Why {x}?\nAnswer:"
    assert cloze_prompt(TASKS["openbookqa"], "The sun is") == "The sun is"
    with pytest.raises(
        PerftError, match="hellaswag cannot be asked as a cloze; piqa, ARC-Easy, ARC-Challenge, openbookqa"
    ):
        cloze_prompt(TASKS["hellaswag"], "A man")


def test_a_record_says_the_answer_twice() -> None:
    made = record(TASKS["ARC-Easy"], "Q?", ["a", "b", "c", "d", "e"], 4)
    assert made["instruction"].endswith("Answer5: e\n\nAnswer format: answer1/answer2/answer3/answer4/answer5")
    assert (made["output"], made["answer"]) == ("the correct answer is answer5", "answer5")


def test_prompts_are_the_authors_to_the_blank() -> None:
    item = Item(instruction="Q?", input="", answer="true")
    assert prompt(TASKS["boolq"], item) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"
        "\n"
        "                ### Instruction:\n"
        "                Q?\n"
        "\n"
        "                ### Response:\n"
        "                the correct answer is"
    )
    assert prompt(TASKS["gsm8k"], item).endswith("\n\n                ### Response:\n                ")
    assert "                ### Input:\n                more\n" in prompt(
        TASKS["gsm8k"], Item(instruction="Q?", input="more", answer="1")
    )


@pytest.mark.parametrize(
    ("task", "reply", "answer"),
    [
        ("boolq", " false, not true", "false"),
        ("boolq", " yes", NO_ANSWER),
        ("piqa", "solution2 solution1", "solution2"),
        ("piqa", "solution3", NO_ANSWER),
        ("ARC-Easy", " the answer is answer5.", "answer5"),
        ("winogrande", " Option1", NO_ANSWER),
        ("gsm8k", "2 apples, then 1,234.50 in all", "1234.50"),
        ("gsm8k", "so 5 - 8 = -3.", "-3."),
        ("gsm8k", "none", NO_ANSWER),
        ("gsm8k", "it is 4\n                ### Response:\n 5", "4"),
        ("AQuA", "The answer is (C).", "C"),
        ("AQuA", "f g", NO_ANSWER),
    ],
)
def test_answer_rules(task: str, reply: str, answer: str) -> None:
    assert extract_answer(TASKS[task], reply) == answer


def test_numbers_may_differ_by_a_thousandth() -> None:
    task = TASKS["gsm8k"]
    assert is_correct(task, "3.0005", "3")
    assert is_correct(task, "-3.", "-3")
    assert not is_correct(task, "3.01", "3")
    assert not is_correct(task, NO_ANSWER, "3")
    assert not is_correct(TASKS["boolq"], NO_ANSWER, "true")


def test_tasks_by_name_and_group() -> None:
    assert [len(select_tasks([group])) for group in ("commonsense", "arithmetic")] == [8, 6]
    assert [task.name for task in select_tasks(["PIQA", "commonsense"])][:2] == ["piqa", "boolq"]
    with pytest.raises(PerftError, match="no task 'nli'.*commonsense.*gsm8k"):
        select_tasks(["nli"])


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_test_sets_go_before_validation_sets(tmp_path: Path) -> None:
    row = record(TASKS["piqa"], "Q", ["a", "b"], 1)
    write(tmp_path / "piqa/validation.jsonl", json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    assert (load_task(TASKS["piqa"], tmp_path).split, len(load_task(TASKS["piqa"], tmp_path).items)) == (
        "validation",
        2,
    )
    write(tmp_path / "piqa/test.json", json.dumps([row]))
    data = load_task(TASKS["piqa"], tmp_path)
    assert (data.split, data.items[0].answer, data.items[0].words) == ("test", "solution2", ("solution1", "solution2"))
    assert load_task(TASKS["piqa"], tmp_path, "validation").split == "validation"


def test_answers_as_the_published_files_have_them(tmp_path: Path) -> None:
    write(tmp_path / "AQuA/test.json", json.dumps([{"instruction": "Q", "input": "", "answer": ["A", "C"]}]))
    write(tmp_path / "AddSub/test.json", json.dumps([{"instruction": "Q", "input": "", "answer": 1234.0}]))
    assert load_task(TASKS["AQuA"], tmp_path).items[0].answer == "C"
    assert load_task(TASKS["AddSub"], tmp_path).items[0].answer == "1234.0"


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        (
            "piqa",
            "test.jsonl",
            '{"instruction": "Q", "answer": "solution3"}',
            "line 1: the answer 'solution3'.*solution1",
        ),
        ("piqa", "test.jsonl", '{"instruction": "", "answer": "solution1"}', "line 1: .*'instruction'"),
        ("piqa", "test.jsonl", '\n{"instruction": 1', "line 2: not valid JSON"),
        ("piqa", "test.json", '{"instruction": "Q"}', "one list"),
        ("piqa", "test.jsonl", "\n", "no items"),
        ("gsm8k", "test.jsonl", '{"instruction": "Q", "answer": "ten"}', "must be a number"),
        ("gsm8k", "test.jsonl", '{"instruction": "Q", "answer": true}', "text or a number"),
        ("AQuA", "test.jsonl", '{"instruction": "Q", "answer": "F"}', "letter from A to E"),
        ("boolq", "train.jsonl", "", "no data for boolq.*perft data fetch"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, task: str, name: str, text: str, message: str) -> None:
    write(tmp_path / task / name, text)
    with pytest.raises(PerftError, match=message):
        load_task(TASKS[task], tmp_path)
