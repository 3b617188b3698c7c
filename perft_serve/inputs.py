"""A user's prompt and parameters into engine requests, checked before the engine sees any of them.

In: text or token ids, `SamplingParams`. Out: `EngineRequest`s. The offline class and the server both pass through here, so
both refuse the same things in the same words. Knows no HTTP, no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from perft_serve.engine.events import EngineRequest
from perft_serve.engine.params import RequestError, SamplingParams
from perft_serve.text import TextTokenizer


class InputProcessor:
    """Turns prompts into requests that the engine will take.

    Args:
        tokenizer: the base's; `None`: prompts are token ids only.
        max_model_len: the longest prompt plus completion, in tokens.
        vocab_size: token ids are below this.
    """

    def __init__(self, tokenizer: TextTokenizer | None, *, max_model_len: int, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size

    def prompt_ids(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            RequestError: the prompt is empty, is text for a base without a tokenizer, or has an id that is not in the
                vocabulary.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty: send at least one character", param="prompt")
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: send the prompt as token ids", param="prompt")
            ids = tuple(self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens))
        else:
            ids = tuple(prompt)
        self._check_ids(ids)
        return ids

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation, open for the assistant's answer.

        Raises:
            RequestError: there is no tokenizer or no chat template, or the template refuses the messages.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer: use completions with token ids", param="messages")
        ids = tuple(self.tokenizer.encode_chat(messages))
        self._check_ids(ids)
        return ids

    def room(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens the context has left after the prompt; negative if the prompt alone is too long."""
        return self.max_model_len - len(prompt_ids)

    def engine_requests(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        *,
        adapter: str | None,
        arrival: float,
    ) -> list[EngineRequest]:
        """One engine request for each of the `params.n` completions, named `request_id-0`, `request_id-1`, ...

        Raises:
            RequestError: the prompt does not fit the context, or the parameters ask for what cannot be had.
        """
        room = self.room(prompt_ids)
        needed = 0 if params.max_tokens == 0 else 1
        if room < needed:
            raise self._too_long(len(prompt_ids), by=needed - room)
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"max_tokens is {params.max_tokens}, but the context of {self.max_model_len} tokens has room for {room} after "
                f"the prompt's {len(prompt_ids)}",
                param="max_tokens",
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("this model has no tokenizer: use stop_token_ids in place of stop", param="stop")
        return [
            EngineRequest(
                request_id=f"{request_id}-{choice}",
                prompt_ids=prompt_ids,
                params=params,
                adapter=adapter,
                choice=choice,
                arrival=arrival,
            )
            for choice in range(params.n)
        ]

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        if not ids:
            raise RequestError("the prompt is empty: send at least one token", param="prompt")
        if len(ids) > self.max_model_len:  # before looking at each of what may be millions
            raise self._too_long(len(ids), by=len(ids) - self.max_model_len)
        for position, token_id in enumerate(ids):
            if type(token_id) is not int:
                raise RequestError(
                    f"token ids must be integers, got {token_id!r} at position {position} of the prompt", param="prompt"
                )
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"token id {token_id} at position {position} of the prompt is not in the vocabulary, which has ids 0 "
                    f"to {self.vocab_size - 1}",
                    param="prompt",
                )

    def _too_long(self, num_tokens: int, *, by: int) -> RequestError:
        return RequestError(
            f"the prompt has {num_tokens} tokens, but the context is {self.max_model_len} tokens, prompt and completion "
            f"together: shorten the prompt by {by} or more",
            param="prompt",
        )
