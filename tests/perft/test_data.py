"""Training data: three kinds of records, the paper's prompt, labels, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import FAMILIES, tiny_model
from transformers import PreTrainedTokenizerFast

from perft.config import PerftConfig
from perft.data import (
    IGNORED_LABEL,
    PaddingCollator,
    alpaca_prompt,
    encode,
    iter_records,
    pack,
    read_records,
    tokenize_files,
)
from perft.errors import PerftError
from perft.recipe import TrainConfig
from perft.train import check_packing

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
    with pytest.raises(PerftError, match=r"are \.jsonl, \.json or \.parquet, not '\.csv'"):
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


def test_parquet_is_read_like_json(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    Dataset.from_list([PROMPT, {**PROMPT, "prompt": "fox"}]).to_parquet(tmp_path / "data.parquet")
    assert read_records(tmp_path / "data.parquet") == [PROMPT, {**PROMPT, "prompt": "fox"}]
    Dataset.from_list([CHAT]).to_parquet(tmp_path / "chat.parquet")
    assert read_records(tmp_path / "chat.parquet") == [CHAT]
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(PerftError, match=r"bad\.parquet: not a Parquet file"):
        read_records(tmp_path / "bad.parquet")


def test_columns_are_renamed_and_the_others_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "qa.jsonl", {"question": "hello", "answer": " world", "id": 3})
    assert read_records(file, ["question=prompt", "answer=completion"]) == [PROMPT]
    with pytest.raises(PerftError, match=r"line 1: there is no field 'query' \(columns\); it has \['answer', 'id'"):
        read_records(file, ["query=prompt", "answer=completion"])


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        asked.append((path, name, options["split"], options["revision"], options["streaming"]))
        return Dataset.from_list([PROMPT])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_records("acme/qa:train") == [PROMPT]
    assert list(iter_records("acme/qa@v1:main/test", streaming=True)) == [PROMPT]
    assert asked == [("acme/qa", None, "train", None, False), ("acme/qa", "main", "test", "v1", True)]

    def refuse(*args: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nTraceback")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(PerftError, match="cannot load the data set 'acme/qa' from the Hub: Couldn't reach the Hub$"):
        read_records("acme/qa:train")


@given(lengths=st.lists(st.integers(1, 12), max_size=300))
def test_packing_keeps_every_example_whole(lengths: list[int]) -> None:
    rows = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)]
    packed = list(pack(rows, 12))
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 12
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == IGNORED_LABEL
            assert row["labels"][start + 1 : end] == row["input_ids"][start + 1 : end]
            found.append((row["input_ids"][start], end - start))
    assert sorted(found) == list(enumerate(lengths))
    assert all(rows[i]["labels"] == [i] * n for i, n in enumerate(lengths)), "the rows given are left alone"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["R", "E"])
def test_packed_log_probabilities_are_the_unpacked_ones(family: str, variant: Literal["R", "E"]) -> None:
    """No example sees another one in its row, nor padding, or packing is refused; the router's loss counts no padding."""
    torch.manual_seed(0)
    base = tiny_model(family)
    model = get_peft_model(base, PerftConfig(variant=variant, r=4))
    for name, parameter in model.named_parameters():
        if "perft_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(0, 128, (n,), generator=generator).tolist() for n in (5, 3, 9, 4, 2, 12)]
    collate = PaddingCollator(pad_token_id=0)
    packed = collate(list(pack([{"input_ids": ids, "labels": ids} for ids in examples], 20)))
    assert packed["input_ids"].shape[0] == 2
    assert not packed["token_mask"].all(), "one row has padding"
    model.train()
    output = model(**packed)
    found = {}
    for row in range(2):
        for start in (packed["position_ids"][row] == 0).nonzero().squeeze(1).tolist():
            for ids in examples:
                if packed["token_mask"][row, start] and packed["input_ids"][row, start:][: len(ids)].tolist() == ids:
                    found[tuple(ids)] = output.logits[row, start : start + len(ids)].log_softmax(-1)
    alone = collate([{"input_ids": ids, "labels": ids} for ids in examples])
    expected = model(**alone)
    assert len(found) == len(examples)
    pairs = [(found[tuple(ids)], expected.logits[row, : len(ids)].log_softmax(-1)) for row, ids in enumerate(examples)]
    config = TrainConfig(model="base", data=("data",), output="out", packing=True)
    if family == "gpt_oss" and not all(torch.allclose(*pair, atol=1e-5, rtol=1e-5) for pair in pairs):
        with pytest.raises(PerftError, match="the examples of a row would see each other"):
            check_packing(config, base)
        return
    check_packing(config, base)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
