"""What a request can ask of the sampler, by the `openai` client over real HTTP, against Transformers on the same base."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from replies import assert_error
from running_server import BASE, RunningServer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

PROMPT = "hello world hello world"
EXTRA = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> PreTrainedModel:
    made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    return made


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    made: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_base)
    return made


def ids_of(completion: Any, choice: int = 0) -> list[int]:
    """The token ids of a choice, prompt apart; of completions and chat alike."""
    ids: list[int] = completion.choices[choice].model_extra["token_ids"]
    return ids


def complete(client: openai.OpenAI, extra: dict[str, Any] | None = None, **body: Any) -> Any:
    settings: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, **body}
    return client.completions.create(extra_body={**EXTRA, **(extra or {})}, **settings)


def generate(model: PreTrainedModel, prompt_ids: list[int], num_tokens: int, **settings: Any) -> list[int]:
    prompt = torch.tensor([prompt_ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    tokens: list[int] = output[0, len(prompt_ids) :].tolist()
    return tokens


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("body", "extra", "settings"),
    [
        ({}, {"repetition_penalty": 0.5}, {"repetition_penalty": 0.5}),
        (
            {"logit_bias": {"70": 6.5, "9": -100, "110": 3}},
            {},
            {"sequence_bias": [[[70], 6.5], [[9], -100.0], [[110], 3.0]]},
        ),
        ({}, {"allowed_token_ids": list(range(20, 90))}, {"suppress_tokens": [*range(20), *range(90, 364)]}),
    ],
    ids=["repetition_penalty", "logit_bias", "allowed_token_ids"],
)
def test_as_generate_does(
    client: openai.OpenAI,
    model: PreTrainedModel,
    chat: bool,
    body: dict[str, Any],
    extra: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    if chat:
        answer: Any = client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=16,
            temperature=0,
            extra_body={**EXTRA, **extra},
            **body,
        )
        prompt = answer.model_extra["prompt_token_ids"]
    else:
        answer = complete(client, extra, **body)
        prompt = answer.choices[0].model_extra["prompt_token_ids"]
    assert ids_of(answer) == generate(model, prompt, 16, **settings)
    assert ids_of(answer) != generate(model, prompt, 16), "nothing was asked for"


@pytest.mark.parametrize(("frequency", "presence"), [(1.5, 0.0), (0.0, 2.0), (-1.0, 0.5)])
def test_frequency_and_presence(
    client: openai.OpenAI, model: PreTrainedModel, frequency: float, presence: float
) -> None:
    completion = complete(client, frequency_penalty=frequency, presence_penalty=presence)
    prompt = completion.choices[0].model_extra["prompt_token_ids"]
    ids = list(prompt)
    for _ in range(16):
        with torch.no_grad():
            row = model(torch.tensor([ids])).logits[0, -1]
        generated = ids[len(prompt) :]
        for token in set(generated):
            row[token] -= frequency * generated.count(token) + presence
        ids.append(int(row.argmax()))
    assert ids_of(completion) == ids[len(prompt) :]


def test_bad_words(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    """A word is not generated where it would have been, nor with a space before it; what came before stands."""
    free = complete(client, max_tokens=30)
    text, ids = free.choices[0].text, ids_of(free)
    tried = 0
    for start in range(2, 20, 3):
        word = tokenizer.decode(ids[start : start + 2])
        if not word.strip() or tokenizer.encode(word.lstrip()) != ids[start : start + 2]:
            continue
        tried += 1
        got = complete(client, {"bad_words": [word]}, max_tokens=30)
        for spelled in (word.lstrip(), " " + word.lstrip()):
            bad = tokenizer.encode(spelled)
            assert all(ids_of(got)[i : i + len(bad)] != bad for i in range(30))
        assert got.choices[0].text != text
    assert tried, "no word of the free text is its own tokens"


def test_least_length(client: openai.OpenAI) -> None:
    """Neither a stop token nor a stop string nor the end of the sequence ends the text before `min_tokens`."""
    free = complete(client, max_tokens=30)
    ids, text = ids_of(free), free.choices[0].text
    by_token = complete(client, {"stop_token_ids": [ids[2]], "min_tokens": 10}, max_tokens=30)
    assert len(ids_of(by_token)) >= 10
    assert ids[2] not in ids_of(by_token)[:10]
    assert ids_of(complete(client, {"stop_token_ids": [ids[2]]}, max_tokens=30)) == ids[:3]
    stop = text[3:5]
    assert complete(client, stop=stop, max_tokens=30).choices[0].text == text[: text.index(stop)]
    by_string = complete(client, {"min_tokens": 30}, stop=stop, max_tokens=30)
    assert (by_string.choices[0].text, by_string.choices[0].finish_reason) == (text, "length")
    ended = complete(client, {"ignore_eos": False}, logit_bias={"0": 100})
    assert (ids_of(ended), ended.choices[0].finish_reason) == ([0], "stop")
    later = complete(client, {"ignore_eos": False, "min_tokens": 4}, logit_bias={"0": 100})
    assert (ids_of(later)[:4], ids_of(later)[4:]) == (ids[:4], [0])


def test_nothing_left_to_choose(server: RunningServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no token is left"):
        complete(client, {"allowed_token_ids": [0], "ignore_eos": False, "min_tokens": 2})
    server.wait_until_idle()


@pytest.mark.parametrize(
    "extra",
    [
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.0, "seed": -3, "top_p": 0.8, "frequency_penalty": 1.0},
        {"temperature": 0.7, "seed": 1, "min_p": 0.05, "repetition_penalty": 1.2, "logit_bias": {"70": 2}},
    ],
)
def test_a_seed_gives_the_same_whatever_else_runs(server: RunningServer, extra: dict[str, Any]) -> None:
    """Alone, and among many others of all kinds, adapters too."""
    body = {"model": "routed", "prompt": PROMPT, "max_tokens": 16, "extra_body": {**EXTRA, **extra}}
    body["extra_body"] = {**EXTRA, **extra}

    async def ask(crowd: int) -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            others = [
                client.completions.create(
                    model=[BASE, "routed", "dense"][i % 3],
                    prompt=PROMPT[i % 5 :],
                    max_tokens=20,
                    presence_penalty=i % 2,
                    temperature=i % 3 / 2,
                    logprobs=i % 4,
                )
                for i in range(crowd)
            ]
            mine, *_ = await asyncio.gather(client.completions.create(**body), *others)  # type: ignore[call-overload]
            return ids_of(mine)

    assert asyncio.run(ask(0)) == asyncio.run(ask(12)) == asyncio.run(ask(25))


def test_logprobs_are_exact_before_anything_is_changed(client: openai.OpenAI, model: PreTrainedModel) -> None:
    named = {"return_tokens_as_token_ids": True}  # tokens of equal text are told apart
    changed = {"repetition_penalty": 1.4, "temperature": 0.7}
    completion = complete(client, {**named, **changed}, logprobs=3, logit_bias={"70": 6.5})
    greedy = complete(client, named, logprobs=3)
    for each in (completion, greedy):
        prompt = each.choices[0].model_extra["prompt_token_ids"]
        with torch.no_grad():
            own = model(torch.tensor([prompt + ids_of(each)])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
        logprobs = each.choices[0].logprobs
        want = [float(own[i, token]) for i, token in enumerate(ids_of(each))]
        assert logprobs.token_logprobs == pytest.approx(want, abs=1e-4)
        for i, top in enumerate(logprobs.top_logprobs):
            assert sorted(top.values(), reverse=True)[:3] == pytest.approx(own[i].topk(3).values.tolist(), abs=1e-4)
    for logprob, top in zip(greedy.choices[0].logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob == max(top.values())


def test_best_of_is_n_or_refused(server: RunningServer) -> None:
    assert len(server.complete(n=3, best_of=3, max_tokens=2)["choices"]) == 3
    for body in ({"best_of": 2}, {"best_of": 2, "n": 3}):
        reply = server.post("/v1/completions", {"prompt": "x", **body})
        assert_error(reply, 400, "best_of=2 is not supported", param="best_of")
