"""The paper's evaluation on our own engine: a base and any number of its adapters, all in the same batches.

In: an `LLM`, which of its adapters, items of tasks. Out: an `Example` for each question and model. Prompts and answer rules
are `perft.tasks`'; what the examples say together is `perft.scores`'. Knows no HTTP.

Three ways to an answer: `generate`, as in the paper (beam search over four beams, short replies, the answer by regular
expression); `score`, which takes the word of the paper's prompt (answer1, answer2, ...) that the model finds likeliest and
always has an answer; and `cloze`, which asks the bare question as lm-evaluation-harness does and takes the likeliest text. A
small model that has never been taught the paper's answer format is at chance in the first two and need not be in the third.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from perft.errors import PerftError
from perft.scores import Example
from perft.tasks import (
    COMMONSENSE_ENDING,
    NO_ANSWER,
    Item,
    Task,
    TaskData,
    cloze_prompt,
    extract_answer,
    is_correct,
    prompt,
    question_and_choices,
)
from perft_serve.beam import beam_search
from perft_serve.engine.params import SamplingParams
from perft_serve.llm import LLM

BASE = "base"
"""What the base is called among the models."""

Mode = Literal["generate", "score", "cloze"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """How to evaluate; the defaults are the paper's.

    Args:
        mode: `generate` a reply, `score` the choices' words (tasks of choices only), or score their texts (`cloze`: PIQA, ARC,
            OpenBookQA).
        num_beams: of the search for a reply; 1 is greedy.
        max_new_tokens: of a reply; `None`: what the authors let the task have.
        limit: of each task, so many questions, drawn by `seed`; `None`: all.

    Raises:
        PerftError: a value is out of its range.
    """

    mode: Mode = "generate"
    num_beams: int = 4
    max_new_tokens: int | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PerftError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """One question to one model."""

    model: str
    task: Task
    index: int
    item: Item

    @property
    def adapter(self) -> str | None:
        return None if self.model == BASE else self.model

    @property
    def prompt(self) -> str:
        return prompt(self.task, self.item)

    def example(self, predicted: str, **more: object) -> Example:
        return Example(
            model=self.model,
            task=self.task.name,
            index=self.index,
            answer=self.item.answer,
            predicted=predicted,
            correct=is_correct(self.task, predicted, self.item.answer),
            **more,  # type: ignore[arg-type]
        )


def draw(data: TaskData, limit: int | None, seed: int) -> list[int]:
    """Which items of a task are asked, in the order of the file; the same for the same file, limit and seed."""
    if limit is None or limit >= len(data.items):
        return list(range(len(data.items)))
    return sorted(random.Random(f"{seed}:{data.task.name}").sample(range(len(data.items)), limit))


def evaluate(
    llm: LLM,
    models: Sequence[str],
    tasks: Sequence[TaskData],
    settings: EvalSettings,
    done: Callable[[int], None] = lambda count: None,
) -> list[Example]:
    """Asks every model every question.

    Args:
        llm: holds the base and the adapters.
        models: names of adapters, and `BASE` for the base alone.
        tasks: what is asked.
        done: is told how many questions have been answered since it was last told.

    Returns:
        The examples by model, task and place in the file.

    Raises:
        PerftError: the base has no tokenizer, or a task has no choices to score.
        RequestError: the engine refuses a request.
    """
    if llm.tokenizer is None:
        raise PerftError(f"the base {llm.config.model!r} has no tokenizer, which evaluation needs")
    if settings.mode == "cloze":
        for data in tasks:
            cloze_prompt(data.task, "")  # refuses the tasks that have none
    if settings.mode == "score":
        unfit = [data.task.name for data in tasks if not data.task.is_choice]
        if unfit:
            raise PerftError(f"only tasks of choices can be scored, which {', '.join(unfit)} is not: leave --score out")
    questions = [
        _Question(model=model, task=data.task, index=index, item=data.items[index])
        for data in tasks
        for index in draw(data, settings.limit, settings.seed)
        for model in models  # the models side by side, so that batches are mixed
    ]
    answer = {"generate": _generate, "score": _score, "cloze": _cloze}[settings.mode]
    examples: list[Example] = []
    # a search ends its batch together, so a batch is what fits at once; what is greedy flows, and the batch only bounds memory
    at_once = llm.config.max_num_seqs // settings.num_beams if settings.mode == "generate" else llm.config.max_num_seqs
    size = 4 * at_once if settings.num_beams == 1 else max(1, at_once)
    for batch in _batches(questions, size):
        examples += answer(llm, batch, settings)
        done(len(batch))
    order = {model: place for place, model in enumerate(models)}
    return sorted(examples, key=lambda example: order[example.model])


def _batches(questions: Sequence[_Question], size: int) -> Iterator[Sequence[_Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _generate(llm: LLM, batch: Sequence[_Question], settings: EvalSettings) -> Iterator[Example]:
    lengths = [settings.max_new_tokens or question.task.max_new_tokens for question in batch]
    encoded = [
        _encode(llm, question.prompt, llm.engine.limits.max_model_len - length)
        for question, length in zip(batch, lengths, strict=True)
    ]
    adapters = [question.adapter for question in batch]
    prompts = [ids for ids, _ in encoded]
    if settings.num_beams > 1:
        found = beam_search(llm, prompts, adapters=adapters, num_beams=settings.num_beams, max_new_tokens=lengths)
        replies = [beam.token_ids for beam in found]
    else:
        outputs = llm.generate(
            prompts, [SamplingParams(max_tokens=length, temperature=0.0) for length in lengths], adapter=adapters
        )
        for output in outputs:
            if output.outputs[0].error is not None:
                raise PerftError(f"the engine could not answer for {output.adapter or BASE}: {output.outputs[0].error}")
        replies = [tuple(output.outputs[0].token_ids) for output in outputs]
    for question, (ids, truncated), token_ids in zip(batch, encoded, replies, strict=True):
        reply = _text(llm, token_ids)
        # the authors look through all that follows "### Response:", so a word may begin in what they wrote there
        ending = COMMONSENSE_ENDING if question.task.is_choice else ""
        yield question.example(
            extract_answer(question.task, ending + reply),
            reply=reply,
            num_prompt_tokens=len(ids),
            truncated=truncated,
        )


def _score(llm: LLM, batch: Sequence[_Question], settings: EvalSettings) -> Iterator[Example]:
    """The likeliest word after the paper's prompt."""
    asked = [(question.prompt, [f" {word}" for word in question.item.words]) for question in batch]
    for question, sums in zip(batch, _log_likelihoods(llm, batch, asked), strict=True):
        yield _choice(question, sums)


