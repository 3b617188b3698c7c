"""Text: detokenisation piece by piece, stop strings whatever the pieces, tokens by name, the chat template."""

from __future__ import annotations

import threading
import time
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from perft_serve.engine.params import RequestError
from perft_serve.text import REPLACEMENT, Detokenizer, StopStrings, TextTokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> TextTokenizer:
    return TextTokenizer(tiny_tokenizer)


@pytest.fixture(scope="session")
def fallback_tokenizer() -> TextTokenizer:
    """As Llama's: words begin with `▁`, a text's first space is dropped, unknown characters are spelt in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[("▁", "a"), ("▁", "b")],
                   unk_token="<unk>", byte_fallback=True)
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))


def pieces_of(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.step(token_id) for token_id in token_ids), detokenizer.flush()]


def test_an_emoji_comes_in_one_piece_with_its_last_token(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("🦊")
    assert len(ids) == 3, "the character must be split for this test to mean anything"
    assert pieces_of(Detokenizer(tokenizer, tokenizer.encode("a")), ids) == ["", "", "🦊", ""]


def test_text_before_an_incomplete_character_is_not_held_back(tokenizer: TextTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("ab🦊")
    assert "".join(detokenizer.step(token_id) for token_id in ids[:-1]) == "ab"


def test_what_never_became_a_character_is_flushed_at_the_end(tokenizer: TextTokenizer) -> None:
    ids = [*tokenizer.encode("a"), *tokenizer.encode("🦊")[:2]]
    detokenizer = Detokenizer(tokenizer)
    assert pieces_of(detokenizer, ids) == ["a", "", "", REPLACEMENT]
    assert detokenizer.flush() == ""


def test_the_leading_space_of_a_continuation_is_kept(fallback_tokenizer: TextTokenizer) -> None:
    prompt = fallback_tokenizer.encode("a")
    continuation = fallback_tokenizer.encode("a b")[len(prompt) :]
    assert "".join(pieces_of(Detokenizer(fallback_tokenizer, prompt), continuation)) == " b"
    assert "".join(pieces_of(Detokenizer(fallback_tokenizer), continuation)) == "b"


def test_a_prompt_that_ends_inside_a_character(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a🦊")
    assert "".join(pieces_of(Detokenizer(tokenizer, ids[:-2]), ids[-2:])) == "🦊"


def test_characters_given_out_stay_given_out_under_byte_fallback(fallback_tokenizer: TextTokenizer) -> None:
    # A run of byte tokens that is not valid as a whole decodes to U+FFFD throughout, also what was valid before.
    ids = fallback_tokenizer.encode("a你好世界b")
    assert len(ids) > 12
    assert "".join(pieces_of(Detokenizer(fallback_tokenizer), ids)) == "a你好世界b"


def test_special_tokens_are_left_out_or_kept(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a<|im_end|>b")
    assert "".join(pieces_of(Detokenizer(tokenizer), ids)) == "ab"
    assert "".join(pieces_of(Detokenizer(tokenizer, skip_special_tokens=False), ids)) == "a<|im_end|>b"


def test_a_long_run_of_broken_bytes_is_not_held_forever(tokenizer: TextTokenizer) -> None:
    broken = tokenizer.encode("🦊")[0]
    pieces = pieces_of(Detokenizer(tokenizer), [broken] * 1000)
    assert max(len(piece) for piece in pieces) < 100
    assert "".join(pieces) == REPLACEMENT * 1000


@given(data=st.data(), skip=st.booleans())
def test_the_pieces_add_up_to_the_whole(tokenizer: TextTokenizer, data: st.DataObject, skip: bool) -> None:
    token = st.integers(0, 359)
    prompt = data.draw(st.lists(token, max_size=30))
    ids = data.draw(st.lists(token, max_size=60))
    kept = [token_id for token_id in prompt + ids if not (skip and token_id in tokenizer.special_ids)]
    kept_prompt = [token_id for token_id in prompt if not (skip and token_id in tokenizer.special_ids)]
    # U+FFFD at the prompt's end may be the beginning of a character that the completion completes
    before = tokenizer.decode(kept_prompt).rstrip(REPLACEMENT)
    pieces = pieces_of(Detokenizer(tokenizer, prompt, skip_special_tokens=skip), ids)
    whole = tokenizer.decode(kept)
    assert whole.startswith(before)
    assert whole.endswith("".join(pieces))
    if not tokenizer.decode(kept_prompt).endswith(REPLACEMENT):
        assert "".join(pieces) == whole[len(before) :]


@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_survives_encoding_and_decoding_by_pieces(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(pieces_of(Detokenizer(tokenizer, skip_special_tokens=False), ids)) == text


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_is_cut_keeps_the_special_tokens_around_it(
    tokenizer: TextTokenizer, side: Literal["left", "right"]
) -> None:
    backend = deepcopy(tokenizer._backend)
    (start, end) = sorted(tokenizer.special_ids)[:2]
    names = [backend.id_to_token(token_id) for token_id in (start, end)]
    backend.post_processor = TemplateProcessing(
        single=f"{names[0]} $A {names[1]}", special_tokens=[(names[0], start), (names[1], end)]
    )
    other = TextTokenizer(SimpleNamespace(backend_tokenizer=backend))
    ids = tokenizer.encode("the quick brown fox")
    assert other.encode("the quick brown fox") == [start, *ids, end]
    kept = ids[-3:] if side == "left" else ids[:3]
    assert other.encode("the quick brown fox", at_most=5, side=side) == [start, *kept, end]
    assert other.encode("the quick brown fox", at_most=3, side=side, add_special_tokens=False) == kept
    assert other.encode("the quick brown fox", at_most=99, side=side) == [start, *ids, end]
    with pytest.raises(RequestError, match="adds 2 to any text"):
        other.encode("the quick brown fox", at_most=2, side=side)


def push_all(stops: StopStrings, pieces: list[str]) -> list[str]:
    given_out = [stops.push(piece) for piece in pieces]
    return [*given_out, stops.flush()] if stops.matched is None else given_out


def test_a_stop_string_across_pieces_is_cut_out() -> None:
    stops = StopStrings(["STOP"])
    assert push_all(stops, ["one ST", "O", "P two"]) == ["one ", "", ""]
    assert stops.matched == "STOP"


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\n", "STOP"])
    assert push_all(stops, ["aS", "Tx", "\n", "b"]) == ["a", "STx", "", "\nb", ""]
    assert stops.matched is None


def test_what_was_held_back_comes_out_at_the_end() -> None:
    stops = StopStrings(["STOP"])
    assert push_all(stops, ["aST"]) == ["a", "ST"]


def test_the_stop_string_can_stay_in_the_text() -> None:
    stops = StopStrings(["STOP"], include=True)
    assert "".join(push_all(stops, ["one ST", "OP two"])) == "one STOP"


def test_after_a_match_there_is_no_more_text() -> None:
    stops = StopStrings(["b"])
    assert push_all(stops, ["abc", "d"]) == ["a", ""]


def test_the_match_that_is_complete_first_wins_also_inside_one_piece() -> None:
    for pieces in (["abcd"], ["a", "b", "c", "d"], ["ab", "cd"]):
        stops = StopStrings(["abcd", "bc"])
        assert "".join(push_all(stops, pieces)) == "a"
        assert stops.matched == "bc"
    ending_together = StopStrings(["b", "ab"])
    assert push_all(ending_together, ["xab"]) == ["x"]
    assert ending_together.matched == "ab"


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    include=st.booleans(),
)
def test_the_cuts_do_not_matter(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    cut, letters = StopStrings(stops, include=include), StopStrings(stops, include=include)
    assert "".join(push_all(cut, pieces)) == "".join(push_all(letters, list(text)))
    assert cut.matched == letters.matched


@given(
    pieces=st.lists(st.text("ab", max_size=6), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    num_exempt=st.integers(0, 8),
)
def test_a_stop_string_counts_only_if_it_ends_after_the_exempt_pieces(
    pieces: list[str], stops: list[str], num_exempt: int
) -> None:
    found = StopStrings(stops)
    given_out = [found.push(piece, exempt=i < num_exempt) for i, piece in enumerate(pieces)]
    if found.matched is None:
        given_out.append(found.flush())
    text, exempt = "".join(pieces), len("".join(pieces[:num_exempt]))
    ends = [end for end in range(exempt + 1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    if not ends:
        assert (found.matched, "".join(given_out)) == (None, text)
        return
    longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert found.matched == longest
    # what was given out while it was exempt cannot be taken back
    cut = text[: ends[0] - len(longest)]
    assert "".join(given_out) == cut


def test_tokens_have_the_text_and_bytes_they_have_inside_a_text(
    tokenizer: TextTokenizer, fallback_tokenizer: TextTokenizer
) -> None:
    fox = tokenizer.encode("🦊")
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in fox) == "🦊".encode()
    assert tokenizer.token_text(fox[0]) == REPLACEMENT
    space_b = fallback_tokenizer.encode("a b")[-1]
    assert fallback_tokenizer.token_text(space_b) == " b"
    ni = fallback_tokenizer.encode("a你")[-3:]
    assert b"".join(fallback_tokenizer.token_bytes(token_id) for token_id in ni) == "你".encode()


def test_chat_uses_the_tokenizers_own_template(tokenizer: TextTokenizer) -> None:
    text = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(RequestError, match="the user speaks first"):
        tokenizer.render_chat([{"role": "assistant", "content": "hi"}])


def test_chat_without_a_template_says_so(fallback_tokenizer: TextTokenizer) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        fallback_tokenizer.render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("text", ["", "a", "<|im_start|>user\nhi 🦊<|im_end|>", " ".join(map(str, range(999)))])
def test_ids_are_those_that_transformers_gives(
    tokenizer: TextTokenizer, tiny_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    for special in (True, False):
        ids = tiny_tokenizer(text, add_special_tokens=special)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=special) == ids


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: TextTokenizer) -> None:
    text = "the quick brown fox, " * 100_000
    work = threading.Thread(target=tokenizer.encode, args=(text,))
    start = last = time.perf_counter()
    work.start()
    longest = 0.0
    while work.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert last - start > 0.2, "too short a text to show anything"
    assert longest < (last - start) / 3


def test_a_lone_surrogate_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(RequestError, match="lone surrogate U\\+D800 at character 1"):
        tokenizer.encode("a\ud800")


def test_a_folder_without_tokenizer_has_none(tiny_base: Path, tiny_base_without_tokenizer: Path) -> None:
    assert load_tokenizer(str(tiny_base_without_tokenizer)) is None
    assert load_tokenizer(str(tiny_base)) is not None
