"""Bias, penalties, bad words, least lengths: the editor against Transformers' own processors, and the engine against its
`generate` on the PEFT model; alone, in a batch, preempted, with programs and without.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from driving import Output, request, run
from served import Served
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest
from perft_serve.engine.logits import LogitEditor, SequenceEdits, TokenCounts
from perft_serve.engine.params import SamplingParams
from perft_serve.engine.sampler import FAULTS, EditedRows, sample
from perft_serve.engine.sequence import Sequence

V = 60
EOS = frozenset({3, 7})
BAD_WORDS = ((5,), (8, 9), (10, 11, 12), (6, 6))


def sequence(prompt: list[int], generated: list[int], bad_words: Any = (), **params: Any) -> Sequence:
    made = EngineRequest(
        request_id="x", prompt_ids=tuple(prompt), params=SamplingParams(**params), bad_words=tuple(bad_words)
    )
    seq = Sequence(request=made, seed=0, max_tokens=100)
    seq.token_ids += generated
    return seq


def editor() -> LogitEditor:
    return LogitEditor(EOS, V, torch.device("cpu"))


def edited(seqs: list[Sequence], logits_RV: torch.Tensor, by: LogitEditor | None = None) -> torch.Tensor:
    result = logits_RV.clone()
    (by or editor()).edit(result, seqs)
    return result


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 4


def test_against_the_processors_of_transformers() -> None:
    """Everything at once that Transformers has too: bias, repetition, bad words (over what was generated), least length."""
    generator = random.Random(0)
    for round_number in range(40):
        prompt = [generator.randrange(V) for _ in range(generator.randrange(1, 30))]
        generated = [generator.randrange(V) for _ in range(generator.randrange(20))]
        generated += generator.choice([[], [8], [10, 11], [6], [11]])
        bias = {generator.randrange(V): generator.uniform(-9, 9) for _ in range(5)}
        penalty = generator.choice([1.0, 0.6, 1.7])
        least = generator.randrange(30)
        row = logits(1, round_number)
        ids = torch.tensor([prompt + generated])
        processors = LogitsProcessorList(
            [
                SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
                RepetitionPenaltyLogitsProcessor(penalty),
                MinNewTokensLengthLogitsProcessor(len(prompt), least, sorted(EOS), device="cpu"),
            ]
        )
        want = processors(ids, row.clone())
        if generated:  # bad words look at what was generated only
            want = NoBadWordsLogitsProcessor([list(words) for words in BAD_WORDS])(torch.tensor([generated]), want)
        else:
            want[0, 5] = -torch.inf
        seq = sequence(
            prompt, generated, BAD_WORDS, logit_bias=bias, repetition_penalty=penalty, min_tokens=least, max_tokens=100
        )
        torch.testing.assert_close(edited([seq], row), want, rtol=1e-6, atol=1e-6)


def test_frequency_and_presence() -> None:
    """As OpenAI defines them: over what was generated, not over the prompt."""
    generated = [4, 4, 4, 9, 20]
    want = logits(1)
    for token, count in ((4, 3), (9, 1), (20, 1)):
        want[0, token] -= 0.5 * count + 1.25
    seq = sequence([1, 2, 9], generated, frequency_penalty=0.5, presence_penalty=1.25)
    torch.testing.assert_close(edited([seq], logits(1)), want)
    want = logits(1)
    want[0, 4] += 3 * 2
    want[0, [9, 20]] += 2
    assert torch.equal(edited([sequence([1, 2, 9], generated, frequency_penalty=-2.0)], logits(1)), want)


def test_repetition_of_both_signs() -> None:
    row = torch.tensor([[2.0, -2.0, 1.0, -1.0] + [0.0] * (V - 4)])
    seq = sequence([0], [1], repetition_penalty=2.0)
    assert edited([seq], row)[0, :4].tolist() == [1.0, -4.0, 1.0, -1.0]


def test_allowed_tokens_are_as_they_were_and_no_others() -> None:
    seq = sequence([1], [], allowed_token_ids=(9, 4, 9), logit_bias={4: 2.0, 5: 100.0})
    got = edited([seq], logits(1))[0]
    assert got.isfinite().nonzero().flatten().tolist() == [4, 9]
    assert got[9] == logits(1)[0, 9]
    assert got[4] == logits(1)[0, 4] + 2


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_least_length(ignore_eos: bool) -> None:
    """Whatever would end the text: stop tokens always, end-of-sequence tokens unless they would not."""
    settings = {"min_tokens": 2, "stop_token_ids": (11, 999_999), "ignore_eos": ignore_eos}
    for generated, banned in (([], True), ([1], True), ([1, 2], False)):
        got = edited([sequence([1], generated, **settings)], logits(1))[0]
        excluded = got.isinf().nonzero().flatten().tolist()
        assert excluded == (([11] if ignore_eos else [3, 7, 11]) if banned else [])


def test_counts_grow_a_token_a_step_and_are_never_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of 300 steps is that of a fresh start, and one token is counted in each."""
    generator = random.Random(1)
    prompt = [generator.randrange(V) for _ in range(50)]
    settings = {"frequency_penalty": 0.3, "presence_penalty": 0.1, "repetition_penalty": 1.2}
    seq, by = sequence(prompt, [], **settings), editor()
    edited([seq], logits(1), by)
    state = seq.edits
    assert isinstance(state, SequenceEdits)
    counted: list[int] = []
    assert state.counts is not None
    add = TokenCounts.add

    def counting_add(self: TokenCounts, token: int) -> None:
        counted.append(token)
        add(self, token)

    monkeypatch.setattr(TokenCounts, "add", counting_add)
    for _ in range(300):
        seq.token_ids.append(generator.randrange(V))
        seq.restart()  # preempted: what was generated stands, and so do the counts
        got = edited([seq], logits(1), by)
    assert seq.edits is state
    assert counted == seq.token_ids[50:]
    assert torch.equal(got, edited([sequence(prompt, seq.token_ids[50:], **settings)], logits(1)))


