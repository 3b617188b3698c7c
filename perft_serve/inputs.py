"""A user's prompt and parameters into engine requests, checked before the engine sees any of them.

In: text or token ids, `SamplingParams`. Out: `EngineRequest`s. The offline class and the server both pass through here, so
both refuse the same things in the same words. Knows no HTTP, no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from perft_serve.adapters.catalog import AdapterRef
from perft_serve.engine.events import EngineRequest
from perft_serve.engine.limits import Limits
from perft_serve.engine.params import RequestError, SamplingParams
from perft_serve.text import TextTokenizer, check_unicode


class InputProcessor:
    """Turns prompts into requests that the engine will take.

    Args:
        tokenizer: the base's; `None`: prompts are token ids only.
        limits: what the engine will take.
    """

    def __init__(self, tokenizer: TextTokenizer | None, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self._limits = limits

    def prompt_ids(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a prompt, cut if `params` say so.

        Raises:
            RequestError: the prompt is empty, is text for a base without a tokenizer, is longer than the context, or has an id
                that is not in the vocabulary.
        """
        params = params or SamplingParams()
        at_most = self._limits.longest_prompt(params)
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty: send at least one character", param="prompt")
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: send the prompt as token ids", param="prompt")
            self._limits.check_characters(len(prompt), self.tokenizer.max_token_characters)
            ids = tuple(
                self.tokenizer.encode(
                    prompt, add_special_tokens=add_special_tokens, at_most=at_most, side=params.truncation_side
                )
            )
        elif at_most is not None and len(prompt) > at_most:
            ids = tuple(prompt[-at_most:] if params.truncation_side == "left" else prompt[:at_most])
        else:
            ids = tuple(prompt)
        self._limits.check_prompt(ids)
        return ids

    def text_of(self, ids: Sequence[int]) -> str | None:
        """The text of a prompt that was cut, without special tokens; `None`: there is no tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode([token_id for token_id in ids if token_id not in self.tokenizer.special_ids])

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **template: Any
    ) -> tuple[int, ...]:
        """Token ids of a conversation, open for the assistant's answer unless told otherwise; cut if `params` say so, wherever
        that falls.

        Args:
            template: tools, variables and what else `TextTokenizer.render_chat` takes.

        Raises:
            RequestError: there is no tokenizer or no chat template, the template refuses the messages, or they are longer than
                the context.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer: use completions with token ids", param="messages")
        text = self.tokenizer.render_chat(messages, **template)
        self._limits.check_characters(len(text), self.tokenizer.max_token_characters)
        params = params or SamplingParams()
        at_most = self._limits.longest_prompt(params)
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False, at_most=at_most, side=params.truncation_side))
        self._limits.check_prompt(ids)
        return ids

    def engine_requests(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        *,
        adapter: AdapterRef | None,
        arrival: float,
        cache_scope: str = "",
        priority: int = 0,
        tenant: str = "",
        scored_once: bool = True,
    ) -> list[EngineRequest]:
        """One engine request for each of the `params.n` completions, named `request_id-0`, `request_id-1`, ...

        The rest of the arguments is what `EngineRequest` says.

        Args:
            scored_once: only the first request asks for the prompt's log-probabilities, which are the same for all.

        Raises:
            RequestError: the prompt does not fit the context, or the parameters ask for what cannot be had.
        """
        self._limits.check_length(prompt_ids, params)
        if params.stop and self.tokenizer is None:
            raise RequestError("this model has no tokenizer: use stop_token_ids in place of stop", param="stop")
        bad_words = self._bad_words(params.bad_words) if params.bad_words else ()
        self._limits.check_tokens(params, bad_words)
        if params.structured_outputs is not None and self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer, which structured outputs need", param=params.structured_outputs.param
            )
        self._limits.check_request(params, priority=priority, has_adapter=adapter is not None)
        others = params  # without a token to generate, they too are only there for that
        if scored_once and params.prompt_logprobs is not None and params.max_tokens != 0:
            others = replace(params, prompt_logprobs=None, prompt_logprobs_start=0)
        return [
            EngineRequest(
                request_id=f"{request_id}-{choice}",
                prompt_ids=prompt_ids,
                params=others if choice else params,
                adapter=adapter,
                choice=choice,
                arrival=arrival,
                bad_words=bad_words,
                cache_scope=cache_scope,
                priority=priority,
                tenant=tenant,
            )
            for choice in range(params.n)
        ]

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word, as it begins a text and as it follows a space."""
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer: bad words have no token ids", param="bad_words")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            check_unicode(word, param="bad_words")
            for text in (word.lstrip(), " " + word.lstrip()):
                found[tuple(self.tokenizer.encode(text, add_special_tokens=False))] = None
        found.pop((), None)  # a normaliser may leave nothing of a word
        return tuple(found)
