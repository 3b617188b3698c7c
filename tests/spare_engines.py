"""Engines' processes that need not import torch and Transformers: they are forked off one that has, which takes 0.1 s, not 10.

`engine_command()` gives a command line like `knobs.engine_command("paced_engine", ...)`. What it starts (this file) asks the
nursery (`nursery`, this file too, once a test session) for a fork with its own arguments, environment and standard streams, and
ends as that ends. When it is killed, so is the fork. Stopping it stops nothing: for that, an engine needs a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knobs import Knobs


def engine_command(knobs: Knobs) -> list[str]:
    """The command line of a process with the paced engine."""
    if sys.platform != "linux":  # elsewhere a fork of what has imported torch may not live
        import knobs as own_process

        return own_process.engine_command("paced_engine", knobs)
    address, _ = nursery()
    return [sys.executable, "-S", "-s", __file__, address, str(knobs.path)]


@functools.cache
def nursery() -> tuple[str, subprocess.Popen[bytes]]:
    """Starts it; where its socket is, and its process, which ends when its standard input is closed: with this one."""
    address = Path(tempfile.mkdtemp(prefix="nursery")) / "socket"
    code = f"import sys; sys.path.append({os.fspath(Path(__file__).parent)!r}); import spare_engines; "
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code} spare_engines.run_nursery({os.fspath(address)!r})"], stdin=subprocess.PIPE
    )
    return str(address), process


def run_nursery(address: str) -> None:
    """Forks an engine's process for each connection, and answers with how it has ended."""
    import paced_engine  # noqa: F401
    from transformers import MixtralForCausalLM  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    connections: dict[int, socket.socket] = {}  # by the fork's process
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], 0.02 if connections else None)
        if sys.stdin in ready:
            shutil.rmtree(Path(address).parent)
            return
        if listener in ready:
            connection, _ = listener.accept()
            message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            pid = os.fork()
            if not pid:
                listener.close()
                for other in connections.values():
                    other.close()
                _be_engine(connection, json.loads(message), streams)
            for stream in streams:
                os.close(stream)
            connections[pid] = connection
        for pid in list(connections):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                connection = connections.pop(pid)
                with suppress(BrokenPipeError):  # it was killed with the one that asked for it
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()


def _be_engine(connection: socket.socket, asked: dict[str, Any], streams: list[int]) -> None:
    """In the fork; does not return."""
    import paced_engine

    status = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(asked["environ"])
        sys.argv = [*asked["arguments"]]
        threading.Thread(target=_die_with, args=(connection,), daemon=True).start()
        status = paced_engine.main()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _die_with(connection: socket.socket) -> None:
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _ask(address: str, arguments: list[str]) -> int:
    """Has the nursery fork an engine, and waits for its end; the exit status, or minus the signal."""
    connection = socket.socket(socket.AF_UNIX)
    end = time.monotonic() + 120
    while True:
        try:
            connection.connect(address)
            break
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
    message = json.dumps({"environ": dict(os.environ), "arguments": arguments}).encode()
    socket.send_fds(connection, [message], [0, 1, 2])
    for stream in (0, 1, 2):
        os.close(stream)
    return int(connection.recv(16) or b"1")


if __name__ == "__main__":
    exit_status = _ask(sys.argv[1], sys.argv[1:])
    if exit_status < 0:
        os.kill(os.getpid(), -exit_status)
    os._exit(exit_status)