def mixed() -> list[Sequence]:
    return [
        sequence([1, 2, 3], [4, 5], repetition_penalty=1.3),
        sequence([1], [4, 8], BAD_WORDS, min_tokens=9, frequency_penalty=1.0),
        sequence([9], [], allowed_token_ids=(1, 2, 3)),
        sequence([9, 9], [9], logit_bias={9: -3.0, 1: 3.0}, presence_penalty=-1.0),
        sequence([2], [2], min_tokens=1),  # asks for something, but no longer
    ]


def test_rows_are_edited_alike_alone_and_together() -> None:
    rows = logits(5)
    together = edited(mixed(), rows)
    for i, seq in enumerate(mixed()):
        assert torch.equal(edited([seq], rows[i : i + 1])[0], together[i])


def test_only_the_rows_that_ask_are_other() -> None:
    """Edited logits stand in for theirs, greedy and sampled; a row from which nothing is left is named."""
    rows = logits(4)
    stand_in = torch.full((3, V), -torch.inf)
    stand_in[0, 17] = stand_in[1, 18] = -50.0
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0), SamplingParams(top_p=0.9), SamplingParams()]
    plain = sample(rows, params, [0.3] * 4).tolist()
    tokens = sample(rows, params, [0.3] * 4, EditedRows((1, 2, 3), stand_in)).tolist()
    assert tokens[:3] == [plain[0], 17, 18]
    assert FAULTS[tokens[3]] == "nothing left"
    rows[1, 0] = torch.nan
    assert FAULTS[sample(rows, params, [0.3] * 4, EditedRows((1, 2, 3), stand_in)).tolist()[1]] == "nan"


# The engine

ASKED: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "bias": {"logit_bias": {17: 4.0, 90: 5.5, 33: -100.0}},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": 2.0, "repetition_penalty": 1.1},
    "allowed": {"allowed_token_ids": tuple(range(20, 60))},
    "sampled": {"temperature": 0.9, "seed": 5, "frequency_penalty": 2.0, "top_p": 0.9},
    "plain": {},
}


def ask(name: str, adapter: str | None, prompt: list[int], **further: Any) -> EngineRequest:
    return request(f"{name}/{adapter}", prompt, adapter, **{"max_tokens": 20, **ASKED[name], **further})


PROMPT = [9, 8, 7, 9, 8, 7, 9, 8]
ADAPTERS = (None, "R-lora", "E-parallel", "D-lora")


def all_asked() -> list[EngineRequest]:
    return [ask(name, adapter, PROMPT) for name in ASKED for adapter in ADAPTERS]


@pytest.fixture(scope="module")
def engine(mixtral: Served) -> Engine:
    return mixtral.engine()


@pytest.fixture(scope="module")
def together(engine: Engine) -> dict[str, Output]:
    return run(engine, all_asked())


def test_greedy_tokens_are_those_of_generate(mixtral: Served, together: dict[str, Output]) -> None:
    prompt = torch.tensor([PROMPT])
    asked: dict[str, dict[str, Any]] = {
        "repetition": {"repetition_penalty": 1.5},
        "bias": {"sequence_bias": [[[token], value] for token, value in ASKED["bias"]["logit_bias"].items()]},
        "allowed": {"suppress_tokens": [token for token in range(128) if not 20 <= token < 60]},
    }
    for name, settings in asked.items():
        for adapter in ADAPTERS[1:]:
            assert adapter is not None
            mixtral.oracle.set_adapter(adapter)
            want = mixtral.oracle.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, **settings
            )[0, len(PROMPT) :].tolist()
            got = together[f"{name}/{adapter}"].token_ids
            assert got == want, (name, adapter)
            assert got != together[f"plain/{adapter}"].token_ids, "the request asked for nothing"


