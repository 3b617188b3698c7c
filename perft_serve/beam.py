"""Beam search over the engine, for scripts: what Transformers' `generate(num_beams=...)` finds, for many prompts at once.

In: an `LLM`, prompts as token ids, an adapter each. Out: the best continuation of each. The engine knows no beams: a step of
the search is a batch of requests for one token each with its log-probabilities, whose prompts the prefix cache has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from perft_serve.engine.params import MAX_LOGPROBS, RequestError, SamplingParams
from perft_serve.llm import LLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Beam:
    """A continuation.

    Args:
        token_ids: an end-of-sequence token that ends it included.
        score: sum of its log-probabilities; of a finished one over its length to the power of the length penalty.
    """

    token_ids: tuple[int, ...]
    score: float


@dataclass(kw_only=True, slots=True)
class _Search:
    """The search for one prompt."""

    prompt: list[int]
    adapter: str | None
    max_new_tokens: int
    running: list[Beam] = field(default_factory=lambda: [Beam(token_ids=(), score=0.0)])
    finished: list[Beam] = field(default_factory=list)
    done: bool = False


def beam_search(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    *,
    adapters: Sequence[str | None],
    num_beams: int,
    max_new_tokens: Sequence[int],
    length_penalty: float = 1.0,
) -> list[Beam]:
    """The best continuation of each prompt, as Transformers searches with `early_stopping=False`.

    Args:
        adapters: one per prompt; `None` is the base.
        max_new_tokens: one per prompt.

    Raises:
        RequestError: so many beams need more log-probabilities than the engine gives, or a prompt cannot be served.
    """
    eos = llm.engine.eos_token_ids
    # so many candidates that `num_beams` of them go on, whatever ends
    num_candidates = max(2, 1 + len(eos)) * num_beams
    if num_candidates > MAX_LOGPROBS:
        most = MAX_LOGPROBS // max(2, 1 + len(eos))
        raise RequestError(f"num_beams may be at most {most} with this base, got {num_beams}", param="num_beams")
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=num_candidates)
    searches = [
        _Search(prompt=list(prompt), adapter=adapter, max_new_tokens=most)
        for prompt, adapter, most in zip(prompts, adapters, max_new_tokens, strict=True)
    ]
    while active := [search for search in searches if not search.done]:
        beams = [(search, beam) for search in active for beam in search.running]
        outputs = llm.generate(
            [[*search.prompt, *beam.token_ids] for search, beam in beams],
            params,
            adapter=[search.adapter for search, _ in beams],
        )
        candidates: dict[int, list[Beam]] = {id(search): [] for search in active}
        for (search, beam), output in zip(beams, outputs, strict=True):
            completion = output.outputs[0]
            if completion.error is not None or completion.logprobs is None:
                raise RequestError(completion.error or "the engine gave no log-probabilities")
            candidates[id(search)] += [
                Beam(token_ids=(*beam.token_ids, token_id), score=beam.score + logprob)
                for token_id, logprob in completion.logprobs[0].items()
            ]
        for search in active:
            best = sorted(candidates[id(search)], key=lambda beam: -beam.score)[:num_candidates]
            _advance(search, best, num_beams, eos, length_penalty)
    return [max(search.finished, key=lambda beam: beam.score) for search in searches]


def _advance(
    search: _Search, candidates: Sequence[Beam], num_beams: int, eos: frozenset[int], length_penalty: float
) -> None:
    """One step: which candidates are finished, which go on, and whether any that does can still win."""
    length = len(candidates[0].token_ids)
    ends = [beam.token_ids[-1] in eos or length == search.max_new_tokens for beam in candidates]
    for beam, is_end in list(zip(candidates, ends, strict=True))[:num_beams]:
        if is_end:
            search.finished.append(Beam(token_ids=beam.token_ids, score=beam.score / length**length_penalty))
    search.finished = sorted(search.finished, key=lambda beam: -beam.score)[:num_beams]
    search.running = [beam for beam, is_end in zip(candidates, ends, strict=True) if not is_end][:num_beams]
    if not search.running:
        search.done = True
        return
    full = len(search.finished) == num_beams
    search.done = full and search.running[0].score / length**length_penalty <= search.finished[-1].score
