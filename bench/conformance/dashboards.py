"""Whether the metrics, the alerts and the dashboard in `deploy/` hold against a real server under load and a real Prometheus.

The server has API keys, so the scrape is an authorised one, as `prometheus.yml` says how.

In: the demo base and its adapters, Prometheus and promtool (of the path, or of Debian's package, unpacked without root). Out: a
table of the dashboard's queries with how many series each gave; exit status 1 if promtool objects to anything, or if a query
gave no number.

    python bench/conformance/dashboards.py --model .cache/smolmixtral
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

sys.path.append(str(Path(__file__).resolve().parents[1]))

from harness import CACHE, ROOT, Process, end_cleanly, free_port

DEPLOY = ROOT / "deploy"
ADAPTERS = ROOT / "demo" / "adapters"
SCRAPE_SECONDS = 2
# What Grafana puts into queries.
VARIABLES = {"$__rate_interval": "20s", "$instance": ".*"}
# Small enough that adapters and pages push one another out.
SMALL = ("--adapter-memory", "3M", "--kv-memory", "8M", "--max-num-seqs", "8", "--max-model-len", "256")
KEY = "the-operators-key"
AUTHORISED = {"authorization": f"Bearer {KEY}"}
QUESTION = "A long question about the harbour, the lighthouse and the old library, asked again and again. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CACHE / "smolmixtral", help="folder of the demo base")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long to keep the server under load")
    args = parser.parse_args()
    end_cleanly()
    tools = find_prometheus()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not check(tools, args.model, args.seconds, Path(folder)))


def check(tools: Path, model: Path, seconds: float, folder: Path) -> bool:
    """Runs everything; whether all of it held."""
    promtool = str(tools / "promtool")
    good = True
    for command in (
        ("check", "config", str(DEPLOY / "prometheus.yml")),
        ("check", "rules", str(DEPLOY / "alerts.yml")),
        ("test", "rules", str(DEPLOY / "alerts_test.yml")),
    ):
        good &= run_tool([promtool, *command])
    address = f"127.0.0.1:{free_port()}"
    host, _, port = address.rpartition(":")
    serve = [sys.executable, "-m", "perft_serve.cli", "serve", "--model", str(model), "--host", host, "--port", port]
    server = Process(
        [*serve, "--adapter-dir", str(ADAPTERS), "--served-model-name", "base", *SMALL],
        {"PERFT_API_KEYS": KEY},
        folder / "server.log",
    )
    try:
        server.wait_until_healthy(f"http://{address}/ready")
        prometheus, url = start_prometheus(tools, address, folder)
        try:
            prometheus.wait_until_healthy(f"{url}/-/ready")
            load(f"http://{address}", seconds)
            time.sleep(2 * SCRAPE_SECONDS)
            with urlopen(Request(f"http://{address}/metrics", headers=AUTHORISED), timeout=30) as answer:
                scrape = answer.read()
            good &= run_tool([promtool, "check", "metrics"], scrape)
            print(f"a scrape: {len(scrape):,} bytes, {scrape.count(10):,} lines")
            good &= check_queries(url)
        finally:
            prometheus.close()
    finally:
        server.close()
    return good


def find_prometheus() -> Path:
    """The folder with `prometheus` and `promtool`.

    Raises:
        SystemExit: they are not there, and cannot be had.
    """
    found = shutil.which("prometheus"), shutil.which("promtool")
    if all(found):
        return Path(str(found[0])).parent
    folder = CACHE / "prometheus"
    if not (folder / "usr" / "bin" / "promtool").exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, check=True)
            (package,) = folder.glob("prometheus_*.deb")
            subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"install Prometheus: it is not on the path, and Debian's cannot be had: {error}"
            ) from error
    return folder / "usr" / "bin"


def run_tool(command: list[str], text: bytes | None = None) -> bool:
    """Whether promtool is content; it exits with 0 when it only complains of metrics' names, so silence is asked for there."""
    result = subprocess.run(command, input=text, capture_output=True, check=False)
    output = (result.stdout + result.stderr).decode().strip()
    good = result.returncode == 0 and not (text is not None and output)
    print(f"{'ok' if good else 'BAD'}: promtool {' '.join(command[1:])}")
    if not good:
        print(output)
    return good


def start_prometheus(tools: Path, target: str, folder: Path) -> tuple[Process, str]:
    """The configuration in `deploy/`, for another target and more often."""
    config = (DEPLOY / "prometheus.yml").read_text(encoding="utf-8")
    (folder / "key").write_text(KEY)
    for old, new in (
        ("localhost:8000", target),
        ("interval: 15s", f"interval: {SCRAPE_SECONDS}s"),
        ("    # authorization:\n    #   credentials_file: ", "    authorization:\n      credentials_file: "),
        ("/etc/prometheus/perft-key", str(folder / "key")),
    ):
        assert old in config, old
        config = config.replace(old, new)
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    shutil.copy(DEPLOY / "alerts.yml", folder)
    address = f"127.0.0.1:{free_port()}"
    command = [
        str(tools / "prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    return Process(command, {}, folder / "prometheus.log"), f"http://{address}"


def load(url: str, seconds: float) -> None:
    """Requests of all kinds until the time is over: on each adapter and the base, short, long, repeated, streamed, wrong."""
    end = time.monotonic() + seconds
    models = ["base", *sorted(path.name for path in ADAPTERS.iterdir())]

    def work(number: int) -> None:
        turn = 0
        while time.monotonic() < end:
            turn += 1
            model = models[(turn + number) % len(models)]
            length = 1 + turn % 4
            post(
                url, model=model, prompt=f"{turn % 5}: {QUESTION * length}", max_tokens=8 * length, stream=turn % 2 == 0
            )
            if turn % 8 == 0:
                post(url, model="nobody", prompt="a")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def post(url: str, **body: Any) -> None:
    headers = {"content-type": "application/json", **AUTHORISED}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=120) as answer:
            answer.read()
    except HTTPError as error:
        if error.code not in (404, 503):
            raise SystemExit(f"the server refused a request: {error.read().decode()}") from error


def queries() -> Iterator[tuple[str, str]]:
    """Each panel's title and each of its queries."""
    for panel in json.loads((DEPLOY / "grafana" / "perft.json").read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def check_queries(url: str) -> bool:
    """Asks Prometheus every query of the dashboard; whether each gave numbers."""
    good = True
    for title, expression in queries():
        asked = expression
        for name, value in VARIABLES.items():
            asked = asked.replace(name, value)
        try:
            with urlopen(f"{url}/api/v1/query?{urlencode({'query': asked})}", timeout=30) as answer:
                result = json.load(answer)["data"]["result"]
        except HTTPError as error:
            result = []
            print(error.read().decode())
        numbers = [float(series["value"][1]) for series in result]
        has_number = any(math.isfinite(number) for number in numbers)
        good &= has_number
        shown = ", ".join(f"{number:.4g}" for number in numbers[:4])
        print(
            f"{'ok' if has_number else 'BAD'}: {title}: {len(result)} series: {shown}"
            + ("" if has_number else f"\n  {asked}")
        )
    return good


if __name__ == "__main__":
    main()
