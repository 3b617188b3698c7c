"""Training data: three kinds of records, the paper's prompt, labels, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from perft.data import IGNORED_LABEL, PaddingCollator, alpaca_prompt, encode, read_records, tokenize_files
from perft.errors import PerftError

ALPACA = {"instruction": "Say hello", "input": "", "output": "hello world", "answer": "hello"}
PROMPT = {"prompt": "hello", "completion": " world"}
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def learned(ids: list[int], is_answer: list[bool], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode([token for token, learn in zip(ids, is_answer, strict=True) if learn]))


def test_the_papers_prompt_letter_for_letter() -> None:
    blanks = " " * 16
    assert alpaca_prompt("Say hello") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        f"\n{blanks}### Instruction:\n{blanks}Say hello\n{blanks}\n{blanks}### Response:\n{blanks}"
    )
    assert alpaca_prompt("Translate", "Haus") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. \n"
        f"\n{blanks}### Instruction:\n{blanks}Translate\n{blanks}\n{blanks}### Input:\n{blanks}Haus\n{blanks}\n"
        f"{blanks}### Response:\n{blanks}"
    )


def test_alpaca_is_one_text_and_the_answer_part_is_the_output(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, is_answer = encode(ALPACA, tiny_tokenizer)
    whole = alpaca_prompt("Say hello") + "hello world"
    assert ids == [*tiny_tokenizer(whole)["input_ids"], tiny_tokenizer.eos_token_id]
    # the border token may hold blanks of the prompt
    assert learned(ids, is_answer, tiny_tokenizer).strip() == "hello world<|endoftext|>"


def test_prompt_and_completion_are_tokenised_as_a_server_would(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, is_answer = encode(PROMPT, tiny_tokenizer)
    prompt_ids = tiny_tokenizer("hello")["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    assert learned(ids, is_answer, tiny_tokenizer) == " world<|endoftext|>"


def test_chat_learns_every_answer_of_the_assistant(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "two"},
    ]
    ids, is_answer = encode({"messages": turns}, tiny_tokenizer)
    whole = tiny_tokenizer.apply_chat_template(turns, tokenize=False)
    assert tiny_tokenizer.decode(ids) == whole + "<|endoftext|>"
    assert learned(ids, is_answer, tiny_tokenizer) == "one<|im_end|>\ntwo<|im_end|>\n<|endoftext|>"


def test_chat_stops_where_generation_stops(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=tiny_tokenizer.chat_template,
    )
    ids, is_answer = encode(CHAT, tokenizer)
    assert learned(ids, is_answer, tokenizer) == "world<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template="{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    with pytest.raises(PerftError, match="template changes what stands before message 2"):
        encode(CHAT, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(PerftError, match="no chat template"):
        encode(CHAT, tokenizer)


@pytest.mark.parametrize("record", [ALPACA, PROMPT, CHAT])
def test_loss_on_all_or_on_the_answer(
    record: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write(tmp_path / "data.jsonl", record)
    on_all = tokenize_files([file], tiny_tokenizer, max_length=512, loss_on="all").dataset[0]
    on_answer = tokenize_files([file], tiny_tokenizer, max_length=512, loss_on="answer").dataset[0]
    assert on_all["input_ids"] == on_answer["input_ids"] == on_all["labels"]
    kept = [label for label in on_answer["labels"] if label != IGNORED_LABEL]
    assert 0 < len(kept) < len(on_answer["labels"])
    assert on_answer["labels"][-len(kept) :] == kept == on_answer["input_ids"][-len(kept) :]


def test_truncation_is_counted_and_what_cannot_be_learned_is_left_out(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    long_prompt = {"prompt": "hello world " * 40, "completion": "!"}
    long_answer = {"prompt": "hello", "completion": " world" * 40}
    file = write(tmp_path / "data.jsonl", PROMPT, long_prompt, long_answer)
    data = tokenize_files([file], tiny_tokenizer, max_length=16, loss_on="answer")
    assert (len(data.dataset), data.num_truncated, data.num_dropped) == (2, 2, 1)
    assert [len(ids) for ids in data.dataset["input_ids"]][1] == 16
    assert len(tokenize_files([file], tiny_tokenizer, max_length=16, loss_on="all").dataset) == 3
    with pytest.raises(PerftError, match="raise max_length"):
        tokenize_files([write(tmp_path / "long.jsonl", long_prompt)], tiny_tokenizer, max_length=16, loss_on="answer")


def test_files_of_different_kinds_and_a_json_list(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ALPACA, ALPACA]))
    files = [tmp_path / "a.json", write(tmp_path / "b.jsonl", PROMPT), write(tmp_path / "c.jsonl", CHAT)]
    assert len(tokenize_files(files, tiny_tokenizer, max_length=512, loss_on="all").dataset) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"holds no records"),
        ("\n\n", r"holds no records"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n', r"line 2: not valid JSON.*\(column 16\)"),
        ('\n{"prompt": "a"}\n', r"line 2: field 'completion' is missing \(prompt data\)"),
        ('["a"]\n', r"line 1: expected an object with named fields, got list"),
        ('{"text": "a"}\n', r"line 1: cannot tell what kind.*\['text'\]"),
        ('{"prompt": "a", "completion": ""}\n', r"line 1: field 'completion' is empty"),
        ('{"prompt": "a", "completion": 3}\n', r"line 1: field 'completion' must be text, got int"),
        (
            '{"prompt": "a", "completion": "b"}\n{"instruction": "a", "output": "b"}\n',
            r"line 2: field 'instruction' does not belong to prompt data \(completion, prompt\)",
        ),
        ('{"prompt": "a", "completion": "b", "id": 1}\n', r"line 1: field 'id' does not belong"),
        ('{"messages": []}\n', r"line 1: 'messages' must be a non-empty list"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', r"the last message must be the assistant's"),
        ('{"messages": [{"role": "robot", "content": "a"}]}\n', r"message 1 has role 'robot'"),
        ('{"messages": [{"role": "user", "text": "a"}]}\n', r"message 1 must have exactly the fields role and content"),
        ('{"messages": [{"role": "assistant", "content": null}]}\n', r"content of message 1 must be text"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(PerftError, match=message):
        read_records(tmp_path / "data.jsonl")


def test_other_bad_files(tmp_path: Path) -> None:
    with pytest.raises(PerftError, match="data file not found"):
        read_records(tmp_path / "nothing.jsonl")
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(PerftError, match=r"are \.jsonl or \.json, not '\.csv'"):
        read_records(tmp_path / "data.csv")
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(PerftError, match="one list of objects"):
        read_records(tmp_path / "one.json")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "completion": "b"}'.encode("latin-1"))
    with pytest.raises(PerftError, match="not UTF-8"):
        read_records(tmp_path / "latin.jsonl")


def test_the_collator_pads_masks_and_keeps_labels_out_of_the_padding() -> None:
    batch = PaddingCollator(pad_token_id=7)(
        [{"input_ids": [1, 2, 7], "labels": [-100, 2, 7]}, {"input_ids": [5], "labels": [5]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 7], [5, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 7], [5, -100, -100]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())
