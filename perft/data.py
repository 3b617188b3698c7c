"""Training data of three kinds, from JSON, JSONL and Parquet files and from the Hub, turned into token ids and labels.

In: paths or names, a tokenizer. Out: rows of `input_ids` and `labels`, all at once (`datasets.Dataset`) or as a stream, what
was cut, and a collator that pads. Rows can be packed. It knows no model.

The kind of a file is told by the fields of its records, and all records of a file are of one kind:
    alpaca    instruction, output, optional input and answer    the paper's data and prompt (LLM-Adapters)
    prompt    prompt, completion                                 plain text continued by plain text
    chat      messages: [{role, content}, ...]                   the tokenizer's chat template

Text becomes ids the way a server will see it. `prompt` and `chat`: what stands before an answer is tokenised by itself, as
in a request, and the answer after it. `alpaca`: the whole text at once, as the authors train (their evaluation prompt goes
on after "### Response:", in the middle of what training saw as one text).
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from perft.errors import PerftError

if TYPE_CHECKING:
    from datasets import Dataset

LossOn = Literal["all", "answer"]
IGNORED_LABEL = -100
Row: TypeAlias = "dict[str, list[int]]"  # input_ids and labels; packed: position_ids as well
_OPEN_ROWS = 64  # that packing fills at a time
_HUB_DATA = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@:\s]+))?:(?:(?P<config>[^/:\s]+)/)?(?P<split>[^/:\s]+)"
)

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


@dataclass(frozen=True, kw_only=True, slots=True)
class HubData:
    """One split of a data set on the Hub, as `org/name[@revision]:[config/]split` names it."""

    repo: str
    revision: str | None
    config: str | None
    split: str

    @classmethod
    def parse(cls, source: str) -> HubData | None:
        """`source` as one; `None` if it is not written like that, or is a file."""
        match = None if Path(source).exists() else _HUB_DATA.fullmatch(source)
        return None if match is None else cls(**match.groupdict())

    def load(self, *, streaming: bool) -> Iterator[dict[str, Any]]:
        """Its rows.

        Raises:
            PerftError: it cannot be had.
        """
        import datasets  # of the extra `train`

        try:
            rows = datasets.load_dataset(
                self.repo, self.config, split=self.split, revision=self.revision, streaming=streaming
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PerftError(f"cannot load the data set {self.repo!r} from the Hub: {reason}") from error
        return iter(rows)


def iter_records(
    source: str | Path, columns: Sequence[str] = (), *, streaming: bool = False
) -> Iterator[dict[str, Any]]:
    """The records of a file or of a data set on the Hub, one by one and checked.

    Args:
        source: a `.jsonl` file (one object a line), a `.json` file (one list of objects), a `.parquet` file, or a `HubData`.
        columns: fields to take, as `theirs=ours`; none: all of them, under their own names.
        streaming: read a Hub data set over the network while it is used, rather than fetch it first.

    Raises:
        PerftError: it is missing or empty, or a record is not of the kind that the first one is; names the line or item.
    """
    names = [column.split("=") for column in columns]
    kind = None
    for where, record in _raw_records(str(source), streaming):
        if not isinstance(record, dict):
            raise PerftError(f"{source}, {where}: expected an object with named fields, got {type(record).__name__}")
        for theirs, _ in names:
            if theirs not in record:
                raise PerftError(f"{source}, {where}: there is no field {theirs!r} (columns); it has {sorted(record)}")
        if names:
            record = {ours: record[theirs] for theirs, ours in names}
        kind = kind or _detect_kind(record, f"{source}, {where}")
        _check_record(record, kind, f"{source}, {where}")
        yield record
    if kind is None:
        raise PerftError(f"{source} holds no records")


def read_records(source: str | Path, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All that `iter_records` gives."""
    return list(iter_records(source, columns))


def tokenize_files(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn,
    columns: Sequence[str] = (),
) -> TokenizedData:
    """Reads and tokenises data, in its order.

    Args:
        paths: files and data sets of the Hub, each of one kind; kinds may differ between them.
        tokenizer: of the base model; must have an end-of-sequence token.
        max_length: examples longer than this many tokens are cut at the end.
        loss_on: `all` (as in the paper) or `answer` (the model's turns only).
        columns: fields to take, as in `iter_records`.

    Raises:
        PerftError: a file cannot be used, the tokenizer lacks what it needs, or nothing is left to learn.
    """
    _check_eos(tokenizer)
    rows: list[Row] = []
    num_truncated = num_dropped = 0
    for path in paths:
        for row, truncated in _tokenized_rows(path, tokenizer, max_length, loss_on, columns, streaming=False):
            num_truncated += truncated
            if row is None:
                num_dropped += 1
            else:
                rows.append(row)
    if not rows:
        raise PerftError(f"no example has an answer left within max_length={max_length} tokens; raise max_length")

    from datasets import Dataset  # of the extra `train`, which perft.train asks for

    return TokenizedData(dataset=Dataset.from_list(rows), num_truncated=num_truncated, num_dropped=num_dropped)


