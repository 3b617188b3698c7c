"""How a request wants its tokens chosen. Plain data: no torch, no text processing, no HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from perft.errors import PerftError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARACTERS = 256


class RequestError(PerftError):
    """A request cannot be served as it stands; `param` names the field at fault, if there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


# Of a schema, expression or grammar as text; hostile ones of this length take a tenth of a second to compile, or to refuse.
MAX_GRAMMAR_CHARACTERS = 1 << 16
MAX_CHOICES = 1024

GrammarKind = Literal["json", "regex", "choice", "grammar", "json_object"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What a text must look like: exactly one of the first five, with vLLM's names and meanings.

    Args:
        json: a JSON schema; as a mapping, or as text, which it becomes.
        regex: a regular expression (the syntax of Rust's `regex`) for all of the text.
        choice: the text is one of these.
        grammar: a context-free grammar, in llguidance's Lark syntax or as GBNF.
        json_object: the text is any JSON object.
        disable_any_whitespace: JSON without any white space, rather than with what the model likes.
        whitespace_pattern: JSON with white space that this regular expression matches.
        param: what the client calls this, for error messages.

    Raises:
        RequestError: not exactly one is given, or it is not what it should be. Whether it can be compiled, the engine says.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    param: str = "structured_outputs"

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if self.json_object not in (None, True, False):
            self._refuse("json_object must be true or false")
        given += ["json_object"] * bool(self.json_object)
        if len(given) != 1:
            what = "none" if not given else " and ".join(given)
            self._refuse(f"exactly one of json, regex, choice, grammar and json_object must be given, not {what}")
        if self.json is not None:
            object.__setattr__(self, "json", self._schema())
        if self.choice is not None:
            self._check_choice()
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                self._refuse(f"{name} must be a string, got {value!r:.80}")
            self._check_text(name, value or "")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            self._refuse("disable_any_whitespace leaves nothing for whitespace_pattern to match: leave one out")

    @property
    def kind(self) -> tuple[GrammarKind, str]:
        """Which of the five it is, and that one as text (the choices as JSON)."""
        if isinstance(self.json, str):
            return "json", self.json
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            return "choice", json.dumps(self.choice)
        if self.grammar is not None:
            return "grammar", self.grammar
        return "json_object", ""

    def _schema(self) -> str:
        """The schema as the text that JSON has for it, whatever text it was given as."""
        schema = self.json
        try:
            if isinstance(schema, str):
                self._check_text("json", schema)
                schema = json.loads(schema)
            text = json.dumps(schema, allow_nan=False)
        except RecursionError:
            self._refuse("the JSON schema is nested too deeply")
        except (ValueError, TypeError) as error:
            self._refuse(f"the JSON schema is not JSON: {error}")
        if not isinstance(schema, dict):
            self._refuse("the JSON schema must be an object")
        self._check_text("json", text)
        return text

    def _check_choice(self) -> None:
        if not isinstance(self.choice, (list, tuple)) or not all(isinstance(each, str) for each in self.choice):
            self._refuse("choice must be a list of strings")
        object.__setattr__(self, "choice", tuple(self.choice))
        if not self.choice or not all(self.choice):
            self._refuse("choice must be a list of strings that are not empty, with one at least")
        if len(self.choice) > MAX_CHOICES:
            self._refuse(f"at most {MAX_CHOICES} choices, got {len(self.choice)}")
        for each in self.choice:
            self._check_text("choice", each)

    def _check_text(self, name: str, text: str) -> None:
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            self._refuse(f"{name} has {len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS} are taken")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self._refuse(f"{name} is not valid Unicode: lone surrogate at character {error.start}")

    def _refuse(self, message: str) -> NoReturn:
        where = self.param if isinstance(self.param, str) else "structured_outputs"
        raise RequestError(f"{where}: {message}", param=where)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling parameters, with vLLM's names and meanings.

    Args:
        n: how many completions of the same prompt.
        max_tokens: the most tokens to generate (0 with `prompt_logprobs`: score the prompt only);
            `None`: as many as the context holds.
        temperature: 0 means greedy.
        top_p: keep the smallest set of tokens whose probability reaches this.
        top_k: keep this many of the likeliest tokens; 0 means all.
        min_p: keep the tokens at least this fraction as likely as the likeliest.
        seed: makes sampling reproducible, whatever else is in the batch; `None` draws a fresh one.
        stop: strings that end the text; they are left out of it unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end the text, as the end-of-sequence token does.
        ignore_eos: go on after the end-of-sequence token.
        min_tokens: nothing ends the text before so many tokens: the tokens that would are not taken, and stop strings not
            looked for.
        logit_bias: what is added to the logits of some tokens, by token id, in [-100, 100].
        presence_penalty: what is taken off the logit of every token that was generated before, in [-2, 2].
        frequency_penalty: the same, times how often it was.
        repetition_penalty: what the logit of every token in prompt or completion is divided by if it is positive, and
            multiplied with if it is negative; above 1 discourages.
        allowed_token_ids: no others are taken; `None`: all may be.
        bad_words: strings whose tokens are never generated in a row, with and without a space before them.
        structured_outputs: what the text must look like; it ends when nothing can be added.
        logprobs: how many of the likeliest tokens to report at each generated position, beside the chosen one;
            0 reports the chosen one only, `None` nothing. Log-probabilities are of the model's own
            distribution, before bias, penalties, temperature and filters.
        prompt_logprobs: the same for each position of the prompt (the first has none).
        prompt_logprobs_start: the first position of the prompt to have them; what stands before it has `None`, and may come
            from the prefix cache, which has no logits. Counts in the tokens of the prompt as it is used, so after it is cut.
        truncate_prompt_tokens: of a longer prompt, use so many tokens; -1: as many as leave room for the completion. Special
            tokens that the tokenizer puts around a text are kept, and count.
        truncation_side: `left` drops the beginning of such a prompt, `right` its end.
        return_routing: tell which adapter experts each token took in each layer, and with what weights.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        RequestError: a value is of the wrong type or out of its range.
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    return_routing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            if name == "allowed_token_ids" and value is None:
                continue
            if not isinstance(value, (list, tuple)):
                raise RequestError(f"{name} must be a list, got {value!r}", param=name)
            object.__setattr__(self, name, tuple(value))
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"at most {MAX_STOP_TOKEN_IDS} stop token ids, got {len(self.stop_token_ids)}", param="stop_token_ids"
            )
        if not isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))):
            raise RequestError(
                f"structured_outputs must be StructuredOutputsParams, got {self.structured_outputs!r:.80}",
                param="structured_outputs",
            )
        self._check_ints()
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        self._check_tokens()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "return_routing"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}", param=name)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}", param="stop")
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop strings must be non-empty strings, got {stop!r}", param="stop")

    def _check_tokens(self) -> None:
        """The fields that name tokens, which need the vocabulary to be checked in full (`Limits.check_tokens`)."""
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}", param="logit_bias")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias of at most {MAX_LOGIT_BIAS} tokens, got {len(self.logit_bias)}", param="logit_bias"
            )
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, 1 << 31)
            _check_float("logit_bias", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty: no token could be taken", param="allowed_token_ids")
            for token_id in self.allowed_token_ids:
                _check_int("allowed_token_ids", token_id, 0, 1 << 31)
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise RequestError(f"at most {MAX_BAD_WORDS} bad words, got {len(self.bad_words)}", param="bad_words")
        for word in self.bad_words:
            if not isinstance(word, str) or not word.strip():
                raise RequestError(f"bad words must be strings that are not blank, got {word!r}", param="bad_words")
            if len(word) > MAX_BAD_WORD_CHARACTERS:
                raise RequestError(
                    f"bad words of at most {MAX_BAD_WORD_CHARACTERS} characters, got one of {len(word)}",
                    param="bad_words",
                )

    def _check_ints(self) -> None:
        _check_int("n", self.n, 1, 128)
        # 0 is of use only to score a prompt: whoever takes it from a user decides whether it makes sense
        _check_int("max_tokens", self.max_tokens, 0 if self.prompt_logprobs is not None else 1, 1 << 31, optional=True)
        _check_int("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, which is more than max_tokens, {self.max_tokens}", param="min_tokens"
            )
        _check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, 1 << 31, optional=True)
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens is 0, which leaves no prompt: use -1 or a number above 0",
                param="truncate_prompt_tokens",
            )
        if self.truncation_side not in ("left", "right"):
            raise RequestError(
                f"truncation_side must be 'left' or 'right', got {self.truncation_side!r}", param="truncation_side"
            )
        _check_int("top_k", self.top_k, -1, 1 << 31)
        if self.top_k == -1:  # vLLM's other spelling of "all"
            object.__setattr__(self, "top_k", 0)
        _check_int("seed", self.seed, -(1 << 63), (1 << 63) - 1, optional=True)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_int("prompt_logprobs_start", self.prompt_logprobs_start, 0, 1 << 31)
        if self.prompt_logprobs_start and self.prompt_logprobs is None:
            raise RequestError(
                "prompt_logprobs_start says where prompt_logprobs begin, which are not asked for: leave it out, or set "
                "prompt_logprobs",
                param="prompt_logprobs_start",
            )
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, 1 << 31)

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that came before are discouraged, or encouraged."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def edits_logits(self) -> bool:
        """Whether the logits are changed before anything else is done with them."""
        return bool(
            self.has_penalties
            or self.logit_bias
            or self.min_tokens
            or self.bad_words
            or self.allowed_token_ids is not None
        )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


def _check_int(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name} must be between {low} and {high}, got {value}", param=name)


def _check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} must be a number, got {value!r}", param=name)
    if not (low < value <= high if open_low else low <= value <= high):  # NaN fails every comparison
        bracket = "(" if open_low else "["
        raise RequestError(f"{name} must be in {bracket}{low:g}, {high:g}], got {value}", param=name)
