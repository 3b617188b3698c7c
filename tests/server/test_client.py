"""The engine client: what crosses between the event loop and the engine's process, and what happens when one side is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from knobs import Knobs, engine_command
from prometheus_client import CollectorRegistry

from perft.errors import AdapterError
from perft_serve.adapters.catalog import AdapterRef, UnknownAdapterError
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.events import EngineRequest, TokenEvent, TokenLogprobs
from perft_serve.engine.loop import WINDOW
from perft_serve.engine.params import RequestError, SamplingParams
from perft_serve.server.client import EngineBusyError, EngineClient, EngineDeadError, EventStream, SlowReaderError
from perft_serve.server.config import ServerConfig
from perft_serve.server.metrics import Metrics

FOR_EVER = 10**9


def request(name: str, *, max_tokens: int = 5, prompt: tuple[int, ...] = (1,)) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_ids=prompt, params=SamplingParams(max_tokens=max_tokens), arrival=time.monotonic()
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
def knobs(tmp_path: Path) -> Knobs:
    return Knobs(tmp_path / "knobs.json")


@contextmanager
def running_client(knobs: Knobs, **settings: Any) -> Iterator[EngineClient]:
    client = EngineClient(
        EngineConfig(model="none", adapters={"first": "1"}),
        ServerConfig(max_open_requests=50, engine_restarts=0, **settings),
        Metrics(CollectorRegistry()),
        command=engine_command("counting_engine", knobs),
    )
    try:
        client.start()
        yield client
    finally:
        client.close()


@pytest.fixture
def client(knobs: Knobs) -> Iterator[EngineClient]:
    with running_client(knobs) as client:
        yield client


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def until_idle(client: EngineClient) -> None:
    await until(lambda: client.stats().num_running == 0)


def test_every_event_arrives_once_and_in_order(client: EngineClient) -> None:
    async def work() -> None:
        groups = [[request(f"{group}-{index}", max_tokens=20) for index in range(5)] for group in range(10)]
        for tokens in await asyncio.gather(*(tokens_of(client, *group) for group in groups)):
            assert set(map(tuple, tokens.values())) == {tuple(range(20))}

    for _ in range(20):  # each time in a loop of its own
        run(work())
    assert client.stats().num_preemptions > 5, "requests ran one after the other"


def test_thousands_of_small_requests(client: EngineClient) -> None:
    async def one_after_the_other(name: int) -> None:
        for index in range(100):
            tokens = await tokens_of(client, request(f"{name}-{index}", max_tokens=2))
            assert [*tokens.values()] == [[0, 1]]

    async def work() -> None:
        await asyncio.gather(*map(one_after_the_other, range(30)))
        await until_idle(client)

    run(work())


def test_an_idle_engine_does_nothing(client: EngineClient) -> None:
    run(_discard(tokens_of(client, request("a"))))

    def cpu_seconds() -> float:
        fields = Path(f"/proc/{client.engine_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    if not Path("/proc/self/stat").exists():
        pytest.skip("how busy another process is, only Linux says in /proc")
    before, ours = cpu_seconds(), time.process_time()
    time.sleep(0.5)
    assert cpu_seconds() - before < 0.1
    assert time.process_time() - ours < 0.1
    assert client.stats().num_steps == 5


async def _discard(work: Coroutine[Any, Any, object]) -> None:
    await work


def test_leaving_the_block_aborts(client: EngineClient) -> None:
    async def work() -> None:
        with client.submit([request("a", max_tokens=FOR_EVER), request("b", max_tokens=FOR_EVER)]) as stream:
            async for _ in stream:
                break
        await until_idle(client)

    run(work())


def test_cancelling_the_task_aborts(client: EngineClient) -> None:
    async def work() -> None:
        task = asyncio.ensure_future(tokens_of(client, request("a", max_tokens=FOR_EVER)))
        await until(lambda: client.stats().num_running == 1)
        task.cancel()
        await until_idle(client)

    run(work())


def test_finishing_one_request_early_leaves_the_others(client: EngineClient) -> None:
    async def work() -> None:
        seen: Sequence[TokenEvent] = []
        with client.submit([request("a", max_tokens=FOR_EVER), request("b", max_tokens=2000)]) as stream:
            async for events in stream:
                stream.finish("a")
                seen = events
        assert seen[-1].request_id == "b"
        assert seen[-1].finish_reason == "length"
        await until_idle(client)

    run(work())


def test_a_reader_that_stops_loses_its_request_but_delays_nobody(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perft_serve.server.client.MAX_PENDING_EVENTS", 100)

    async def work() -> None:
        with client.submit([request("slow", max_tokens=FOR_EVER)]) as slow:
            assert len((await tokens_of(client, request("other", max_tokens=500)))["other"]) == 500
            await until_idle(client)
            with pytest.raises(SlowReaderError, match="100 tokens behind"):
                await anext(slow)

    run(work())


def test_log_probabilities_count_as_events(client: EngineClient) -> None:
    async def work() -> None:
        logprobs = TokenLogprobs(token_id=0, logprob=0.0, top=((0, 0.0),) * 20)
        with client.submit([request("a", max_tokens=FOR_EVER)]) as stream:
            for _ in range(WINDOW * 2):  # whatever is asked for, a held up event loop fails nobody
                stream._push(TokenEvent(request_id="a", token_id=0, logprobs=logprobs), 0.0)
            assert stream._failure is None
            stream._push(TokenEvent(request_id="a", token_id=0, logprobs=logprobs), 0.0)
            with pytest.raises(SlowReaderError):
                await anext(stream)

    run(work())


def test_finished_requests_are_open_until_they_are_read(client: EngineClient) -> None:
    async def work() -> None:
        with client.submit([request(str(index)) for index in range(50)]):
            await until(lambda: not client._streams)
            with pytest.raises(EngineBusyError, match="50 completions"):
                client.submit([request("more")])
        assert await tokens_of(client, request("more"))

    run(work())


def test_a_blocked_event_loop_does_not_pile_up_events(client: EngineClient) -> None:
    async def work() -> None:
        piled_up: list[int] = []
        with client.submit([request("a", max_tokens=FOR_EVER)]) as stream:
            time.sleep(0.5)
            # Behind whatever has come meanwhile, and before anything that comes once the loop has taken that.
            asyncio.get_running_loop().call_soon(lambda: piled_up.append(client.stats().num_steps))
            events = await anext(stream)
            while len(events) < 3 * WINDOW:  # it goes on as soon as the loop does
                events += await anext(stream)
        assert piled_up[0] <= WINDOW
        assert [event.token_id for event in events] == [*range(len(events))]

    run(work())


def test_a_blocked_event_loop_is_not_taken_for_a_dead_engine(knobs: Knobs) -> None:
    async def work(client: EngineClient) -> None:
        with client.submit([request("a", max_tokens=FOR_EVER)]) as stream:
            time.sleep(2.5)
            await anext(stream)
            time.sleep(2.5)
            await anext(stream)

    with running_client(knobs, engine_heartbeat_timeout=1) as client:
        run(work(client))
        assert client.engine_state == "ready"


def test_too_many_requests(client: EngineClient) -> None:
    async def work() -> None:
        with pytest.raises(RequestError, match="at most 50"):
            client.submit([request(str(index)) for index in range(51)])
        with (
            client.submit([request(str(index), max_tokens=FOR_EVER) for index in range(50)]),
            pytest.raises(EngineBusyError, match="50 completions"),
        ):
            client.submit([request("more")])
        assert await tokens_of(client, request("more"))

    run(work())


def test_a_refused_request_fails_its_group_only(client: EngineClient) -> None:
    async def work() -> None:
        other = asyncio.ensure_future(tokens_of(client, request("other", max_tokens=300)))
        with pytest.raises(RequestError, match="the prompt is too long") as caught:
            await tokens_of(client, request("good", max_tokens=FOR_EVER), request("bad", prompt=(1,) * 101))
        assert caught.value.param == "prompt"
        assert len((await other)["other"]) == 300
        await until_idle(client)

    run(work())


def test_a_bug_in_the_engine_fails_the_request_that_met_it(knobs: Knobs, capfd: pytest.CaptureFixture[str]) -> None:
    knobs.set(refuse=(5,))

    async def work(client: EngineClient) -> None:
        with pytest.raises(RuntimeError, match="its log says why"):
            await tokens_of(client, request("bad", prompt=(5,)))
        assert await tokens_of(client, request("good"))

    with running_client(knobs) as client:
        run(work(client))
    assert "KeyError: 'a bug'" in capfd.readouterr().err


def test_a_text_that_cannot_be_sent_harms_nobody(client: EngineClient) -> None:
    params = SamplingParams(stop=("\ud800",))

    async def work() -> None:
        with pytest.raises(UnicodeEncodeError):
            client.submit([EngineRequest(request_id="a", prompt_ids=(1,), params=params)])
        assert await tokens_of(client, request("a"))

    run(work())


def test_a_dead_engine_fails_everybody(knobs: Knobs, capfd: pytest.CaptureFixture[str]) -> None:
    async def work(client: EngineClient) -> None:
        streams = [client.submit([request(name, max_tokens=FOR_EVER)]) for name in "ab"]
        waiting = asyncio.ensure_future(client.warm_adapter(AdapterRef(name="slow", source="60000")))
        await until(lambda: client.stats().num_running == 2)
        knobs.set(failure="division by zero")
        for stream in streams:
            with pytest.raises(EngineDeadError, match="the engine has failed"):
                await exhaust(stream)
        with pytest.raises(EngineDeadError, match="the engine has failed"):
            await waiting
        with pytest.raises(EngineDeadError, match="has stopped: the engine has failed; the log says why") as caught:
            client.submit([request("c")])
        assert caught.value.retry_after is None
        with pytest.raises(EngineDeadError):
            await client.retire_adapter("slow", 1)
        assert client.engine_state == "dead"
        assert client.error == "the engine has failed; the log says why"

    with running_client(knobs) as client:
        run(work(client))
    errors = capfd.readouterr().err
    assert "Traceback" in errors
    assert "RuntimeError: division by zero" in errors


def test_closing_ends_what_is_open(client: EngineClient) -> None:
    async def work() -> None:
        stream = client.submit([request("a", max_tokens=FOR_EVER)])
        await anext(stream)
        await asyncio.to_thread(client.close)
        with pytest.raises(EngineDeadError, match="the server is stopping"):
            await exhaust(stream)

    run(work())


class TestAdapters:
    def test_what_was_loaded_at_the_start(self, client: EngineClient) -> None:
        async def work() -> None:
            await client.warm_adapter(client.catalog.resolve("first"))
            assert client.status("first").state == "resident"

        run(work())
        with pytest.raises(UnknownAdapterError):
            client.status("nobody")

    def test_warming_waits_until_it_is_there(self, client: EngineClient) -> None:
        async def work() -> None:
            ref = client.catalog.register("late", "100")
            assert client.status("late").state == "registered"
            start = time.monotonic()
            waiting = asyncio.ensure_future(client.warm_adapter(ref, pin=True))
            await until(lambda: client.status("late").state == "loading")
            status = await waiting
            assert time.monotonic() - start >= 0.1
            assert status == client.status("late")
            assert (status.state, status.pinned, status.version) == ("resident", True, 1)
            assert await client.warm_adapter(ref) == status, "it is there already"

        run(work())

    def test_failures_say_why_and_can_be_mended(self, client: EngineClient) -> None:
        async def work() -> None:
            with pytest.raises(AdapterError, match="it is broken"):
                await client.warm_adapter(client.catalog.register("a", "bad"))
            assert (client.status("a").state, client.status("a").error) == ("failed", "it is broken")
            with pytest.raises(AdapterError, match="it is broken"):
                await client.warm_adapter(client.catalog.resolve("a"))
            with pytest.raises(AdapterError, match="not even tried"):
                await client.warm_adapter(AdapterRef(name="b", source="refused"))
            ref = client.catalog.register("a", "1")
            assert client.status("a").state == "registered", "that is another version"
            assert (await client.warm_adapter(ref)).version == 2
            with pytest.raises(AdapterError, match="it is broken"):
                await client.warm_adapter(client.catalog.prepare("a", "bad"))
            assert 3 not in client._statuses["a"], "broken versions that never were anybody's pile up"
            await client.retire_adapter("a", 3)
            assert "a" not in client._statuses

        run(work())

    def test_retiring_waits_until_it_is_gone(self, client: EngineClient) -> None:
        async def work() -> None:
            for version in (1, 2, 3):
                await client.warm_adapter(AdapterRef(name="a", source="1", version=version))
            client.catalog.register("a", "1")
            await client.retire_adapter("a", 2)
            assert set(client._statuses["a"]) == {3}
            await client.retire_adapter("a", 3)
            assert client.status("a").state == "registered"
            await client.retire_adapter("never seen", 7)

        run(work())

    def test_what_is_deleted_while_it_loads_does_not_come(self, client: EngineClient) -> None:
        async def work() -> None:
            waiting = asyncio.ensure_future(client.warm_adapter(AdapterRef(name="a", source="60000")))
            await until(lambda: "a" in client._statuses)
            await client.retire_adapter("a", 1)
            with pytest.raises(AdapterError, match="was deleted while it was loaded"):
                await waiting

        run(work())

    def test_what_cannot_be_pinned_does_not_stay(self, client: EngineClient) -> None:
        async def work() -> None:
            current = client.catalog.register("a", "1")
            await client.warm_adapter(current, pin=True)
            with pytest.raises(AdapterError, match="cannot be pinned"):
                await client.warm_adapter(client.catalog.prepare("a", "unpinnable"), pin=True)
            await until(lambda: set(client._statuses["a"]) == {current.version})
            assert client.status("a").pinned
            assert (await client.warm_adapter(current)).pinned, "as it was"
            assert not (await client.warm_adapter(current, pin=False)).pinned

        run(work())

    def test_many_at_once_and_some_give_up(self, client: EngineClient) -> None:
        async def work() -> None:
            refs = [AdapterRef(name=f"a{index}", source=str(index % 50)) for index in range(500)]
            jobs = [asyncio.ensure_future(client.warm_adapter(ref)) for ref in refs]
            await asyncio.sleep(0)
            for job in jobs[::2]:
                job.cancel()
            assert all(status.state == "resident" for status in await asyncio.gather(*jobs[1::2]))
            await until(lambda: all(client._statuses[ref.name][1].state == "resident" for ref in refs))
            assert not client._replies
            assert not any(client._watchers.values())

        run(work())
