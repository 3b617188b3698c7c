"""What a request can ask of the sampler, by the `openai` client over real HTTP, against Transformers on the same base."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from replies import assert_error
from running_server import BASE, RunningServer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from perft_serve.server.config import ServerConfig

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


# What is told of prompts, and of the server


def test_prompt_logprobs_in_vllms_shape(client: openai.OpenAI, model: PreTrainedModel) -> None:
    """Of every choice the same, computed once; `rank` counts the likelier tokens."""
    completion = complete(client, {"prompt_logprobs": 2, "n": 2, "return_tokens_as_token_ids": True})
    chat: Any = client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=2,
        extra_body={**EXTRA, "prompt_logprobs": 2},
    )
    assert completion.choices[0].model_extra["prompt_logprobs"] == completion.choices[1].model_extra["prompt_logprobs"]
    for prompt, entries in (
        (completion.choices[0].model_extra["prompt_token_ids"], completion.choices[0].model_extra["prompt_logprobs"]),
        (chat.model_extra["prompt_token_ids"], chat.model_extra["prompt_logprobs"]),
    ):
        with torch.no_grad():
            own = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert entries[0] is None
        assert len(entries) == len(prompt)
        for position in range(1, len(prompt)):
            row, entry = own[position - 1], entries[position]
            assert next(iter(entry)) == str(prompt[position])
            there = entry[str(prompt[position])]
            assert there["logprob"] == pytest.approx(float(row[prompt[position]]), abs=1e-4)
            assert there["rank"] == 1 + int((row > row[prompt[position]]).sum())
            likeliest = sorted(entry.values(), key=lambda each: each["rank"])[:2]
            assert [each["rank"] for each in likeliest] == [1, 2]
            assert [each["logprob"] for each in likeliest] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
            assert len(entry) == (2 if there["rank"] <= 2 else 3)


def test_prompt_logprobs_beside_echo(client: openai.OpenAI) -> None:
    """Each field has as many as it asked for, and the prompt's scores can be had alone."""
    both = complete(client, {"prompt_logprobs": 3}, echo=True, logprobs=1).choices[0]
    assert both.text.startswith(PROMPT)
    num_prompt = len(both.model_extra["prompt_token_ids"])
    assert len(both.logprobs.token_logprobs) == num_prompt + 16
    assert all(len(top) <= 2 for top in both.logprobs.top_logprobs[1:])
    assert all(len(entry) >= 3 for entry in both.model_extra["prompt_logprobs"][1:])
    alone = complete(client, {"prompt_logprobs": 3}, max_tokens=0)
    assert alone.choices[0].model_extra["prompt_logprobs"] == both.model_extra["prompt_logprobs"]
    assert alone.usage.completion_tokens == 0
    asked = {"prompt_logprobs": 3, "prompt_logprobs_start": num_prompt - 2, "cache_salt": "late"}
    for num_found in (0, (num_prompt - 3) // 16 * 16):
        late = complete(client, asked, echo=True, logprobs=1)
        assert late.usage.prompt_tokens_details.cached_tokens == num_found
        late = late.choices[0]
        assert late.text == both.text
        assert late.model_extra["prompt_logprobs"][: num_prompt - 2] == [None] * (num_prompt - 2)
        assert late.logprobs.token_logprobs[: num_prompt - 2] == [None] * (num_prompt - 2)
        assert late.logprobs.top_logprobs[: num_prompt - 2] == [None] * (num_prompt - 2)
        assert late.logprobs.tokens == both.logprobs.tokens
        for mine, its in zip(
            late.model_extra["prompt_logprobs"][-2:], both.model_extra["prompt_logprobs"][-2:], strict=True
        ):
            assert [*mine] == [*its]
        assert late.logprobs.token_logprobs[-18:] == pytest.approx(both.logprobs.token_logprobs[-18:], abs=1e-4)


def test_where_prompt_logprobs_start_is_checked(server: RunningServer) -> None:
    for field, words in (
        ({"prompt_logprobs_start": 1}, "which are not asked for"),
        ({"prompt_logprobs": 1, "prompt_logprobs_start": -1}, "must be between 0 and"),
        ({"prompt_logprobs": 1, "prompt_logprobs_start": 1000}, "but the prompt has"),
    ):
        reply = server.post("/v1/completions", {"prompt": "x", **field})
        assert_error(reply, 400, words, param="prompt_logprobs_start")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prompt_logprobs_are_refused_with_streams(server: RunningServer, path: str) -> None:
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    reply = server.post(path, {**body, "stream": True, "prompt_logprobs": 0})
    assert_error(reply, 400, "not sent in streams", param="prompt_logprobs")


def test_truncation(client: openai.OpenAI, server: RunningServer, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(PROMPT)

    def prompt_of(extra: dict[str, Any], prompt: Any = PROMPT, **body: Any) -> list[int]:
        used = complete(client, extra, prompt=prompt, **body)
        assert used.usage.prompt_tokens == len(used.choices[0].model_extra["prompt_token_ids"])
        return list(used.choices[0].model_extra["prompt_token_ids"])

    for prompt in (PROMPT, ids):
        assert prompt_of({"truncate_prompt_tokens": 4}, prompt) == ids[-4:]
        assert prompt_of({"truncate_prompt_tokens": 4, "truncation_side": "right"}, prompt) == ids[:4]
        assert prompt_of({"truncate_prompt_tokens": 200}, prompt) == ids
    long = [5 + i % 90 for i in range(1000)]
    assert prompt_of({"truncate_prompt_tokens": -1}, long, max_tokens=30) == long[-226:]
    echoed = complete(client, {"truncate_prompt_tokens": 4}, echo=True, max_tokens=0)
    assert echoed.choices[0].text == tokenizer.decode(ids[-4:])
    chat: Any = client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "hello " * 300}],
        max_tokens=20,
        extra_body={**EXTRA, "truncate_prompt_tokens": -1},
    )
    assert chat.usage.prompt_tokens == 236
    for wrong, words in ((0, "leaves no prompt"), (-2, "between -1 and"), (257, "the context is 256")):
        reply = server.post("/v1/completions", {"prompt": "x", "truncate_prompt_tokens": wrong})
        assert_error(reply, 400, words, param="truncate_prompt_tokens")


