"""Log-probabilities in OpenAI's two shapes: parallel lists for completions, objects for chat.

In: `TokenLogprobs` of the engine. Out: reply models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from perft_serve.engine.events import TokenLogprobs
from perft_serve.server.protocol import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from perft_serve.text import Detokenizer, TextTokenizer

# JSON has no minus infinity
_LOWEST = -9999.0


class LogprobFormat:
    """How tokens are named: by their text, or as `token_id:N` where that is wanted or there is no text."""

    def __init__(self, tokenizer: TextTokenizer | None, *, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids

    def completion(
        self, entries: Sequence[tuple[int, TokenLogprobs | None]], offsets: Sequence[int]
    ) -> CompletionLogprobs:
        """Lists of one entry per token; a prompt's first token has no log-probability."""
        return CompletionLogprobs(
            text_offset=list(offsets),
            token_logprobs=[None if entry is None else max(entry.logprob, _LOWEST) for _, entry in entries],
            tokens=[self._name(token_id) for token_id, _ in entries],
            top_logprobs=[None if entry is None else self._top(entry) for _, entry in entries],
        )

    def prompt(self, entries: Sequence[TokenLogprobs | None], num_top: int) -> PromptLogprobs:
        """vLLM's shape for prompts: by token id, of the token that is there and of the `num_top` likeliest."""
        return [None if entry is None else self._by_id(entry, num_top) for entry in entries]

    def chat(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """One object per token."""
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._object(entry.token_id, entry.logprob).model_dump(),
                    top_logprobs=[self._object(token_id, logprob) for token_id, logprob in entry.top],
                )
                for entry in entries
            ]
        )

    def prompt_offsets(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> list[int]:
        """Where the text of each prompt token starts in the prompt's text."""
        if self._tokenizer is None:
            return [0] * len(prompt_ids)
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=skip_special_tokens)
        offsets, offset = [], 0
        for token_id in prompt_ids:
            offsets.append(offset)
            offset += len(detokenizer.step(token_id))
        return offsets

    def _by_id(self, entry: TokenLogprobs, num_top: int) -> dict[str, PromptLogprob]:
        found = {str(entry.token_id): self._ranked(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1):
            found.setdefault(str(token_id), self._ranked(token_id, logprob, rank))
        return found

    def _ranked(self, token_id: int, logprob: float, rank: int) -> PromptLogprob:
        text = None if self._tokenizer is None else self._tokenizer.token_text(token_id)
        return PromptLogprob(logprob=max(logprob, _LOWEST), rank=rank, decoded_token=text)

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        # The likeliest first: of tokens with the same text (pieces of characters) that one counts
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._name(token_id), max(logprob, _LOWEST))
        return top

    def _object(self, token_id: int, logprob: float) -> TopLogprob:
        text = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        return TopLogprob(token=self._name(token_id), logprob=max(logprob, _LOWEST), bytes=list(text))

    def _name(self, token_id: int) -> str:
        if self._as_token_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)


def shortened(entry: TokenLogprobs | None, num_top: int) -> TokenLogprobs | None:
    """With the `num_top` likeliest only: more may have been computed for another field of the request."""
    return None if entry is None else replace(entry, top=entry.top[:num_top])
