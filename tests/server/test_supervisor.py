"""The supervisor: engines that cannot start, die, hang, or talk nonsense; a front that dies. Real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from knobs import Knobs, engine_command
from prometheus_client import CollectorRegistry

from perft_serve.adapters.catalog import AdapterRef
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.events import EngineRequest
from perft_serve.engine.params import SamplingParams
from perft_serve.server import supervisor as supervisor_module
from perft_serve.server.client import EngineClient, EngineDeadError
from perft_serve.server.config import ServerConfig
from perft_serve.server.metrics import Metrics
from perft_serve.server.supervisor import EngineStartError


def until(condition: Callable[[], object], *, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def knobs(tmp_path: Path) -> Knobs:
    return Knobs(tmp_path / "knobs.json")


class Clients:
    """Makes clients of the engine that counts, and closes them."""

    def __init__(self, stack: ExitStack, knobs: Knobs) -> None:
        self._stack = stack
        self._knobs = knobs

    def new(
        self, *, command: list[str] | None = None, restarts: int = 1, heartbeat: int = 10, step: int = 0
    ) -> EngineClient:
        config = ServerConfig(
            engine_restarts=restarts, engine_heartbeat_timeout=heartbeat, engine_step_timeout=step, max_open_requests=10
        )
        client = EngineClient(
            EngineConfig(model="none", adapters={"first": "1"}),
            config,
            Metrics(CollectorRegistry()),
            command=command or engine_command("counting_engine", self._knobs),
        )
        self._stack.callback(client.close)
        return client

    def started(self, **settings: int) -> EngineClient:
        client = self.new(**settings)  # type: ignore[arg-type]
        client.start()
        return client


@pytest.fixture
def clients(knobs: Knobs, capfd: pytest.CaptureFixture[str]) -> Iterator[Clients]:
    with ExitStack() as stack:
        yield Clients(stack, knobs)


def pid_of(client: EngineClient) -> int:
    assert client.engine_pid is not None
    return client.engine_pid


def endless(name: str = "a") -> EngineRequest:
    return EngineRequest(request_id=name, prompt_ids=(1,), params=SamplingParams(max_tokens=10**9))


async def lose(client: EngineClient, cause: Callable[[], object]) -> tuple[EngineDeadError, float]:
    """Streams until the engine is gone; gives the error, and the seconds since its cause."""
    with client.submit([endless()]) as stream:
        await anext(stream)
        cause()
        start = time.monotonic()
        with pytest.raises(EngineDeadError) as caught:
            async for _ in stream:
                pass
        return caught.value, time.monotonic() - start


def answers(client: EngineClient) -> bool:
    async def ask() -> bool:
        with client.submit([endless()]) as stream:
            return bool(await anext(stream))

    return asyncio.run(asyncio.wait_for(ask(), timeout=10))


FRONT = """
import sys
sys.path.append({tests!r})
import without_torch
from pathlib import Path
from knobs import Knobs, engine_command
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.messages import Abort
from perft_serve.server.config import ServerConfig
from perft_serve.server.supervisor import Supervisor

class Listener:
    def engine_started(self, link, _): link.send(Abort(request_ids=[]))  # has it make a step
    def engine_said(self, *_): pass
    engine_gone = engine_said

command = engine_command("counting_engine", Knobs(Path({knobs!r})))
supervisor = Supervisor(EngineConfig(model="none"), ServerConfig(engine_heartbeat_timeout=2), Listener(), command=command)
supervisor.start()
assert "torch" not in sys.modules
print(supervisor.pid, flush=True)
for _ in sys.stdin:
    print(f"{{supervisor.state}} after {{supervisor.num_restarts}} restarts", flush=True)