def test_the_fingerprint_tells_bases_and_adapters_apart(
    client: openai.OpenAI, server: RunningServer, tiny_adapters: dict[str, str]
) -> None:
    """The beginnings of the digests, the same in whole replies and in every chunk."""
    found = {}
    for name in (BASE, *tiny_adapters):
        whole = complete(client, model=name, max_tokens=2)
        messages: Any = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(model=name, messages=messages, max_tokens=2)
        stream = client.completions.create(
            model=name, prompt="x", max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
        chunks = {chunk.system_fingerprint for chunk in stream}
        chat_chunks = {
            chunk.system_fingerprint
            for chunk in client.chat.completions.create(model=name, messages=messages, max_tokens=3, stream=True)
        }
        assert chunks == chat_chunks == {whole.system_fingerprint} == {chat.system_fingerprint}
        found[name] = whole.system_fingerprint
    assert found[BASE] == f"fp_{server.client.base_digest[:10]}"
    assert len(server.client.base_digest) == 64
    for name in tiny_adapters:
        card = server.http.get(f"/v1/models/{name}").json()
        assert found[name] == f"{found[BASE]}_{card['adapter']['digest'][:10]}"
    assert len({*found.values()}) == len(found)


def test_usage(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    """Prompts count once, however many choices; cached tokens are those that no choice had to compute."""
    prompts = ["hello world " * 12, "the quick brown fox jumps " * 9]
    num_prompt = sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    first = complete(client, {"cache_salt": "usage"}, prompt=prompts, n=3, echo=True, max_tokens=5).usage
    assert (first.prompt_tokens, first.completion_tokens, first.total_tokens) == (num_prompt, 30, num_prompt + 30)
    assert first.prompt_tokens_details.cached_tokens == 0
    again = complete(client, {"cache_salt": "usage"}, prompt=prompts, n=3, max_tokens=5).usage
    cached = sum((len(tokenizer.encode(prompt)) - 1) // 16 * 16 for prompt in prompts)
    assert again.prompt_tokens_details.cached_tokens == cached > 0
    stream = client.completions.create(
        model=BASE,
        prompt=prompts,
        n=3,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={**EXTRA, "cache_salt": "usage"},
    )
    assert list(stream)[-1].usage == again
    scored = complete(client, {"cache_salt": "usage", "prompt_logprobs": 0}, prompt=prompts, max_tokens=5).usage
    assert scored.prompt_tokens_details.cached_tokens == 0, "what is told of a prompt is computed"


# return_routing, priority


def routing_in(choice: Any) -> dict[str, Any]:
    found: dict[str, Any] = choice.model_extra["routing"]
    return found


def test_routing(client: openai.OpenAI, server: RunningServer) -> None:
    """Its shape, whole and streamed, in completions and chat; what it says is checked in tests/engine/test_routing.py."""
    body = {"model": "routed", "prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0, "n": 2}
    extra = {**EXTRA, "return_routing": True}
    whole = client.completions.create(extra_body=extra, **body)  # type: ignore[call-overload]
    for choice, start in zip(whole.choices, (0, 4), strict=True):
        routing = routing_in(choice)
        assert routing["start"] == start
        assert routing["layers"] == [0, 1]
        assert len(routing["ids"]) == len(routing["weights"]) == 4 + 6 - 1 - start
        for ids, weights in zip(routing["ids"], routing["weights"], strict=True):
            assert [len(row) for row in ids] == [len(row) for row in weights] == [2, 2]
            assert all(0 <= each < 3 for row in ids for each in row)
            assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in weights), "norm_topk"
    parts: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in client.completions.create(extra_body=extra, stream=True, **body):  # type: ignore[call-overload]
        for choice in chunk.choices:
            if "routing" in (choice.model_extra or {}):
                parts[choice.index].append(routing_in(choice))
    for index, choice in enumerate(whole.choices):
        for name in ("ids", "weights"):
            assert [row for part in parts[index] for row in part[name]] == routing_in(choice)[name]
        assert parts[index][1]["start"] == 4 + (index == 1)
    chat: Any = client.chat.completions.create(
        model="embedded", messages=[{"role": "user", "content": "hi"}], max_tokens=3, extra_body=extra
    )
    assert len(routing_in(chat.choices[0])["ids"]) == chat.usage.total_tokens - 1
    assert "routing" not in complete(client, model="routed").choices[0].model_extra


def test_routing_that_is_refused(server: RunningServer, start_server: Callable[..., RunningServer]) -> None:
    reply = server.post("/v1/completions", {"prompt": "x", "return_routing": True})
    assert_error(reply, 400, "the base has no adapter experts", param="return_routing")
    other = start_server(ServerConfig(max_routed_tokens=20))
    body = {"model": "routed", "prompt": [5] * 10, "return_routing": True, "max_tokens": 5}
    assert other.post("/v1/completions", {**body, "n": 2}).status_code == 200
    for more in ({"n": 3}, {"max_tokens": 11}, {"prompt": [[5] * 10] * 2}):
        assert_error(
            other.post("/v1/completions", {**body, **more}), 400, "this server's limit is 20", param="return_routing"
        )
    body = {"model": "routed", "messages": [{"role": "user", "content": "x"}], "return_routing": True}
    assert_error(other.post("/v1/chat/completions", body), 400, "up to 256 tokens", param="return_routing")


def test_priority(server: RunningServer, start_server: Callable[..., RunningServer]) -> None:
    """Refused by name, unless the server was started for it; then the lower one goes first."""
    assert server.complete(priority=0, max_tokens=1)["choices"]
    reply = server.post("/v1/completions", {"prompt": "x", "priority": 1})
    assert_error(reply, 400, "--scheduling-policy priority", param="priority")
    other = start_server(scheduling_policy="priority", max_num_seqs=1, max_num_batched_tokens=64)
    other.knobs.set(pace=0.02)
    ends: list[str] = []

    async def ask_all() -> None:
        async with openai.AsyncOpenAI(base_url=f"{other.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(name: str, priority: int, num_tokens: int) -> None:
                extra = {**EXTRA, "priority": priority}
                await client.completions.create(model=BASE, prompt="x", max_tokens=num_tokens, extra_body=extra)
                ends.append(name)

            running = asyncio.create_task(ask("running", 0, 40))
            await asyncio.to_thread(other.wait_until, lambda stats: stats.num_running == 1)
            waiting = []
            for name, priority in (("late", 5), ("plain", 0), ("urgent", -5)):
                waiting.append(asyncio.create_task(ask(name, priority, 2)))
                await asyncio.to_thread(other.wait_until, lambda stats: stats.num_waiting == len(waiting))
            await asyncio.gather(running, *waiting)

    asyncio.run(ask_all())
    assert ends == ["running", "urgent", "plain", "late"]
