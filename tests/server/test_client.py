"""The engine client: what crosses between the event loop and the engine's thread, and what happens when one side is slow."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest, EngineStats, TokenEvent
from perft_serve.engine.limits import Limits
from perft_serve.engine.params import RequestError, SamplingParams
from perft_serve.server.client import (
    MAX_UNDELIVERED_STEPS,
    EngineBusyError,
    EngineClient,
    EngineDeadError,
    EventStream,
    SlowReaderError,
)
from perft_serve.server.metrics import Metrics


class CountingEngine:
    """Answers each request with 0, 1, 2, ...; no model."""

    limits = Limits(max_model_len=10_000, vocab_size=10_000)

    def __init__(self) -> None:
        self.requests: dict[str, tuple[EngineRequest, int]] = {}
        self.num_steps = 0
        self.threads: set[int] = {threading.get_ident()}
        self.most_running = 0

    def list_adapters(self) -> list[Any]:
        return []

    def submit(self, request: EngineRequest) -> None:
        self.threads.add(threading.get_ident())
        self.requests[request.request_id] = (request, 0)

    def abort(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        self.requests.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[TokenEvent]:
        self.threads.add(threading.get_ident())
        self.num_steps += 1
        self.most_running = max(self.most_running, len(self.requests))
        events = []
        for request_id, (request, count) in list(self.requests.items()):
            last = count + 1 == request.params.max_tokens
            events.append(TokenEvent(request_id=request_id, token_id=count, finish_reason="length" if last else None))
            self.requests[request_id] = (request, count + 1)
            if last:
                del self.requests[request_id]
        return events

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.requests), num_waiting=0, kv_usage=0, num_preemptions=0, num_steps=self.num_steps
        )


def request(name: str, *, max_tokens: int = 5) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_ids=(1,), params=SamplingParams(max_tokens=max_tokens), arrival=time.monotonic()
    )


async def tokens_of(client: EngineClient, *requests: EngineRequest) -> dict[str, list[int | None]]:
    tokens: dict[str, list[int | None]] = {each.request_id: [] for each in requests}
    with client.submit(requests) as stream:
        async for events in stream:
            for event in events:
                tokens[event.request_id].append(event.token_id)
    return tokens


async def exhaust(stream: EventStream) -> None:
    async for _ in stream:
        pass


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def client(engine: CountingEngine) -> Iterator[EngineClient]:
    metrics = Metrics(CollectorRegistry())
    client = EngineClient(lambda: cast("Engine", engine), metrics=metrics, max_open_requests=50)
    client.start()
    yield client
    client.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_every_event_arrives_once_and_in_order(client: EngineClient, engine: CountingEngine) -> None:
    async def work() -> None:
        groups = [[request(f"{group}-{index}", max_tokens=20) for index in range(5)] for group in range(10)]
        for tokens in await asyncio.gather(*(tokens_of(client, *group) for group in groups)):
            assert set(map(tuple, tokens.values())) == {tuple(range(20))}

    for _ in range(20):  # each time in a loop of its own
        run(work())
    assert len(engine.threads) == 2, "the engine is called from its thread only"
    assert engine.most_running > 5, "requests ran one after the other"


def test_an_idle_engine_does_nothing(client: EngineClient, engine: CountingEngine) -> None:
    run(_discard(tokens_of(client, request("a"))))
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    assert engine.num_steps == 5


async def _discard(work: Coroutine[Any, Any, object]) -> None:
    await work


def test_leaving_the_block_aborts(client: EngineClient, engine: CountingEngine) -> None:
    async def work() -> None:
        with client.submit([request("a", max_tokens=10**9), request("b", max_tokens=10**9)]) as stream:
            async for _ in stream:
                break
        await until(lambda: not engine.requests)

    run(work())


def test_cancelling_the_task_aborts(client: EngineClient, engine: CountingEngine) -> None:
    async def work() -> None:
        task = asyncio.ensure_future(tokens_of(client, request("a", max_tokens=10**9)))
        await until(lambda: bool(engine.requests))
        task.cancel()
        await until(lambda: not engine.requests)

    run(work())


def test_finishing_one_request_early_leaves_the_others(client: EngineClient, engine: CountingEngine) -> None:
    async def work() -> None:
        seen: Sequence[TokenEvent] = []
        with client.submit([request("a", max_tokens=10**9), request("b", max_tokens=2000)]) as stream:
            async for events in stream:
                stream.finish("a")
                seen = events
        assert seen[-1].request_id == "b"
        assert seen[-1].finish_reason == "length"
        assert not engine.requests

    run(work())


def test_a_reader_that_stops_loses_its_request_but_delays_nobody(
    client: EngineClient, engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perft_serve.server.client.MAX_PENDING_EVENTS", 100)

    async def work() -> None:
        with client.submit([request("slow", max_tokens=10**9)]) as slow:
            assert len((await tokens_of(client, request("other", max_tokens=500)))["other"]) == 500
            await until(lambda: not engine.requests)
            with pytest.raises(SlowReaderError, match="100 tokens behind"):
                await anext(slow)

    run(work())


def test_a_blocked_event_loop_does_not_pile_up_events(client: EngineClient, engine: CountingEngine) -> None:
    async def work() -> None:
        with client.submit([request("a", max_tokens=10**9)]):
            time.sleep(0.3)
            assert engine.num_steps <= MAX_UNDELIVERED_STEPS

    run(work())


def test_too_many_requests(client: EngineClient) -> None:
    async def work() -> None:
        with pytest.raises(RequestError, match="at most 50"):
            client.submit([request(str(index)) for index in range(51)])
        with (
            client.submit([request(str(index), max_tokens=10**9) for index in range(50)]),
            pytest.raises(EngineBusyError, match="50 completions"),
        ):
            client.submit([request("more")])
        assert await tokens_of(client, request("more"))

    run(work())


def test_a_refused_request_fails_its_group_only(
    client: EngineClient, engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = engine.submit

    def picky(each: EngineRequest) -> None:
        if each.request_id == "bad":
            raise RequestError("not this one", param="model")
        submit(each)

    monkeypatch.setattr(engine, "submit", picky)

    async def work() -> None:
        other = asyncio.ensure_future(tokens_of(client, request("other", max_tokens=300)))
        with pytest.raises(RequestError, match="not this one"):
            await tokens_of(client, request("good", max_tokens=10**9), request("bad"))
        assert len((await other)["other"]) == 300
        await until(lambda: not engine.requests)

    run(work())


def test_a_dead_engine_fails_everybody(
    client: EngineClient, engine: CountingEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        streams = [client.submit([request(name, max_tokens=10**9)]) for name in "ab"]
        await until(lambda: len(engine.requests) == 2)
        monkeypatch.setattr(engine, "step", lambda: 1 // 0)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="by zero"):
                await exhaust(stream)
        assert isinstance(client.error, ZeroDivisionError)
        with pytest.raises(EngineDeadError, match="by zero"):
            client.submit([request("c")])

    run(work())
    assert "the engine has failed" in caplog.text


def test_closing_ends_what_is_open(client: EngineClient) -> None:
    async def work() -> None:
        stream = client.submit([request("a", max_tokens=10**9)])
        await anext(stream)
        await asyncio.to_thread(client.close)
        with pytest.raises(EngineDeadError):
            await exhaust(stream)

    run(work())


def test_an_engine_that_cannot_be_built() -> None:
    def build() -> Engine:
        raise ValueError("no such model")

    client = EngineClient(build, metrics=Metrics(CollectorRegistry()))
    with pytest.raises(ValueError, match="no such model"):
        client.start()
    client.close()