class StreamedRows(IterableDataset[Row]):
    """Training rows that are read and tokenised as they are needed, shuffled within a buffer, packed if asked; no end.

    After the last record it begins anew, in another order. Orders depend on the seed only, so a run that is resumed sees
    what it would have seen.

    Args:
        buffer_size: rows that are held to draw the next one from.
        seed: of the order.
        packing: fill rows of `max_length` with several examples.
        others: as in `tokenize_files`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        loss_on: LossOn,
        columns: Sequence[str],
        buffer_size: int,
        seed: int,
        packing: bool,
    ) -> None:
        _check_eos(tokenizer)
        self._paths, self._tokenizer, self._columns = tuple(paths), tokenizer, tuple(columns)
        self._max_length, self._loss_on = max_length, loss_on
        self._buffer_size, self._seed, self._packing = buffer_size, seed, packing

    def __iter__(self) -> Iterator[Row]:
        for epoch in itertools.count():
            rows = self._shuffled(random.Random(f"{self._seed} {epoch}"))
            yield from pack(rows, self._max_length) if self._packing else rows

    def _shuffled(self, generator: random.Random) -> Iterator[Row]:
        buffer: list[Row] = []
        for row in self._rows():
            if len(buffer) < self._buffer_size:
                buffer.append(row)
                continue
            place = generator.randrange(self._buffer_size)
            yield buffer[place]
            buffer[place] = row
        generator.shuffle(buffer)
        yield from buffer

    def _rows(self) -> Iterator[Row]:
        learned = False
        for path in self._paths:
            for row, _ in _tokenized_rows(
                path, self._tokenizer, self._max_length, self._loss_on, self._columns, streaming=True
            ):
                if row is not None:
                    learned = True
                    yield row
        if not learned:
            raise PerftError(f"no example has an answer left within max_length={self._max_length} tokens")


def pack(rows: Iterable[Row], max_length: int) -> Iterator[Row]:
    """Rows that hold several examples one after the other, at most `max_length` tokens; positions begin anew with each.

    An example goes into the fullest open row that has room for it. No example is cut, and the first token of each has no
    label: nothing stands before it to be predicted from.
    """
    open_rows: list[Row] = []
    for row in rows:
        length = len(row["input_ids"])
        fitting = [held for held in open_rows if len(held["input_ids"]) + length <= max_length]
        if fitting:
            held = max(fitting, key=lambda each: len(each["input_ids"]))
        else:
            if len(open_rows) == _OPEN_ROWS:
                fullest = max(range(_OPEN_ROWS), key=lambda place: len(open_rows[place]["input_ids"]))
                yield open_rows.pop(fullest)
            held = {"input_ids": [], "labels": [], "position_ids": []}
            open_rows.append(held)
        held["input_ids"] += row["input_ids"]
        held["labels"] += [IGNORED_LABEL, *row["labels"][1:]]
        held["position_ids"] += range(length)
    yield from open_rows


def _check_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise PerftError("the tokenizer has no end-of-sequence token, so answers could not end")


def _tokenized_rows(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: LossOn,
    columns: Sequence[str],
    *,
    streaming: bool,
) -> Iterator[tuple[Row | None, bool]]:
    """Each record as a row (`None`: nothing to learn was left after the cut), and whether it was cut."""
    for number, record in enumerate(iter_records(path, columns, streaming=streaming), start=1):
        try:
            ids, is_answer = encode(record, tokenizer)
        except PerftError as error:
            raise PerftError(f"{path}, record {number}: {error}") from error
        truncated = len(ids) > max_length
        ids, is_answer = ids[:max_length], is_answer[:max_length]
        if loss_on == "all":
            is_answer = [True] * len(ids)
        # labels are shifted by the model: the first token is never predicted
        if not any(is_answer[1:]):
            yield None, truncated
            continue
        labels = [token if learn else IGNORED_LABEL for token, learn in zip(ids, is_answer, strict=True)]
        yield {"input_ids": ids, "labels": labels}, truncated


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

    Packed rows come with `position_ids` and without an attention mask: from positions that begin anew Transformers makes an
    attention that is block-diagonal. Each padding token begins anew as well, and `token_mask` tells the adapter's router.

    Args:
        pad_token_id: what stands in the padding; it is masked and has no label, so any id will do.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        if "position_ids" in rows[0]:
            return {
                "input_ids": _padded([row["input_ids"] for row in rows], length, self.pad_token_id),
                "position_ids": _padded([row["position_ids"] for row in rows], length, 0),
                "token_mask": _padded([[1] * len(row["input_ids"]) for row in rows], length, 0).bool(),
                "labels": _padded([row["labels"] for row in rows], length, IGNORED_LABEL),
            }
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], length, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], length, 0),
            "labels": _padded([row["labels"] for row in rows], length, IGNORED_LABEL),
        }


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.long)


def _raw_records(source: str, streaming: bool) -> Iterator[tuple[str, Any]]:
    """Each record with words for its place in the file."""
    hub = HubData.parse(source)
    if hub is not None:
        yield from ((f"row {number}", row) for number, row in enumerate(hub.load(streaming=streaming), start=1))
        return
    file = Path(source)
    if not file.is_file():
        raise PerftError(f"data file not found: {file}")
    readers = {".json": _json_records, ".jsonl": _jsonl_records, ".parquet": _parquet_records}
    if file.suffix not in readers:
        raise PerftError(
            f"{file}: data files are .jsonl, .json or .parquet, not {file.suffix or 'without a suffix'!r}; a data set of the "
            "Hub is written org/name:split"
        )
    try:
        yield from readers[file.suffix](file)
    except UnicodeDecodeError as error:
        raise PerftError(f"{file} is not UTF-8 text: {error}") from error


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise PerftError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(items, list):
        raise PerftError(f"{file}: a .json file must hold one list of objects; name it .jsonl if it has one a line")
    yield from ((f"item {number}", item) for number, item in enumerate(items, start=1))


def _jsonl_records(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                raise PerftError(
                    f"{file}, line {number}: not valid JSON: {error.msg} (column {error.colno})"
                ) from error


def _parquet_records(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # comes with datasets
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise PerftError(f"{file}: not a Parquet file: {str(error).splitlines()[0]}") from error


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
