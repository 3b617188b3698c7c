"""One round trip with each client library that is not in our own tests: do they get what a plain request gets?

In: the demo base and a demo adapter. Out: one JSON line, client to whether its text, whole and streamed, and its number of
tokens are those of a plain HTTP request. (The `openai` client for Python is in `tests/server`, method by method.)
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from conformance.environments import ENVIRONMENTS
from harness import RESULTS, running_server, surroundings, write_result
from models import DEMO_BASE

from perft.demo_base import build_demo_base

ADAPTER = "sql"
QUESTION = "Which products have price more than 50?"
NUM_TOKENS = 24


def run(*, adapter: Path) -> None:
    """Asks with each client.

    Raises:
        SystemExit: one was answered otherwise.
    """
    python, node = ENVIRONMENTS["clients"], ENVIRONMENTS["node"]
    python.require()
    node.require()
    build_demo_base(DEMO_BASE)
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(prefix="conformance") as temporary:
        log = Path(temporary) / "log"
        with running_server(str(DEMO_BASE), log, adapters={ADAPTER: adapter}) as server:
            expected = _plain(server.url)
            asked = [server.url, ADAPTER, QUESTION, str(NUM_TOKENS)]
            answers = {
                **_ask([str(python.bin / "python"), str(here / "client_python.py"), *asked], here),
                **_ask(["node", str(here / "client_node.mjs"), *asked], node.folder),
            }
    agrees = {
        name: all(answer[key] == expected["text"] for key in ("text", "streamed"))
        and answer.get("tokens", expected["tokens"]) == expected["tokens"]
        for name, answer in answers.items()
    }
    result = {
        "bench": "clients",
        **surroundings(os.getloadavg()[0]),
        "tools": {**python.versions(), **node.versions()},
        "settings": {"adapter": ADAPTER, "question": QUESTION, "max_tokens": NUM_TOKENS},
        "expected": expected,
        "agrees": agrees,
    }
    write_result(RESULTS / "conformance.jsonl", result)
    if not all(agrees.values()):
        raise SystemExit(f"conformance: not what was expected: {answers}")


def _plain(url: str) -> dict[str, Any]:
    body = {
        "model": ADAPTER,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
    }
    request = Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urlopen(request, timeout=60) as answer:
        reply = json.load(answer)
    return {"text": reply["choices"][0]["message"]["content"], "tokens": reply["usage"]["completion_tokens"]}


def _ask(command: list[str], folder: Path) -> dict[str, Any]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"conformance: a client has failed:\n{done.stderr[-4000:]}")
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers
