"""Structured output: what the next token of a sequence may be, so that its text follows a schema, an expression or a grammar.

In: `StructuredOutputsParams`. Out: for each sequence a `Grammar` that follows its tokens, and for each step a mask over the
vocabulary, computed while the model runs. Knows no text but the bytes of each token, and reads those when first asked.

The work is done by llguidance, chosen over xgrammar because it bounds what a grammar may cost. Of the same twenty hostile
ones it refuses or runs each in less than half a second and 80 MB, where xgrammar works at a schema nested 5,000 deep and at an
enum of 100,000 strings for longer than twelve seconds. It depends on nothing, xgrammar on torch, Triton and Transformers. For a
vocabulary of 49,152, and a schema of five fields, it compiles in 1 to 3 ms (xgrammar: 5 ms) and computes a mask in 20 us
(3 us), which takes no time out of a step because the model runs meanwhile.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Lock

import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from torch import Tensor

from perft_serve.engine.params import RequestError, SamplingParams, StructuredOutputsParams
from perft_serve.engine.vocabulary import load_vocabulary

logger = logging.getLogger(__name__)

# Grammars that are kept compiled, and for how many sequences: what these find out about a grammar adds up.
_MAX_CACHED = 64
_MAX_USES = 64
# Of one lexer; 11 MB. A schema of a page has some hundreds.
_MAX_LEXER_STATES = 16_000
_MAX_MESSAGE = 400


@dataclass(frozen=True, slots=True)
class GrammarError:
    """Why there is no grammar; `is_internal`: it is not the request's fault."""

    reason: str
    is_internal: bool = False


class Grammar:
    """Where one sequence stands in its grammar.

    Matchers of one grammar share what they find out about it, up to a limit. Who meets the limit goes on with a matcher that
    shares nothing, so that a request does not fail because of its neighbours.

    Args:
        matcher: at the beginning; nobody else's.
        compile: gives a matcher that shares nothing.
        params: of the sequence.
        closing: tokens of `params.stop_token_ids` that have no text: they end the text as the end-of-sequence token does.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        compile: Callable[[], LLMatcher | GrammarError],
        params: SamplingParams,
        closing: Sequence[int],
    ) -> None:
        self.matcher = matcher
        self.ignores_eos = params.ignore_eos
        self.closing = tuple(closing)
        self._compile = compile
        self._is_alone = False
        self._token_ids: list[int] = []

    def accept(self, token_id: int) -> None:
        """The sequence has got a token."""
        if token_id not in self.closing:
            self._token_ids.append(token_id)
            self.matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole, and nothing can be added to it."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why it cannot go on, if it cannot: a step took more work than one may."""
        return _reason("grammar", self.matcher.get_error()) if self.matcher.is_error() else None

    def stand_alone(self) -> bool:
        """Begin again with a matcher that shares nothing, and go to where it was; false if it does not share already."""
        compiled = None if self._is_alone else self._compile()
        if compiled is None or isinstance(compiled, GrammarError):
            return False
        self._is_alone = True
        self.matcher = compiled
        self.matcher.consume_tokens(self._token_ids)
        return True


