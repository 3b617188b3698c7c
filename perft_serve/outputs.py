"""The engine's token events into completions: text, stop strings, log-probabilities, finish reasons.

In: the `TokenEvent`s of one sequence. Out: what each adds to the completion (`Delta`), and the results of the offline class.
The offline class and the server both pass through here. Knows no HTTP, no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perft_serve.engine.events import FinishReason, Routing, TokenEvent, TokenLogprobs
from perft_serve.engine.params import SamplingParams
from perft_serve.text import Detokenizer, StopStrings, TextTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRouting:
    """Which adapter experts the tokens of a sequence took, and with what weights.

    Token number `start + t` of the sequence, prompt and completion counted as one, took in layer `layers[l]` the adapter
    experts `ids[t][l]` (-1: none) with `weights[t][l]`. The last token is not computed, so it took none.
    """

    start: int
    layers: list[int]
    ids: list[list[list[int]]]
    weights: list[list[list[float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Args:
        index: which of the `n` completions this is.
        text: empty if the base has no tokenizer.
        token_ids: all that were generated, a stop token or the tokens of a stop string included.
        logprobs: per token, `{token_id: log-probability}` of the token and of the likeliest ones; if asked for.
        cumulative_logprob: sum over the tokens; if asked for.
        finish_reason: `stop`, `length`, `abort`, or `error` (`error` says why).
        stop_reason: the stop string or the stop token's id; `None` after an end-of-sequence token.
        routing: which adapter experts the tokens took, if asked for; the prompt's are in the first completion only.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    cumulative_logprob: float | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    error: str | None = None
    routing: TokenRouting | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A prompt and its completions.

    Args:
        prompt: as text, if it was given as text or as chat messages in the model's template.
        prompt_logprobs: if asked for, one entry per prompt token: the first `None`, then
            `{token_id: log-probability}` of the token and of the likeliest ones.
        adapter: the adapter that answered; `None` for the base.
        num_cached_tokens: how many of the prompt's tokens were found in the prefix cache, by the completion that found
            the fewest.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, float] | None] | None
    outputs: list[CompletionOutput]
    adapter: str | None
    num_cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one event adds to a completion.

    Args:
        text: text that is certain now; it may lag behind the tokens.
        token_id: the new token, if the event has one.
        text_offset: where the token's text starts in the completion, in characters.
        logprobs: of the new token, if asked for.
        prompt_logprobs: on the first delta, if asked for.
        finish_reason: set on the last delta.
        num_cached_tokens: how many of the prompt's tokens were found in the prefix cache; on the first delta.
        adapter_digest: identity of what the adapter computes; on the first delta.
        routing: which adapter experts some tokens took, if asked for.
    """

    text: str
    token_id: int | None
    text_offset: int
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: str | None
    num_cached_tokens: int | None = None
    adapter_digest: str | None = None
    routing: Routing | None = None


class CompletionStream:
    """Follows one sequence from its first event to its last, or to a stop string.

    After each `push` the caller looks at `stopped`: a stop string was found, which the engine knows nothing of, so the
    caller aborts the engine's request and pushes no more events.

    Args:
        tokenizer: `None`: the completion has no text.
        kept_ids: special tokens that are in the text, though others are not.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, prompt_ids, skip_special_tokens=params.skip_special_tokens, kept_ids=kept_ids)
        )
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._include_stop_token = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_characters = 0
        self.num_tokens = 0
        self.finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the completion."""
        return self._stops.matched is not None

    def push(self, event: TokenEvent) -> Delta:
        """What the event adds."""
        assert not self.finished, f"an event of {event.request_id} after its last"
        text_offset = self._num_characters
        finish_reason: FinishReason | None = event.finish_reason
        stop_reason: int | str | None = event.stop_reason
        piece = self._decode(event)
        # as with stop tokens, which are not among the first `min_tokens`
        text = self._stops.push(piece, exempt=0 < self.num_tokens <= self._min_tokens)
        if self._stops.matched is not None:
            finish_reason, stop_reason = "stop", self._stops.matched
        elif finish_reason is not None:
            text += self._stops.flush()
        self.finished = finish_reason is not None
        return Delta(
            text=text,
            token_id=event.token_id,
            text_offset=text_offset,
            logprobs=event.logprobs,
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            error=event.error,
            num_cached_tokens=event.num_cached_tokens,
            adapter_digest=event.adapter_digest,
            routing=event.routing,
        )

    def _decode(self, event: TokenEvent) -> str:
        piece = ""
        if event.token_id is not None:
            self.num_tokens += 1
            is_stop_token = event.finish_reason == "stop" and not event.completes
            if self._detokenizer is not None and (self._include_stop_token or not is_stop_token):
                piece = self._detokenizer.step(event.token_id)
        if self._detokenizer is not None and event.finish_reason is not None:
            piece += self._detokenizer.flush()
        self._num_characters += len(piece)
        return piece


class CompletionCollector:
    """Puts a whole completion together, for those who do not stream."""

    def __init__(
        self, index: int, tokenizer: TextTokenizer | None, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._index = index
        self._stream = CompletionStream(tokenizer, prompt_ids, params)
        self._wants_logprobs = params.logprobs is not None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._routing: list[Routing] = []
        self._last: Delta | None = None
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.num_cached_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the completion."""
        return self._stream.stopped

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to come."""
        return self._stream.finished

    def push(self, event: TokenEvent) -> None:
        """Adds what the event brings."""
        delta = self._stream.push(event)
        self._texts.append(delta.text)
        if delta.token_id is not None:
            self._token_ids.append(delta.token_id)
        if delta.logprobs is not None:
            self._logprobs.append(delta.logprobs)
        if delta.routing is not None:
            self._routing.append(delta.routing)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.num_cached_tokens is not None:
            self.num_cached_tokens = delta.num_cached_tokens
        self._last = delta

    def output(self) -> CompletionOutput:
        """The completion; only when finished."""
        assert self._last is not None, "no event yet"
        assert self._last.finish_reason is not None, "not finished"
        wanted = self._wants_logprobs
        return CompletionOutput(
            index=self._index,
            text="".join(self._texts),
            token_ids=self._token_ids,
            logprobs=[logprob_dict(entry) for entry in self._logprobs] if wanted else None,
            cumulative_logprob=sum(entry.logprob for entry in self._logprobs) if wanted else None,
            finish_reason=self._last.finish_reason,
            stop_reason=self._last.stop_reason,
            error=self._last.error,
            routing=token_routing(self._routing),
        )


def token_routing(parts: Sequence[Routing]) -> TokenRouting | None:
    """What the engine told piece by piece; `None` if it told nothing."""
    if not parts:
        return None
    num_layers, width = len(parts[0].layers), parts[0].width
    ids, weights = (b"".join(getattr(part, name) for part in parts) for name in ("ids", "weights"))
    shape = (len(ids) // (4 * num_layers * width), num_layers, width)
    return TokenRouting(
        start=parts[0].start,
        layers=list(parts[0].layers),
        ids=memoryview(ids).cast("i", shape).tolist(),  # type: ignore[arg-type]  # a tuple is as good as a list
        weights=memoryview(weights).cast("f", shape).tolist(),  # type: ignore[arg-type]
    )


def logprob_dict(entry: TokenLogprobs) -> dict[int, float]:
    """`{token_id: log-probability}` of a position: the likeliest first, the token that is there always among them."""
    return {**dict(entry.top), entry.token_id: entry.logprob}
