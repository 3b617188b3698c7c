"""Text to token ids and back: the base's tokenizer, incremental detokenisation, stop strings.

In: prompts and chat messages; token ids as they are generated. Out: token ids; text that is safe to send. Knows no HTTP,
no tensors, no engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2 import Environment, TemplateError
from jinja2.ext import loopcontrols
from jinja2.meta import find_undeclared_variables

from perft_serve.engine.params import RequestError
from perft_serve.engine.vocabulary import load_vocabulary

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are not (yet) a character decode to."""

# What the server gives templates, and arguments of the function that renders them: no request sets these beside its fields.
_RESERVED = frozenset(
    (
        *(
            "messages",
            "tools",
            "documents",
            "add_generation_prompt",
            "continue_final_message",
            "bos_token",
            "eos_token",
        ),
        *("conversation", "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("raise_exception", "strftime_now", "namespace", "dict", "range"),
    )
)
# Transformers' own tag, which plain Jinja does not know
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# A completion's text is decoded together with the prompt's last tokens, so that its first token is not mistaken for the
# first of a text, where some tokenizers drop a leading space: at least so many, and more if they cut a character.
_CONTEXT_TOKENS = range(4, 25)
# A character is at most four tokens; text that has not come to a character's end after this many is not text.
_MAX_HELD_TOKENS = 64
_MAX_CACHED_TOKENS = 1 << 16
_MAX_CACHED_NAMES = 256


class TextTokenizer:
    """A base's tokenizer: text to ids, ids to text.

    Encoding and decoding are safe to call from several threads; everything goes straight to the Rust tokenizer, which
    is never reconfigured.

    Attributes:
        max_token_characters: length of the longest piece of its vocabulary.

    Args:
        tokenizer: a `transformers` tokenizer that is backed by the `tokenizers` library.

    Raises:
        ValueError: `tokenizer` has no such backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} is not backed by the tokenizers library: convert it to a tokenizer.json"
            )
        self._chat = tokenizer
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        anchor = backend.encode("a", add_special_tokens=False).ids
        self._anchor_ids = anchor[-1:]
        self._anchor_text = self.decode(self._anchor_ids)
        self._token_texts: dict[int, str] = {}
        self._taken: dict[tuple[str, bool], bool] = {}
        self.max_token_characters = max(len(piece) for piece in backend.get_vocab(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return bool(self._chat.chat_template)

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        at_most: int | None = None,
        side: Literal["left", "right"] = "left",
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            at_most: of more tokens, special ones included, this many are kept: those of the text lose their `side`.

        Raises:
            RequestError: `text` cannot be written as UTF-8 (it has a lone surrogate), or special tokens leave no room for it.
        """
        check_unicode(text, param="prompt")
        # A batch of one: unlike `encode` it lets go of Python's lock, without which the whole server would stand still, and
        # unlike `encode_batch` it keeps no offsets, which take half of the time.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens and at_most is None)
        if at_most is not None:
            num_special = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
            if at_most <= num_special:
                raise RequestError(
                    f"the prompt would be cut to {at_most} tokens, but the tokenizer adds {num_special} to any text: "
                    "use a larger truncate_prompt_tokens",
                    param="truncate_prompt_tokens",
                )
            encoding.truncate(at_most - num_special, direction=side)
            encoding = self._backend.post_process(encoding, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def special_id(self, text: str) -> int | None:
        """The special token that is written so, if there is one."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens included; ids that the tokenizer does not know give nothing."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=False)
        return text

    def chat_template(self, *, with_tools: bool = False) -> str:
        """The template's source; some tokenizers have one of its own for conversations with tools. Empty if there is none."""
        if not self.has_chat_template:
            return ""
        source: str = self._chat.get_chat_template(tools=[{}] if with_tools else None)
        return source

    def template_takes(self, name: str, *, with_tools: bool = False) -> bool:
        """Whether the chat template makes something of a variable."""
        key = name, with_tools
        if key not in self._taken:
            try:
                source = _GENERATION_TAG.sub("", self.chat_template(with_tools=with_tools))
                variables = find_undeclared_variables(Environment(extensions=[loopcontrols]).parse(source))
            except TemplateError:
                variables = set()
            if len(self._taken) >= _MAX_CACHED_NAMES:
                self._taken.clear()
            self._taken[key] = name in variables
        return self._taken[key]

    def check_tools(self) -> None:
        """Refuses tools for a model that would not hear of them.

        Raises:
            RequestError: its chat template has no place for them.
        """
        if not self.template_takes("tools", with_tools=True):
            raise RequestError("this model's chat template has no place for tools: leave them out", param="tools")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation in the tokenizer's own template, which runs in a sandbox. Its special tokens are in it.

        Args:
            messages: as the template takes them.
            tools: what the model may call, as JSON schemas in OpenAI's form.
            add_generation_prompt: open it for the assistant's answer.
            continue_final_message: leave the last message open, so that the answer continues it.
            variables: further variables of the template.

        Raises:
            RequestError: the tokenizer has no chat template, or it refuses these messages, or has no such variable.
        """
        if not self.has_chat_template:
            raise RequestError("this model's tokenizer has no chat template: use completions instead", param="messages")
        if tools:
            self.check_tools()
        _check_unicode_within(messages, param="messages")
        _check_unicode_within(tools, param="tools")
        _check_unicode_within(variables or {}, param="chat_template_kwargs")
        for name in variables or {}:
            if name in _RESERVED or not self.template_takes(name, with_tools=bool(tools)):
                raise RequestError(
                    f"chat_template_kwargs: the model's chat template takes no {name!r} from requests: leave it out",
                    param="chat_template_kwargs",
                )
        try:
            text: str = self._chat.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(variables or {}),
            )
        # templates come with models, and fail in every way that expressions can
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's entries for `token_ids`, in its own spelling; ids that the tokenizer does not know give nothing."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def info(self) -> dict[str, Any]:
        """What its `tokenizer_config.json` says, without paths, and its chat template."""
        given = {
            name: _plain(value)
            for name, value in self._chat.init_kwargs.items()
            if not name.endswith(("_file", "_files", "_path", "_object"))
        }
        return {**given, "tokenizer_class": type(self._chat).__name__, "chat_template": self._chat.chat_template}

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands inside a text: its leading space is kept, a piece of a character is U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self.decode([*self._anchor_ids, token_id])[len(self._anchor_text) :]
            if len(self._token_texts) < _MAX_CACHED_TOKENS:
                self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, exact also for a piece of a character."""
        text = self.token_text(token_id)
        if REPLACEMENT in text:
            piece = self._backend.id_to_token(token_id) or ""
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # byte fallback of SentencePiece
                return bytes([int(piece[3:5], 16)])
            if all(letter in _BYTE_OF_LETTER for letter in piece):
                return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
        return text.encode()


def load_tokenizer(model: str) -> TextTokenizer | None:
    """The tokenizer in a model's folder or Hub repository; `None` for a folder without one (token ids only).

    Raises:
        OSError: the folder does not exist; a Hub repository has no tokenizer, or cannot be reached.
        ValueError: the tokenizer is of a kind that the `tokenizers` library cannot run.
    """
    tokenizer = load_vocabulary(model)
    return None if tokenizer is None else TextTokenizer(tokenizer)


def _plain(value: Any) -> Any:
    """A value of a tokenizer's configuration as JSON has it; a token is its text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def check_unicode(text: str, *, param: str) -> None:
    """Refuses text that cannot be written as UTF-8.

    Raises:
        RequestError: naming the first offending character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
            param=param,
        ) from error


def _check_unicode_within(value: Any, *, param: str) -> None:
    """`check_unicode` of every text in a value of JSON's kinds."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            check_unicode(item, param=param)
        elif isinstance(item, Mapping):
            waiting += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item


class Detokenizer:
    """Text of a sequence that grows by one token at a time; the pieces add up to the decoding of the whole.

    The text so far may end in U+FFFD, which is either a broken byte or the beginning of a character; it is held back
    until the next token decides. Decoding goes over a short window of ids, so a token costs the same wherever it comes.

    Args:
        prompt_ids: what the sequence continues; none of its text is given out.
        skip_special_tokens: leave special tokens out.
        kept_ids: special tokens that are not.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - kept_ids if skip_special_tokens else frozenset[int]()
        # The window: ids whose text is given out already as far as its first `_given` characters. It starts at a
        # character's border, and the next one will start at `_border`.
        self._window: list[int] = []
        text = ""
        for size in _CONTEXT_TOKENS:
            self._window = [token_id for token_id in prompt_ids[-size:] if token_id not in self._skipped]
            text = tokenizer.decode(self._window)
            if REPLACEMENT not in text or size >= len(prompt_ids):
                break
        self._given = len(text.rstrip(REPLACEMENT))
        self._border = len(self._window) if self._given == len(text) else 0

    def step(self, token_id: int) -> str:
        """The text that `token_id` makes certain; may be empty."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        certain = len(text.rstrip(REPLACEMENT))
        if certain < len(text) and len(self._window) <= _MAX_HELD_TOKENS:
            given = self._given
            # Byte fallback turns characters given out already into U+FFFD until the next one is complete.
            self._given = max(given, certain)
            return text[given:certain]
        piece = text[self._given :]
        self._window = self._window[self._border :] if certain == len(text) else self._window[-1:]
        self._border = len(self._window)
        self._given = len(self._tokenizer.decode(self._window))
        return piece

    def flush(self) -> str:
        """What was held back, as U+FFFD: the sequence has ended inside a character."""
        piece = self._tokenizer.decode(self._window)[self._given :]
        self._given += len(piece)
        return piece


class StopStrings:
    """Looks for stop strings in a text that comes in pieces, whatever the pieces' borders.

    Only what may yet become a stop string is held back. The match that is complete first wins (of two that end
    together, the longer), so the result does not depend on how the text was cut.

    Args:
        stops: the strings to look for; may be empty.
        include: keep the stop string itself in the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self._num_exempt = 0  # characters of what is held that no match may end in
        self.matched: str | None = None

    def push(self, piece: str, *, exempt: bool = False) -> str:
        """The text that may be given out now. After a match (`matched`) there is no more.

        Args:
            exempt: a stop string that is complete in this piece does not count; it may begin in it.
        """
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        if exempt:
            self._num_exempt = len(text)
        # a match ends after the characters that are exempt
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop, max(0, self._num_exempt + 1 - len(stop)))) >= 0
        ]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        self._num_exempt = max(0, self._num_exempt - (len(text) - held))
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back: the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _byte_alphabet() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes with (GPT-2's `bytes_to_unicode`), and their bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_alphabet()
