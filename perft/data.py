"""Training data: JSON and JSONL files of three kinds, turned into token ids and labels.

In: paths, a tokenizer. Out: a `datasets.Dataset` of `input_ids` and `labels`, what was cut, and a collator that pads. It
knows no model.

The kind of a file is told by the fields of its records, and all records of a file are of one kind:
    alpaca    instruction, output, optional input and answer    the paper's data and prompt (LLM-Adapters)
    prompt    prompt, completion                                 plain text continued by plain text
    chat      messages: [{role, content}, ...]                   the tokenizer's chat template

Text becomes ids the way a server will see it. `prompt` and `chat`: what stands before an answer is tokenised by itself, as
in a request, and the answer after it. `alpaca`: the whole text at once, as the authors train (their evaluation prompt goes
on after "### Response:", in the middle of what training saw as one text).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perft.errors import PerftError

if TYPE_CHECKING:
    from datasets import Dataset

LossOn = Literal["all", "answer"]
IGNORED_LABEL = -100

REQUIRED_FIELDS = {
    "chat": frozenset({"messages"}),
    "prompt": frozenset({"prompt", "completion"}),
    "alpaca": frozenset({"instruction", "output"}),
}
# `answer` is the label that the authors' evaluation compares with; it stands in the paper's files and is not trained on.
OPTIONAL_FIELDS = {"chat": frozenset[str](), "prompt": frozenset[str](), "alpaca": frozenset({"input", "answer"})}

_ALPACA_INDENT = " " * 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A piece of an example's text, tokenised by itself.

    Args:
        text: what it says.
        answer: whether the model is to say it.
        special_tokens: whether the tokenizer adds its own (a BOS), as it does to a request's prompt.
    """

    text: str
    answer: bool
    special_tokens: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedData:
    """A data set ready to train on, and what became of the records.

    Args:
        dataset: columns `input_ids` and `labels` (-100 where there is no loss), one row per example.
        num_truncated: examples cut to `max_length`.
        num_dropped: examples left out because nothing to learn was left after the cut.
    """

    dataset: Dataset
    num_truncated: int
    num_dropped: int


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The text before the answer, letter for letter as the authors train with it (template of LLM-Adapters).

    The 16 blanks of indentation, and the one or two after "request.", come from the authors' source and are part of what
    published adapters learned.
    """
    if input:
        parts = [
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request. ",
            "",
            "### Instruction:",
            instruction,
            "",
            "### Input:",
            input,
        ]
    else:
        parts = [
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.  ",
            "",
            "### Instruction:",
            instruction,
        ]
    head, blank, *rest = parts
    return "\n".join([head, blank, *(_ALPACA_INDENT + line for line in [*rest, "", "### Response:", ""])])


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `.jsonl` file (one object a line) or a `.json` file (one list of objects), checked.

    Raises:
        PerftError: the file is missing or empty, or a record is not of the file's kind; names the line or item.
    """
    file = Path(path)
    if not file.is_file():
        raise PerftError(f"data file not found: {file}")
    records = []
    kind = None
    for where, record in _raw_records(file):
        if not isinstance(record, dict):
            raise PerftError(f"{file}, {where}: expected an object with named fields, got {type(record).__name__}")
        kind = kind or _detect_kind(record, f"{file}, {where}")
        _check_record(record, kind, f"{file}, {where}")
        records.append(record)
    if not records:
        raise PerftError(f"{file} holds no records")
    return records


def tokenize_files(
    paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, *, max_length: int, loss_on: LossOn
) -> TokenizedData:
    """Reads and tokenises data files, in their order.

    Args:
        paths: files, each of one kind; kinds may differ between files.
        tokenizer: of the base model; must have an end-of-sequence token.
        max_length: examples longer than this many tokens are cut at the end.
        loss_on: `all` (as in the paper) or `answer` (the model's turns only).

    Raises:
        PerftError: a file cannot be used, the tokenizer lacks what it needs, or nothing is left to learn.
    """
    if tokenizer.eos_token_id is None:
        raise PerftError("the tokenizer has no end-of-sequence token, so answers could not end")
    rows: list[dict[str, list[int]]] = []
    num_truncated = num_dropped = 0
    for path in paths:
        for number, record in enumerate(read_records(path), start=1):
            try:
                ids, is_answer = encode(record, tokenizer)
            except PerftError as error:
                raise PerftError(f"{path}, record {number}: {error}") from error
            num_truncated += len(ids) > max_length
            ids, is_answer = ids[:max_length], is_answer[:max_length]
            if loss_on == "all":
                is_answer = [True] * len(ids)
            # labels are shifted by the model: the first token is never predicted
            if not any(is_answer[1:]):
                num_dropped += 1
                continue
            labels = [token if learn else IGNORED_LABEL for token, learn in zip(ids, is_answer, strict=True)]
            rows.append({"input_ids": ids, "labels": labels})
    if not rows:
        raise PerftError(f"no example has an answer left within max_length={max_length} tokens; raise max_length")

    from datasets import Dataset  # of the extra `train`, which perft.train asks for

    return TokenizedData(dataset=Dataset.from_list(rows), num_truncated=num_truncated, num_dropped=num_dropped)