def test_frequency_in_the_engine(mixtral: Served, together: dict[str, Output]) -> None:
    """A loop over the PEFT model's logits, the penalty written out."""
    for adapter in ADAPTERS:
        ids = list(PROMPT)
        for _ in range(20):
            row = mixtral.logits(adapter, ids)[-1].clone()
            for token in set(ids[len(PROMPT) :]):
                row[token] -= 1.5 * ids[len(PROMPT) :].count(token)
            ids.append(int(row.argmax()))
        assert together[f"frequency/{adapter}"].token_ids == ids[len(PROMPT) :]


def test_logprobs_are_of_the_models_own_distribution(mixtral: Served, together: dict[str, Output]) -> None:
    """Not of what bias and penalties made of it."""
    for name in ASKED:
        output = together[f"{name}/R-lora"]
        own = mixtral.logits("R-lora", PROMPT + output.token_ids).log_softmax(-1)
        want = [float(own[len(PROMPT) - 1 + i, token]) for i, token in enumerate(output.token_ids)]
        assert output.logprobs == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"decode_programs": "off"}, {"prefix_caching": "off", "max_num_batched_tokens": 32}, {"kv_memory": 1 << 16}],
    ids=["no programs", "small chunks", "preempted"],
)
def test_the_same_whatever_the_engine_does(
    mixtral: Served, together: dict[str, Output], settings: dict[str, Any]
) -> None:
    other = mixtral.engine(**settings)
    outputs = run(other, all_asked())
    if "kv_memory" in settings:
        assert other.stats().num_preemptions > 0
    assert {key: output.token_ids for key, output in outputs.items()} == {
        key: output.token_ids for key, output in together.items()
    }


def test_the_same_alone(engine: Engine, together: dict[str, Output]) -> None:
    """Also when the prompt's pages come out of the prefix cache."""
    for one in all_asked()[::3]:
        assert run(engine, [one])[one.request_id].token_ids == together[one.request_id].token_ids


def test_bad_words_in_the_engine(engine: Engine, together: dict[str, Output]) -> None:
    free = together["plain/R-lora"].token_ids
    for length in (1, 2, 3):
        bad = tuple(free[2 : 2 + length])
        one = replace(ask("plain", "R-lora", PROMPT), bad_words=(bad,))
        got = run(engine, [one])[one.request_id].token_ids
        assert all(tuple(got[i : i + length]) != bad for i in range(len(got)))
        first = next(i for i in range(20) if tuple(free[i : i + length]) == bad) + length - 1
        assert got[:first] == free[:first], "until the last token of the first match all is as it was"


def test_least_length_in_the_engine(mixtral: Served, together: dict[str, Output]) -> None:
    free = together["plain/R-lora"].token_ids
    engine = mixtral.engine()
    stop = (free[0], free[1])
    assert len(run(engine, [ask("plain", "R-lora", PROMPT, stop_token_ids=stop)]).popitem()[1].token_ids) == 1
    longer = run(engine, [ask("plain", "R-lora", PROMPT, stop_token_ids=stop, min_tokens=6)]).popitem()[1].token_ids
    assert len(longer) >= 6
    assert not {*stop} & {*longer[:6]}


def test_nothing_left_ends_the_request_and_no_other(engine: Engine, together: dict[str, Output]) -> None:
    none_left = replace(ask("plain", None, PROMPT, allowed_token_ids=(5,)), request_id="x", bad_words=((5, 5),))
    outputs = run(engine, [none_left, ask("plain", None, PROMPT)])
    assert (outputs["x"].token_ids, outputs["x"].finish_reason) == ([5], "error")
    assert outputs["x"].error is not None
    assert "no token is left" in outputs["x"].error
    assert outputs["plain/None"].token_ids == together["plain/None"].token_ids


def test_a_batch_that_asks_for_nothing_is_not_touched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of plain greedy requests has one argmax over its logits and nothing else."""
    monkeypatch.setattr(LogitEditor, "edit", lambda *_: pytest.fail("nobody has asked"))
    outputs = run(engine, [request("x", PROMPT, "R-lora", logprobs=None), request("y", PROMPT)])
    assert [len(output.token_ids) for output in outputs.values()] == [8, 8]
