"""The `openai` client against a real uvicorn: completions, chat, streams, models, errors, hang-ups, many at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping

import openai
import pytest
from running_server import BASE, RunningServer

from perft_serve.server.config import ServerConfig

FREE_RUNNING = {"ignore_eos": True}


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completion(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model=BASE, prompt="hello world", max_tokens=8, temperature=0, extra_body=FREE_RUNNING
    )
    assert completion.id.startswith("cmpl-")
    assert completion.object == "text_completion"
    assert completion.model == BASE
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 8


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="routed", prompt="hello world", max_tokens=40, temperature=0, extra_body=FREE_RUNNING
    )
    stream = client.completions.create(
        model="routed",
        prompt="hello world",
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=FREE_RUNNING,
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    completion = client.chat.completions.create(
        model=BASE,
        messages=messages,  # type: ignore[arg-type]
        max_completion_tokens=20,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body=FREE_RUNNING,
    )
    assert completion.id.startswith("chatcmpl-")
    assert completion.object == "chat.completion"
    choice = completion.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 20
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
    # Special tokens have log-probabilities, but are left out of the text
    shown = [token for token in choice.logprobs.content if not token.token.startswith("<|")]
    assert (
        bytes(byte for token in shown for byte in token.bytes or []).decode(errors="replace") == choice.message.content
    )


def test_chat_stream(client: openai.OpenAI) -> None:
    def ask(**options: object) -> object:
        return client.chat.completions.create(
            model="single",
            messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
            max_tokens=20,
            temperature=0,
            extra_body=FREE_RUNNING,
            **options,  # type: ignore[call-overload]
        )

    whole = ask()
    chunks = list(ask(stream=True))  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content  # type: ignore[attr-defined]
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models(client: openai.OpenAI, tiny_adapters: Mapping[str, str]) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [BASE, *sorted(tiny_adapters)]
    card = client.models.retrieve("routed").to_dict()
    assert card["parent"] == BASE
    assert card["adapter"]["variant"] == "R"  # type: ignore[index]
    for path in tiny_adapters.values():
        assert not any(path in str(model.to_dict()) or "/tmp" in str(model.to_dict()) for model in models)


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="hello")
    assert caught.value.param == "model"
    assert caught.value.status_code == 404
    assert "'nobody'" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])


def test_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=BASE, prompt="hello", max_tokens=-1)


@pytest.mark.parametrize("chat", [False, True])
def test_a_hang_up_in_mid_stream_frees_the_pages(server: RunningServer, client: openai.OpenAI, chat: bool) -> None:
    server.knobs.set(pace=0.02)
    common = {"model": "routed", "max_tokens": 200, "stream": True, "n": 2, "extra_body": FREE_RUNNING}
    stream = (
        client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **common)  # type: ignore[call-overload]
        if chat
        else client.completions.create(prompt=["hello", "world"], **common)  # type: ignore[call-overload]
    )
    next(iter(stream))
    assert server.client.stats().kv_usage > 0
    stream.close()
    steps = server.client.stats().num_steps
    server.wait_until_idle()
    assert server.client.stats().num_steps < steps + 100, "it ran to its end"


def test_many_at_once_on_different_adapters(server: RunningServer, tiny_adapters: Mapping[str, str]) -> None:
    models = [BASE, *tiny_adapters]
    prompts = ["hello world", "the quick brown fox", "1 2 3", "Grüße aus Köln"]

    async def ask_all(concurrently: bool) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(model: str, prompt: str, stream: bool) -> str:
                if not stream:
                    whole = await client.completions.create(
                        model=model, prompt=prompt, max_tokens=12, temperature=0, extra_body=FREE_RUNNING
                    )
                    return whole.choices[0].text
                chunks = await client.completions.create(
                    model=model, prompt=prompt, max_tokens=12, temperature=0, extra_body=FREE_RUNNING, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in chunks])

            jobs = [ask(model, prompt, index % 2 == 0) for index, prompt in enumerate(prompts) for model in models]
            if concurrently:
                return list(await asyncio.gather(*jobs))
            return [await job for job in jobs]

    together = asyncio.run(ask_all(True))
    assert together == asyncio.run(ask_all(False))
    assert len(set(together)) == len(together), "adapters and prompts make no difference"


def test_a_replys_id_is_in_its_header(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model=BASE, prompt="hello", max_tokens=1)
    completion = raw.parse()
    assert completion._request_id == raw.headers["x-request-id"]
    assert completion.id == f"cmpl-{completion._request_id}"


def test_an_error_in_mid_stream(server: RunningServer, client: openai.OpenAI) -> None:
    server.knobs.set(pace=0.05)
    stream = client.completions.create(model=BASE, prompt="hello", max_tokens=100, stream=True, extra_body=FREE_RUNNING)
    received = iter(stream)
    next(received)
    server.knobs.set(spoil="the sky fell")
    with pytest.raises(openai.APIError, match="the sky fell"):
        list(received)


def test_keys_and_bounds(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(ServerConfig(api_keys=("acme:acmes-key-1",), max_tenant_requests=1))
    server.knobs.set(pace=0.02)
    url = f"{server.url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="nobodys-key", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    with openai.OpenAI(base_url=url, api_key="acmes-key-1", max_retries=0) as client:
        stream = client.completions.create(
            model=BASE, prompt="hello", max_tokens=100, stream=True, extra_body=FREE_RUNNING
        )
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=BASE, prompt="hello", max_tokens=1)
        assert caught.value.response.headers["retry-after"] == "1"
        # A client that retries is served when there is room
        timer = threading.Timer(0.3, stream.close)
        timer.start()
        again = client.with_options(max_retries=5).completions.create(model=BASE, prompt="hello", max_tokens=1)
        timer.join()
        assert again.choices[0].finish_reason == "length"