supervisor.close()
"""


class Front:
    """A supervisor in a process of its own."""

    def __init__(self, knobs: Knobs) -> None:
        code = FRONT.format(tests=str(Path(__file__).parents[1]), knobs=str(knobs.path))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.engine_pid = int(self._line())

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


class TestStart:
    @pytest.mark.parametrize(
        ("failure", "words"),
        [
            ("there is no model at /x", "there is no model at /x"),
            ("exit", "the engine's process has ended with status 7; its last words are in the log"),
            ("kill", r"was killed \(SIGKILL\); .* out of memory .* give less kv_memory"),
        ],
    )
    def test_one_that_fails_says_why(self, clients: Clients, knobs: Knobs, failure: str, words: str) -> None:
        knobs.set(start_failure=failure)
        client = clients.new()
        with pytest.raises(EngineStartError, match=words):
            client.start()
        assert client.engine_state == "dead"
        assert client.num_restarts == 0, "that would hardly help"

    def test_a_command_that_is_not_there(self, clients: Clients) -> None:
        with pytest.raises(OSError, match="no-such-program"):
            clients.new(command=["/no-such-program"]).start()

    def test_a_folder_whose_name_is_too_long_for_a_socket(
        self, clients: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / ("x" * 100)
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with pytest.raises(OSError, match="too long a name"):
            clients.new().start()
        assert not list(folder.iterdir())

    def test_giving_up_in_the_middle(self, clients: Clients, knobs: Knobs) -> None:
        knobs.set(start_failure="hang")
        client = clients.new()
        client._supervisor._thread.start()
        until(lambda: client.engine_pid)
        pid = pid_of(client)
        start = time.monotonic()
        client.close()
        assert time.monotonic() - start < 2
        assert not is_alive(pid)

    def test_the_sockets_are_private_and_do_not_stay(self, clients: Clients) -> None:
        client = clients.started()
        assert client._link is not None
        folder = Path(client._link._folder.name)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        client.close()
        assert not folder.exists()
        assert client.engine_state == "dead"


class TestDeath:
    def test_a_killed_engine_comes_back(self, clients: Clients) -> None:
        client = clients.started()
        pid = pid_of(client)
        error, seconds = asyncio.run(lose(client, lambda: os.kill(pid, signal.SIGKILL)))
        assert seconds < 2
        assert "is being restarted, try again" in str(error)
        assert "SIGKILL" in str(error)
        assert error.retry_after is not None
        assert error.retry_after >= 1
        until(lambda: client.engine_state == "ready")
        assert client.num_restarts == 1
        assert client.error is None
        assert pid_of(client) != pid
        assert answers(client)

    def test_while_it_is_away_requests_are_refused_at_once(self, clients: Clients, knobs: Knobs) -> None:
        client = clients.started()
        knobs.set(start_failure="hang")
        asyncio.run(lose(client, lambda: os.kill(pid_of(client), signal.SIGKILL)))
        assert client.engine_state == "restarting"
        with pytest.raises(EngineDeadError, match="being restarted"):
            answers(client)

    def test_too_many_deaths_are_the_end(
        self, clients: Clients, knobs: Knobs, caplog: pytest.LogCaptureFixture
    ) -> None:
        client = clients.started(restarts=2)
        knobs.set(start_failure="there is no model at /x")
        os.kill(pid_of(client), signal.SIGKILL)
        until(lambda: client.engine_state == "dead")
        assert client.num_restarts == 2
        assert client.error == "the engine cannot be started; the log says why"
        with pytest.raises(EngineDeadError, match="has stopped: the engine cannot be started; the log") as caught:
            answers(client)
        assert caught.value.retry_after is None
        assert "there is no model at /x; it is given up after 2 restarts" in caplog.text

    def test_waiting_for_the_next_try_does_not_hold_up_a_stop(
        self, clients: Clients, knobs: Knobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor_module, "_delay", lambda _: 1000.0)
        client = clients.started()
        os.kill(pid_of(client), signal.SIGKILL)
        until(lambda: client.engine_state == "restarting")
        start = time.monotonic()
        client.close()
        assert time.monotonic() - start < 2

    def test_old_failures_are_forgotten(self, clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervisor_module, "RUNS_WELL_SECONDS", 0.0)
        client = clients.started(restarts=1)
        for _ in range(3):
            pid = pid_of(client)
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: pid_of(client) != pid and client.engine_state == "ready")  # type: ignore[misc]
        assert client.num_restarts == 3

    def test_a_new_engine_gets_what_the_old_one_had(self, clients: Clients) -> None:
        client = clients.started()

        async def before() -> None:
            await client.warm_adapter(client.catalog.register("pinned", "1"), pin=True)
            await client.warm_adapter(client.catalog.register("first", "2"))  # another version than at the start
            await client.warm_adapter(client.catalog.register("deleted", "1"))
            client.catalog.remove("deleted")
            await client.warm_adapter(AdapterRef(name="never-registered", source="1"))
            waiting = asyncio.ensure_future(client.warm_adapter(client.catalog.register("on-its-way", "60000")))
            os.kill(pid_of(client), signal.SIGKILL)
            with pytest.raises(EngineDeadError):
                await waiting
            assert client.status("pinned").state == "registered"

        asyncio.run(before())
        until(lambda: client.engine_state == "ready")
        until(lambda: client.status("first").state == client.status("pinned").state == "resident")
        assert client.status("pinned").pinned
        assert client.status("first").version == 2
        assert set(client._statuses) == {"first", "pinned"}

    def test_one_that_dies_before_it_has_everything_again(self, clients: Clients) -> None:
        client = clients.started(restarts=2)

        async def before() -> None:
            for index in range(20):
                name = f"a{index}"
                await client.warm_adapter(client.catalog.register(name, "100"), pin=index == 0)

        asyncio.run(before())
        for _ in range(2):
            pid = pid_of(client)
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: pid_of(client) != pid and client.engine_state == "ready")  # type: ignore[misc]
        until(lambda: all(client.status(f"a{index}").state == "resident" for index in range(20)))
        assert client.status("a0").pinned

    def test_what_is_counted_never_goes_back(self, clients: Clients) -> None:
        client = clients.started()
        asyncio.run(lose(client, lambda: os.kill(pid_of(client), signal.SIGKILL)))
        steps = client.stats().num_steps
        assert steps > 0
        assert client.stats().num_running == 0
        until(lambda: client.engine_state == "ready")
        assert client.stats().num_steps == steps
        assert answers(client)
        until(lambda: client.stats().num_steps > steps)


class TestHanging:
    def test_an_engine_that_falls_silent(self, clients: Clients) -> None:
        client = clients.started(heartbeat=1)
        pid = pid_of(client)
        error, seconds = asyncio.run(lose(client, lambda: os.kill(pid, signal.SIGSTOP)))
        assert "has said nothing for" in str(error)
        assert 1 <= seconds < 4
        until(lambda: client.engine_state == "ready")
        assert not is_alive(pid)
        assert answers(client)

    def test_a_step_that_does_not_end(self, clients: Clients, knobs: Knobs, capfd: pytest.CaptureFixture[str]) -> None:
        client = clients.started(step=1)
        pid = pid_of(client)
        error, seconds = asyncio.run(lose(client, lambda: knobs.set(pace=10_000)))
        knobs.reset()
        assert "a step of the engine takes longer than 1 seconds (engine_step_timeout)" in str(error)
        assert 1 <= seconds < 5
        until(lambda: client.engine_state == "ready")
        assert not is_alive(pid)
        assert answers(client)
        assert "counting_engine.py" in capfd.readouterr().err, "the log shows where it hung"

    def test_a_restart_that_does_not_end(self, clients: Clients, knobs: Knobs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervisor_module, "_MIN_START_SECONDS", 1.0)
        monkeypatch.setattr(supervisor_module, "_START_FACTOR", 0)
        client = clients.started(heartbeat=1)
        knobs.set(start_failure="hang")
        os.kill(pid_of(client), signal.SIGKILL)
        until(lambda: client.engine_state == "dead")
        assert client.error == "the engine has not started within 1 seconds"

    @pytest.mark.parametrize("is_first", [True, False])
    def test_one_that_falls_silent_while_it_starts(self, clients: Clients, knobs: Knobs, is_first: bool) -> None:
        client = clients.new(heartbeat=1)
        if is_first:
            knobs.set(start_failure="hang")
            client._supervisor._thread.start()
            until(lambda: client.engine_pid)
        else:
            client.start()
            first = pid_of(client)
            knobs.set(start_failure="hang")
            os.kill(first, signal.SIGKILL)
            until(lambda: pid_of(client) != first)
        time.sleep(2.5)
        os.kill(pid_of(client), signal.SIGSTOP)
        until(lambda: client.engine_state == "dead", seconds=15)
        assert "has said nothing for" in str(client.error)
        until(lambda: not is_alive(pid_of(client)))

    def test_slow_steps_are_no_hang(self, clients: Clients, knobs: Knobs) -> None:
        client = clients.started(heartbeat=1, step=3)
        knobs.set(pace=1.8)

        async def ask() -> None:
            with client.submit([endless()]) as stream:
                for _ in range(2):
                    await anext(stream)

        asyncio.run(ask())
        assert client.num_restarts == 0

    def test_when_everything_was_stopped_for_a_while_nobody_was_silent(self, knobs: Knobs) -> None:
        """As when a machine goes to sleep: the watching thread finds the clock far ahead, and nothing in its socket."""
        with Front(knobs) as front:
            for pid in (front.engine_pid, front.process.pid):
                os.kill(pid, signal.SIGSTOP)
            time.sleep(4)
            os.kill(front.process.pid, signal.SIGCONT)
            time.sleep(0.7)
            os.kill(front.engine_pid, signal.SIGCONT)
            time.sleep(0.7)
            assert front.ask() == "ready after 0 restarts"


class TestNonsense:
    def test_from_the_front(self, clients: Clients, caplog: pytest.LogCaptureFixture) -> None:
        client = clients.started()
        assert client._link is not None
        link = client._link
        error, _ = asyncio.run(lose(client, lambda: link._commands.send(b"\x81\xa4type\xa6Submit")))
        assert "the engine has failed; the log says why" in str(error)
        assert "MessageError: a malformed command (Submit, 13 bytes)" in caplog.text
        until(lambda: client.engine_state == "ready")

    def test_from_the_engine(self, clients: Clients) -> None:
        code = (
            "import sys, zmq; socket = zmq.Context().socket(zmq.PUSH); "
            "socket.connect(f'ipc://{sys.argv[1]}/reports'); socket.send(b'hello'); sys.stdin.read()"
        )
        client = clients.new(command=[sys.executable, "-c", code])
        with pytest.raises(EngineStartError, match=r"a malformed report \(not MessagePack, 5 bytes\)"):
            client.start()
        client.close()
        assert not is_alive(pid_of(client))


class TestSignals:
    def test_the_engine_leaves_stopping_to_the_front(self, clients: Clients) -> None:
        client = clients.started()
        pid = pid_of(client)
        assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C reaches the front only"
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        assert answers(client)
        client.close()
        assert not is_alive(pid)
        assert client.num_restarts == 0


@pytest.mark.parametrize("is_busy", [False, True])
def test_when_the_front_is_killed_the_engine_goes_too(
    knobs: Knobs, is_busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not have anything to do, or be in the middle of something."""
    if is_busy:
        knobs.set(pace=10_000)
    folder = Path(tempfile.mkdtemp())
    monkeypatch.setenv("TMPDIR", str(folder))
    with Front(knobs) as front:
        pid = front.engine_pid
        time.sleep(0.3)
        assert is_alive(pid)
        front.process.kill()
    until(lambda: not is_alive(pid) or _is_zombie(pid), seconds=5)
    folder.rmdir()  # nothing stays in it


def _is_zombie(pid: int) -> bool:
    """Whether it has ended, and waits for somebody to notice: in a container there may be nobody."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"