class Grammars:
    """Compiles grammars in a thread of its own, and computes masks in another.

    Everything but the threads belongs to the thread that drives the engine.

    Args:
        model: the base, whose folder has the vocabulary.
        vocab_size: of the model; may be more than the tokenizer's.
        eos_token_ids: tokens that end a text.
        wake: called from another thread when `poll` has something.
    """

    def __init__(
        self, model: str, vocab_size: int, eos_token_ids: frozenset[int], wake: Callable[[], None] | None = None
    ) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._wake = wake
        # No thread starts before there is something for it to do
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._masker = ThreadPoolExecutor(1, thread_name_prefix="mask")
        self._executor: LLExecutor | None = None
        self._vocabulary: LLTokenizer | GrammarError | None = None
        self._done: SimpleQueue[tuple[Hashable, Grammar | GrammarError]] = SimpleQueue()
        self._cache: OrderedDict[StructuredOutputsParams, tuple[LLMatcher | GrammarError, int]] = OrderedDict()
        self._lock = Lock()  # of the cache, and of the vocabulary's making

    def start(self, key: Hashable, params: SamplingParams) -> None:
        """Have the grammar of `params.structured_outputs` compiled; `poll` gives it, under this key."""
        self._compiler.submit(self._compile_for, key, params)

    def poll(self) -> list[tuple[Hashable, Grammar | GrammarError]]:
        """What has been compiled since the last call."""
        found: list[tuple[Hashable, Grammar | GrammarError]] = []
        while True:
            try:
                found.append(self._done.get_nowait())
            except Empty:
                return found

    def has_news(self) -> bool:
        """Whether `poll` would give something."""
        return not self._done.empty()

    def check(self, outputs: StructuredOutputsParams) -> None:
        """Compile a grammar here and now.

        Raises:
            RequestError: there is something wrong with it.
        """
        compiled = self._compiled(outputs)
        if isinstance(compiled, GrammarError):
            raise RequestError(compiled.reason, param=outputs.param)

    def masks(self, grammars: Sequence[Grammar]) -> Future[Tensor]:
        """Begin to compute what the next token of each may be: a bit for each of the vocabulary, `[B, V / 32]` in int32."""
        return self._masker.submit(self._fill, list(grammars))

    def close(self) -> None:
        """Stops the threads; what has not begun is dropped."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masker.shutdown(wait=False, cancel_futures=True)

    # In the threads

    def _compile_for(self, key: Hashable, params: SamplingParams) -> None:
        assert params.structured_outputs is not None
        grammar: Grammar | GrammarError
        try:
            compiled = self._compiled(params.structured_outputs)
            grammar = compiled if isinstance(compiled, GrammarError) else self._grammar(compiled, params)
        except BaseException as error:  # a panic of the library's is no Exception; it becomes this one request's error
            logger.error("a grammar could not be compiled", exc_info=error)
            grammar = GrammarError("the grammar could not be compiled: an internal error", is_internal=True)
        self._done.put((key, grammar))
        if self._wake is not None:
            self._wake()

    def _compiled(self, outputs: StructuredOutputsParams) -> LLMatcher | GrammarError:
        outputs = replace(outputs, param="")  # whatever the client calls it
        with self._lock:
            vocabulary = self._load_vocabulary()
            if isinstance(vocabulary, GrammarError):
                return vocabulary
            known, num_uses = self._cache.pop(outputs, (None, 0))
            if known is None or num_uses == _MAX_USES:
                known, num_uses = _compile(outputs, vocabulary), 0
            self._cache[outputs] = known, num_uses + 1
            if len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
            return known

    def _load_vocabulary(self) -> LLTokenizer | GrammarError:
        if self._vocabulary is None:
            tokenizer = load_vocabulary(self._model)
            if tokenizer is None:
                self._vocabulary = GrammarError("this model has no tokenizer, which structured outputs need")
            else:
                eos = self._eos_token_ids or tokenizer.eos_token_id
                backend = tokenizer.backend_tokenizer.to_str()
                self._vocabulary = LLTokenizer(backend, n_vocab=self._vocab_size, eos_token=eos)
        return self._vocabulary

    def _fill(self, grammars: list[Grammar]) -> Tensor:
        mask_BW = torch.zeros(len(grammars), -(-self._vocab_size // 32), dtype=torch.int32)
        self._compute(grammars, mask_BW)
        for row, grammar in enumerate(grammars):
            if grammar.matcher.is_error() and grammar.stand_alone():
                self._compute([grammar], mask_BW[row : row + 1])
            if grammar.matcher.is_error():
                mask_BW[row] = 0  # the library would let it end
            elif grammar.closing and grammar.matcher.is_accepting():
                _set(mask_BW[row], grammar.closing, True)
            if grammar.ignores_eos:
                without_W = mask_BW[row].clone()
                _set(without_W, self._eos_token_ids, False)
                if without_W.any():  # else there is nothing but the end
                    mask_BW[row] = without_W
        return mask_BW

    def _compute(self, grammars: list[Grammar], mask_BW: Tensor) -> None:
        if self._executor is None:
            self._executor = LLExecutor()
        self._executor.unsafe_compute_mask_ptr(
            [(grammar.matcher, row) for row, grammar in enumerate(grammars)],
            mask_BW.data_ptr(),
            mask_BW.shape[1] * mask_BW.element_size(),
            len(grammars),
        )

    def _grammar(self, compiled: LLMatcher, params: SamplingParams) -> Grammar:
        vocabulary, outputs = self._vocabulary, params.structured_outputs
        assert isinstance(vocabulary, LLTokenizer)
        assert outputs is not None
        closing = [
            token_id
            for token_id in params.stop_token_ids
            if token_id < self._vocab_size
            and token_id not in self._eos_token_ids
            and vocabulary.is_special_token(token_id)
        ]
        return Grammar(compiled.deep_copy(), lambda: _compile(outputs, vocabulary), params, closing)


def allowed(mask_BW: Tensor, vocab_size: int, device: torch.device) -> Tensor:
    """The bits of masks as booleans, `[B, V]`, on a device."""
    bit_32 = torch.arange(32, dtype=torch.int32, device=device)
    bits_BW32 = (mask_BW.to(device).unsqueeze(-1) >> bit_32) & 1
    return bits_BW32.flatten(1)[:, :vocab_size].bool()


def _set(mask_W: Tensor, token_ids: Sequence[int], value: bool) -> None:
    """Writes the bits of some tokens."""
    bytes_V8 = mask_W.view(torch.uint8)
    for token_id in token_ids:
        bit = 1 << (token_id & 7)
        byte = int(bytes_V8[token_id >> 3])
        bytes_V8[token_id >> 3] = byte | bit if value else byte & ~bit


def _compile(outputs: StructuredOutputsParams, vocabulary: LLTokenizer) -> LLMatcher | GrammarError:
    """A matcher at the beginning of a grammar."""
    kind, value = outputs.kind
    try:
        match kind:
            case "json" | "json_object":
                options = {"whitespace_flexible": False} if outputs.disable_any_whitespace else {}
                if outputs.whitespace_pattern is not None:
                    options["whitespace_pattern"] = outputs.whitespace_pattern  # type: ignore[assignment]
                schema = '{"type": "object"}' if kind == "json_object" else value
                source = LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]
            case _:
                source = grammar_from(kind, value)  # type: ignore[arg-type]
    except ValueError as error:
        return GrammarError(_reason(kind, str(error)))
    limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=limits)
    if matcher.is_error():
        return GrammarError(_reason(kind, matcher.get_error()))
    return matcher


def _reason(kind: str, message: str) -> str:
    text = " ".join(message.replace("<non-verbose/>", "").split())
    what = {"json": "JSON schema", "regex": "regular expression"}.get(kind, kind)
    return f"the {what} cannot be used: {text[:_MAX_MESSAGE]}"
