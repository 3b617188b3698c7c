"""The command `perft-serve`: its options, what it says when it cannot start, and how it stops."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest

from perft_serve import cli
from perft_serve.engine.config import EngineConfig
from perft_serve.server.config import ServerConfig

HAS_PROC = Path("/proc/self/task").exists()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """Nothing is served; what would have been is noted."""
    calls: list[tuple[EngineConfig, ServerConfig]] = []
    monkeypatch.setattr(cli, "serve", lambda engine, server, *_: calls.append((engine, server)))
    return calls


def test_every_setting_is_an_option(served: list[tuple[EngineConfig, ServerConfig]]) -> None:
    assert cli.main(["serve", "--model", "m"]) == 0
    assert served == [(EngineConfig(model="m"), ServerConfig())]
    options = cli.build_parser().parse_args(["serve", "--model", "m"])
    for config in (EngineConfig, ServerConfig):
        for each in fields(config):
            assert hasattr(options, each.name), each.name


def test_options_reach_the_settings(served: list[tuple[EngineConfig, ServerConfig]]) -> None:
    arguments = "serve --model m --adapter a=/x --adapter b=y=z --adapter-dir d --dtype float32 --max-num-seqs 3"
    arguments += (
        " --kv-memory 1.5G --adapter-memory 512MiB --max-model-len 99 --host 0.0.0.0 --port 1 --max-body-size 10"
    )
    arguments += (
        " --allow-adapter-source s3://a/ --allow-adapter-source org/ --engine-restarts 0 --engine-step-timeout 7"
    )
    arguments += " --host-adapter-memory 1M --prefix-caching off"
    assert cli.main(arguments.split()) == 0
    ((engine, server),) = served
    assert engine.adapters == {"a": "/x", "b": "y=z"}
    assert (engine.adapter_dir, engine.dtype, engine.max_num_seqs, engine.max_model_len) == ("d", "float32", 3, 99)
    assert (engine.kv_memory, engine.adapter_memory) == (3 << 29, 512 << 20)
    assert (engine.host_adapter_memory, engine.prefix_caching) == (1 << 20, "off")
    assert (server.host, server.port, server.max_body_size) == ("0.0.0.0", 1, 10)
    assert server.allow_adapter_sources == ("s3://a/", "org/")
    assert (server.engine_restarts, server.engine_step_timeout) == (0, 7)


@pytest.mark.parametrize(
    ("text", "size"), [("17", 17), ("2K", 2048), ("3m", 3 << 20), ("1TiB", 1 << 40), ("4GB", 4 << 30), ("5B", 5)]
)
def test_sizes(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


@pytest.mark.parametrize(
    "arguments",
    [
        "serve",
        "serve --model m --max-num-seq 3",
        "serve --model m --kv-memory lots",
        "serve --model m --kv-memory -1",
        "serve --model m --dtype float64",
        "serve --model m --adapter /x",
        "serve --model m --port http",
        "serve --model m --prefix-caching maybe",
        "serve --model m --frobnicate",
        "nonsense",
        "",
    ],
)
def test_bad_options(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--max-num-seqs 0", "max_num_seqs must be at least 1"),
        ("--port 99999", "port must be between"),
        ("--adapter a=/x --adapter a=/y", "names 'a' twice"),
        ("--host 203.0.113.7", "cannot listen on 203.0.113.7:0"),
        ("--max-model-len 100000", "max_model_len=100000"),
        ("--adapter a=/no/such/folder", "/no/such/folder"),
        ("--adapter-dir /no/such/folder", "/no/such/folder"),
        ("--adapter tiny-mixtral={adapter}", "both named 'tiny-mixtral'"),
        ("--adapter <base>={adapter}", "cannot be an adapter's name"),
    ],
)
def test_what_stops_a_start_is_said_in_one_line(
    arguments: str,
    words: str,
    tiny_base: Path,
    tiny_adapters: Mapping[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments.format(adapter=tiny_adapters["routed"]).split()
    common = ["serve", "--model", str(tiny_base), "--kv-memory", "4M", "--dtype", "float32", "--device", "cpu"]
    assert cli.main([*common, "--port", "0", *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("perft-serve: error:")]
    assert len(lines) == 1
    assert words in lines[0]


def test_a_base_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["serve", "--port", "0", "--model", "/no/such/model"]) == 2
    assert capsys.readouterr().err == "perft-serve: error: there is no model at /no/such/model\n"
    assert cli.main(["serve", "--port", "0", "--model", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"perft-serve: error: cannot load the base model '{tmp_path}'")


def test_a_port_in_use_is_noticed_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", "/no/such/model", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_a_server_that_loads_has_its_port_already(capsys: pytest.CaptureFixture[str]) -> None:
    with cli._listen("127.0.0.1", 0) as loading:
        port = loading.getsockname()[1]
        assert cli.main(["serve", "--model", "/no/such/model", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"perft-serve \d+\.\d+\S*\n", capsys.readouterr().out)


def test_the_demo_builds_its_base_and_serves_it(
    served: list[tuple[EngineConfig, ServerConfig]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(cli, "build_demo_base", lambda path, experts, top_k: built.append((path, experts, top_k)))
    arguments = ["demo", "--base-dir", str(tmp_path / "base"), "--adapter-dir", str(tmp_path), "--port", "0"]
    assert cli.main(arguments) == 0
    assert built == [(tmp_path / "base", 4, 2)]
    ((engine, server),) = served
    assert (engine.model, engine.adapter_dir) == (str(tmp_path / "base"), str(tmp_path))
    assert (server.served_model_name, server.port) == ("smolmixtral", 0)


def test_the_demo_without_its_adapters_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["demo", "--adapter-dir", str(tmp_path / "none")]) == 2
    assert "no demo adapters at" in capsys.readouterr().err


def test_the_lines_to_try_are_curl_commands(tmp_path: Path) -> None:
    """Each demo adapter is asked something from the data that was held out, by the route that fits it."""
    records: dict[str, dict[str, Any]] = {
        "chats": {"messages": [{"role": "user", "content": "it's?"}, {"role": "assistant", "content": "yes"}]},
        "plain": {"prompt": "one, two,", "completion": " three"},
    }
    (tmp_path / "data").mkdir()
    for name, record in records.items():
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}")
        (tmp_path / "data" / f"{name}.heldout.jsonl").write_text(json.dumps(record) + "\n")
    examples = cli._demo_examples(tmp_path / "adapters")
    lines = cli._announcement("0.0.0.0", 8000, "base", list(records), examples).splitlines()
    commands = [shlex.split(line) for line in lines[-2:]]
    assert [command[2] for command in commands] == [
        "http://127.0.0.1:8000/v1/chat/completions",
        "http://127.0.0.1:8000/v1/completions",
    ]
    chat, plain = (json.loads(command[-1]) for command in commands)
    assert (chat["model"], chat["messages"]) == ("chats", records["chats"]["messages"][:1])
    assert (plain["model"], plain["prompt"]) == ("plain", "one, two,")


class Process:
    """`perft-serve serve` on the tiny base, in a process of its own, which leads a group as it would in a terminal."""

    def __init__(self, base: Path) -> None:
        command = [sys.executable, "-m", "perft_serve.cli", "serve", "--model", str(base), "--port", "0"]
        command += ["--kv-memory", "4M", "--dtype", "float32", "--device", "cpu"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # where the tests run in the background of a shell they ignore it, and so would their children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for_url(self) -> str:
        """Where it answers."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"http://\S+", line)
        assert match, f"{line!r} {self.process.communicate()}"
        return match[0]

    def signal(self, number: signal.Signals) -> None:
        """Sends it to the group, as Ctrl-C does."""
        os.killpg(self.process.pid, number)

    def engines(self) -> list[int]:
        """The engine's process, once there is one that runs its own program."""
        files = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = [pid for file in files for pid in file.read_text().split()]
        return [int(pid) for pid in children if b"perft_serve.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def process(tiny_base: Path) -> Iterator[Process]:
    process = Process(tiny_base)
    yield process
    if process.process.poll() is None:
        # first the engine's process, which leads a group of its own: one that is stopped would hold the pipes open for ever
        for engine in process.engines() if HAS_PROC else ():
            os.kill(engine, signal.SIGKILL)
        process.signal(signal.SIGKILL)
        process.process.communicate(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_ends_with_status_0(process: Process, number: signal.Signals) -> None:
    body = {"model": "tiny-mixtral", "prompt": "hello", "max_tokens": 250, "stream": True, "ignore_eos": True}
    url = process.wait_for_url()
    (engine,) = process.engines() if HAS_PROC else [None]
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.signal(number)
        *_, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    _, errors = process.process.communicate(timeout=120)
    assert process.process.returncode == 0
    assert "Traceback" not in errors
    assert engine is None or not Path(f"/proc/{engine}").exists()


@pytest.mark.skipif(not HAS_PROC, reason="which children a process has, only Linux says in /proc")
def test_giving_up_while_it_starts(process: Process) -> None:
    while not process.engines():
        assert process.process.poll() is None
        time.sleep(0.05)
    (engine,) = process.engines()
    os.kill(engine, signal.SIGSTOP)  # it is not to be ready before the signal comes
    process.signal(signal.SIGINT)
    _, errors = process.process.communicate(timeout=120)
    assert process.process.returncode == 130
    assert "Traceback" not in errors
    assert not Path(f"/proc/{engine}").exists()
