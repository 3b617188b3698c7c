"""What a base and its KV cache can take: checked at the front door, so that a client gets its answer at once, and by the
engine, which trusts nobody. Plain Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from perft_serve.engine.params import RequestError, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds on requests.

    Args:
        max_model_len: the longest prompt plus completion, in tokens.
        vocab_size: token ids are below this.
        num_pages: pages of the KV cache, where it is they and not the model that make it no longer.
        priorities: whether requests may have a priority.
    """

    max_model_len: int
    vocab_size: int
    num_pages: int | None = None
    priorities: bool = False

    def room(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens the context has left after the prompt; negative if the prompt alone is too long."""
        return self.max_model_len - len(prompt_ids)

    def check_characters(self, num_characters: int, max_token_characters: int) -> None:
        """Refuse a text that cannot fit however it is tokenised, before work is put into it.

        Args:
            max_token_characters: the longest token's.

        Raises:
            RequestError: with the numbers.
        """
        if num_characters > self.max_model_len * max_token_characters:
            raise RequestError(
                f"the prompt has {num_characters} characters, but the context is {self.max_model_len} tokens of at most "
                f"{max_token_characters} characters{self._why}: shorten the prompt",
                param="prompt",
            )

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Refuse a prompt that is no prompt.

        Raises:
            RequestError: it is empty, is longer than the context, or holds what is not a token id of this base.
        """
        if not prompt_ids:
            raise RequestError("the prompt is empty: send at least one token", param="prompt")
        if self.room(prompt_ids) < 0:  # looked at first: the ids may be millions
            raise self._too_long(len(prompt_ids), needed=1)
        for position, token_id in enumerate(prompt_ids):
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

    def longest_prompt(self, params: SamplingParams) -> int | None:
        """To how many tokens a prompt is to be cut; `None`: it is not to be.

        Raises:
            RequestError: no prompt of that length fits.
        """
        asked = params.truncate_prompt_tokens
        if asked == -1:
            # a `max_tokens` that leaves no room is refused later, with the numbers
            return max(1, self.max_model_len - (1 if params.max_tokens is None else params.max_tokens))
        if asked is not None and asked > self.max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens is {asked}, but the context is {self.max_model_len} tokens{self._why}",
                param="truncate_prompt_tokens",
            )
        return asked

    def check_request(self, params: SamplingParams, *, priority: int, has_adapter: bool) -> None:
        """Refuse what this engine does not do, or not for the base.

        Raises:
            RequestError: naming the field.
        """
        if priority and not self.priorities:
            raise RequestError(
                "priority is not supported by this server: start it with --scheduling-policy priority, or leave it out",
                param="priority",
            )
        if params.return_routing and not has_adapter:
            raise RequestError(
                "return_routing is for adapters: the base has no adapter experts; leave it out", param="return_routing"
            )

    def check_tokens(self, params: SamplingParams, bad_words: Sequence[Sequence[int]] = ()) -> None:
        """Refuse a request that names tokens which there are not.

        Raises:
            RequestError: naming the field.
        """
        for name, token_ids in (
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("bad_words", itertools.chain.from_iterable(bad_words)),
        ):
            for token_id in token_ids:
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(
                        f"{name}: token id {token_id} is not in the vocabulary, which has ids 0 to {self.vocab_size - 1}",
                        param=name,
                    )
        if not all(bad_words):
            raise RequestError("bad_words: a word without tokens", param="bad_words")

    def check_length(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse a prompt that does not fit, with what is to be generated, or that ends before what is to be told of it.

        Raises:
            RequestError: with the numbers.
        """
        if params.prompt_logprobs_start >= max(1, len(prompt_ids)):
            raise RequestError(
                f"prompt_logprobs_start is {params.prompt_logprobs_start}, but the prompt has {len(prompt_ids)} tokens",
                param="prompt_logprobs_start",
            )
        room = self.room(prompt_ids)
        needed = 0 if params.max_tokens == 0 else 1
        if room < needed:
            raise self._too_long(len(prompt_ids), needed=needed)
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"max_tokens is {params.max_tokens}, but the context of {self.max_model_len} tokens has room for {room} after "
                f"the prompt's {len(prompt_ids)}{self._why}",
                param="max_tokens",
            )

    def _too_long(self, num_tokens: int, *, needed: int) -> RequestError:
        """The error for a prompt after which there is no room for `needed` tokens."""
        return RequestError(
            f"the prompt has {num_tokens} tokens, but the context is {self.max_model_len} tokens, prompt and completion "
            f"together{self._why}: shorten the prompt by {num_tokens + needed - self.max_model_len} or more",
            param="prompt",
        )

    @property
    def _why(self) -> str:
        return "" if self.num_pages is None else f" (all {self.num_pages} pages of the KV cache)"