def encode(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of a checked record, ending with the end-of-sequence token, and which of them the model is to say."""
    if "instruction" in record:
        ids, is_answer = _encode_alpaca(record, tokenizer)
    elif "prompt" in record:
        segments = [
            Segment(text=record["prompt"], answer=False, special_tokens=True),
            Segment(text=record["completion"], answer=True),
        ]
        ids, is_answer = _encode_segments(segments, tokenizer)
    else:
        ids, is_answer = _encode_segments(chat_segments(record["messages"], tokenizer), tokenizer)
        ids, is_answer = _end_at_eos(ids, is_answer, tokenizer.eos_token_id)
    if ids[-1] != tokenizer.eos_token_id:
        ids, is_answer = [*ids, tokenizer.eos_token_id], [*is_answer, True]
    return ids, is_answer


def chat_segments(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """A conversation as alternating context and assistant turns, in the tokenizer's chat template.

    Raises:
        PerftError: there is no template, or it rewrites earlier turns, so that no prefix of it is what a server would see.
    """
    if not tokenizer.chat_template:
        raise PerftError("the tokenizer has no chat template; use prompt/completion records instead of messages")
    segments: list[Segment] = []
    seen = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:turn], tokenizer, add_generation_prompt=True)
        after = _render(messages[: turn + 1], tokenizer, add_generation_prompt=False)
        if not before.startswith(seen) or not after.startswith(before):
            raise PerftError(
                f"the chat template changes what stands before message {turn + 1} once it is answered, so training would "
                "see another text than serving; give one conversation per assistant turn, or use prompt/completion"
            )
        segments.append(Segment(text=before[len(seen) :], answer=False))
        segments.append(Segment(text=after[len(before) :], answer=True))
        seen = after
    return segments


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddingCollator:
    """Rows of different lengths as one batch, padded on the right.

    Args:
        pad_token_id: what stands in the padding; it is masked and has no label, so any id will do.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], length, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], length, 0),
            "labels": _padded([row["labels"] for row in rows], length, IGNORED_LABEL),
        }


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.long)


def _raw_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record with words for its place in the file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PerftError(f"{file} is not UTF-8 text: {error}") from error
    if file.suffix == ".json":
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise PerftError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}") from error
        if not isinstance(items, list):
            raise PerftError(f"{file}: a .json file must hold one list of objects; name it .jsonl if it has one a line")
        yield from ((f"item {number}", item) for number, item in enumerate(items, start=1))
        return
    if file.suffix != ".jsonl":
        raise PerftError(f"{file}: data files are .jsonl or .json, not {file.suffix or 'without a suffix'!r}")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise PerftError(f"{file}, line {number}: not valid JSON: {error.msg} (column {error.colno})") from error


def _detect_kind(record: dict[str, Any], where: str) -> str:
    for kind, required in REQUIRED_FIELDS.items():
        if required & record.keys():
            return kind
    raise PerftError(
        f"{where}: cannot tell what kind of data this is from the fields {sorted(record)}; known are "
        "instruction/output (with input), prompt/completion, and messages"
    )


def _check_record(record: dict[str, Any], kind: str, where: str) -> None:
    required, optional = REQUIRED_FIELDS[kind], OPTIONAL_FIELDS[kind]
    for field in record:
        if field not in required | optional:
            raise PerftError(
                f"{where}: field {field!r} does not belong to {kind} data ({', '.join(sorted(required | optional))})"
            )
    for field in sorted(required):
        if field not in record:
            raise PerftError(f"{where}: field {field!r} is missing ({kind} data)")
    if kind == "chat":
        _check_messages(record["messages"], where)
        return
    for field, value in record.items():
        if not isinstance(value, str):
            raise PerftError(f"{where}: field {field!r} must be text, got {type(value).__name__}")
        if field in required and not value:
            raise PerftError(f"{where}: field {field!r} is empty")


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise PerftError(f"{where}: 'messages' must be a non-empty list")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise PerftError(f"{where}: message {number} must have exactly the fields role and content")
        if message["role"] not in ("system", "user", "assistant"):
            raise PerftError(f"{where}: message {number} has role {message['role']!r}, not system, user or assistant")
        if not isinstance(message["content"], str):
            raise PerftError(f"{where}: the content of message {number} must be text")
    if messages[-1]["role"] != "assistant":
        raise PerftError(f"{where}: the last message must be the assistant's, it is what is learned")


def _encode_alpaca(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    prompt = alpaca_prompt(record["instruction"], record.get("input", ""))
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = list(tokenizer(prompt + record["output"])["input_ids"])
    # a token that straddles the border (blanks and the first word) belongs to the answer
    shared = 0
    while shared < min(len(prompt_ids), len(ids)) and prompt_ids[shared] == ids[shared]:
        shared += 1
    return ids, [position >= shared for position in range(len(ids))]


def _encode_segments(segments: list[Segment], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    is_answer: list[bool] = []
    for segment in segments:
        new = tokenizer(segment.text, add_special_tokens=segment.special_tokens)["input_ids"]
        ids += new
        is_answer += [segment.answer] * len(new)
    return ids, is_answer


def _end_at_eos(ids: list[int], is_answer: list[bool], eos: int) -> tuple[list[int], list[bool]]:
    """Without what a chat template puts after the end of the last answer: generation has stopped by then."""
    answer_start = len(ids)
    while answer_start > 0 and is_answer[answer_start - 1]:
        answer_start -= 1
    if eos not in ids[answer_start:]:
        return ids, is_answer
    end = len(ids) - ids[::-1].index(eos)
    return ids[:end], is_answer[:end]


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise PerftError(f"the chat template refuses the conversation: {error}") from error
    return str(text)