def _cloze(llm: LLM, batch: Sequence[_Question], settings: EvalSettings) -> Iterator[Example]:
    """The likeliest text after the bare question."""
    asked, lengths = [], []
    for question in batch:
        bare, choices = question_and_choices(question.task, question.item)
        asked.append((cloze_prompt(question.task, bare), [f" {choice}" for choice in choices]))
        lengths.append([len(choice) for choice in choices])
    for question, sums, its_lengths in zip(batch, _log_likelihoods(llm, batch, asked), lengths, strict=True):
        yield _choice(question, sums, dict(zip(question.item.words, its_lengths, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """Of one question: the log-probability of each continuation, the tokens before it, and whether any text lost its
    beginning."""

    sums: list[float]
    num_prompt_tokens: int
    truncated: bool


def _choice(question: _Question, found: _Sums, lengths: dict[str, int] | None = None) -> Example:
    scores = dict(zip(question.item.words, found.sums, strict=True))
    return question.example(
        max(scores, key=scores.__getitem__) if scores else NO_ANSWER,
        scores=scores,
        choice_lengths=lengths,
        num_prompt_tokens=found.num_prompt_tokens,
        truncated=found.truncated,
    )


def _log_likelihoods(
    llm: LLM, batch: Sequence[_Question], asked: Sequence[tuple[str, Sequence[str]]]
) -> Iterator[_Sums]:
    """What each question's model gives each continuation of its prompt: its tokens are those of the whole text that are not
    the prompt's."""
    prompts: list[list[int]] = []
    starts: list[int] = []
    cut: list[bool] = []
    for before_text, continuations in asked:
        before, _ = _encode(llm, before_text, None)
        for continuation in continuations:
            ids, _ = _encode(llm, before_text + continuation, None)
            start = _shared(before, ids)
            too_many = max(0, len(ids) - llm.engine.limits.max_model_len)
            prompts.append(ids[too_many:])
            starts.append(max(0, start - too_many))
            cut.append(too_many > 0)
    # what stands before the continuations is computed once for all of them, as far as it fills pages of the KV cache
    params = [
        SamplingParams(
            max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=min(start, len(prompt) - 1), temperature=0.0
        )
        for start, prompt in zip(starts, prompts, strict=True)
    ]
    counts = [len(continuations) for _, continuations in asked]
    adapters = [question.adapter for question, count in zip(batch, counts, strict=True) for _ in range(count)]
    outputs = llm.generate(prompts, params, adapter=adapters)
    sums = []
    for output, start in zip(outputs, starts, strict=True):
        if output.prompt_logprobs is None:
            raise PerftError(f"the engine could not score for {output.adapter or BASE}: {output.outputs[0].error}")
        entries = zip(output.prompt_token_ids[start:], output.prompt_logprobs[start:], strict=True)
        sums.append(sum(entry[token_id] for token_id, entry in entries if entry is not None))
    place = 0
    for count in counts:
        own = slice(place, place + count)
        yield _Sums(sums=sums[own], num_prompt_tokens=starts[place], truncated=any(cut[own]))
        place += count


def _encode(llm: LLM, text: str, room: int | None) -> tuple[list[int], bool]:
    """Token ids of a prompt, and whether it lost its beginning to fit into `room` tokens."""
    assert llm.tokenizer is not None
    if room is not None and room < 1:
        raise PerftError(
            f"the context of {llm.engine.limits.max_model_len} tokens has no room for a prompt beside the reply: lower "
            "--max-new-tokens"
        )
    ids = llm.tokenizer.encode(text)
    if room is None or len(ids) <= room:
        return ids, False
    return llm.tokenizer.encode(text, at_most=room, side="left"), True


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def _text(llm: LLM, token_ids: Sequence[int]) -> str:
    assert llm.tokenizer is not None
    return llm.tokenizer.decode([token_id for token_id in token_ids if token_id not in llm.tokenizer.special_ids])
