"""The command `perft-serve`: a server for a base and its adapters, and the demo.

In: arguments, made from the fields of `EngineConfig` and `ServerConfig`. Out: a running server, and an exit status: 0 after a
signal to stop, 2 with one line that says what is wrong when it cannot start.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import uvicorn
from prometheus_client import CollectorRegistry
from rich.console import Console

from perft.demo_base import build_demo_base
from perft_serve.adapters.catalog import AdapterCatalog
from perft_serve.adapters.sources import SourcePolicy
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.logs import LogFormat, log_to_stderr
from perft_serve.server.app import build_app
from perft_serve.server.client import EngineClient
from perft_serve.server.config import ServerConfig
from perft_serve.server.connection import uvicorn_config
from perft_serve.server.metrics import UNKNOWN, Metrics
from perft_serve.server.tracing import start_tracing
from perft_serve.text import load_tokenizer

DEMO_ADAPTERS = Path(__file__).parents[1] / "demo" / "adapters"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns the exit status."""
    args = build_parser().parse_args(argv)
    log_to_stderr()
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        # Some libraries explain themselves over many lines
        print(f"perft-serve: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="perft-serve", description="PERFT adapters behind the OpenAI API.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"perft-serve {version('perft-serve')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    help_text = "serve a base model and its adapters"
    serve = commands.add_parser("serve", help=help_text, description=help_text, allow_abbrev=False)
    _add_options(serve, EngineConfig)
    _add_options(serve, ServerConfig)
    serve.set_defaults(run=_serve)

    help_text = "build the demo base if need be, and serve it with the demo adapters"
    demo = commands.add_parser("demo", help=help_text, description=help_text, allow_abbrev=False)
    demo.add_argument(
        "--base-dir", type=Path, default=_cache_dir() / "smolmixtral", help="where the demo base is, or will be built"
    )
    _add_options(demo, EngineConfig, leave_out={"model", "adapters"}, defaults={"adapter_dir": str(DEMO_ADAPTERS)})
    _add_options(demo, ServerConfig, leave_out={"served_model_name"})
    demo.set_defaults(run=_demo)
    return parser


def parse_size(text: str) -> int:
    """Bytes of "1024", "512M", "4G", "1.5GiB": powers of 1024.

    Raises:
        argparse.ArgumentTypeError: it is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write bytes, or 512K, 512M, 4G, 1T")
    return int(float(match[1]) * 1024 ** _POWERS[(match[2] or "").upper()])


def parse_adapter(text: str) -> tuple[str, str]:
    """Name and source of "name=source".

    Raises:
        argparse.ArgumentTypeError: it is not of that form.
    """
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=SOURCE")
    return name, source


def _add_options(
    parser: argparse.ArgumentParser,
    config: type,
    *,
    leave_out: frozenset[str] | set[str] = frozenset(),
    defaults: dict[str, Any] | None = None,
) -> None:
    """An option for each field of a config dataclass."""
    hints = get_type_hints(config)
    group = parser.add_argument_group(config.__name__.removesuffix("Config").lower())
    for each in fields(config):
        if each.name in leave_out:
            continue
        help_text = each.metadata["help"]
        if each.name == "adapters":
            group.add_argument(
                "--adapter",
                dest="adapters",
                type=parse_adapter,
                action="append",
                default=[],
                metavar="NAME=SOURCE",
                help="An adapter to load at the start, from a folder, a Hub id or a URL; may be given several times.",
            )
            continue
        if hints[each.name] == tuple[str, ...]:
            group.add_argument(
                f"--{each.metadata['option']}",
                dest=each.name,
                action="append",
                default=_listed(os.environ.get(each.metadata.get("environ", ""), "")),
                metavar=each.metadata["metavar"],
                help=help_text,
            )
            continue
        default = (defaults or {}).get(each.name, each.default)
        if default is not MISSING and default is not None:
            help_text += f" Default: {default}."
        group.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=_option_type(each, hints[each.name]),
            choices=each.metadata.get("choices"),
            required=default is MISSING,
            default=None if default is MISSING else default,
            metavar=None if "choices" in each.metadata else each.name.rpartition("_")[2].upper(),
            help=help_text.replace("%", "%%"),
        )


def _listed(text: str) -> list[str]:
    """The parts of "a, b"; an option's values are added to those of an environment variable."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _option_type(each: Field[Any], hint: Any) -> Any:
    if each.metadata.get("unit") == "bytes":
        return parse_size
    if hint in (int, int | None):
        return int
    assert hint in (str, str | None, LogFormat), f"no option can be made of field {each.name}: {hint}"
    return str


def _config_of(config: type[Any], args: argparse.Namespace, **given: Any) -> Any:
    """The config dataclass that the options describe."""
    values = {each.name: getattr(args, each.name) for each in fields(config) if hasattr(args, each.name)}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return config(**{**values, **lists, **given})


def _serve(args: argparse.Namespace) -> None:
    adapters: dict[str, str] = {}
    for name, source in args.adapters:
        if name in adapters:
            raise ValueError(f"--adapter names {name!r} twice")
        adapters[name] = source
    serve(_config_of(EngineConfig, args, adapters=adapters), _config_of(ServerConfig, args))


def _demo(args: argparse.Namespace) -> None:
    if not Path(args.adapter_dir).is_dir():
        raise ValueError(
            f"no demo adapters at {args.adapter_dir}: run this in a checkout of the project, or give --adapter-dir"
        )
    console = Console(stderr=True)
    with console.status(f"Building the demo base in {args.base_dir}, or checking it (under a minute)"):
        build_demo_base(args.base_dir, experts=4, top_k=2)
    engine_config = _config_of(EngineConfig, args, model=str(args.base_dir), adapters={})
    server_config = _config_of(ServerConfig, args, served_model_name="smolmixtral")
    serve(engine_config, server_config, _demo_examples(Path(args.adapter_dir)))


def serve(engine_config: EngineConfig, config: ServerConfig, examples: Sequence[Example] = ()) -> None:
    """Serves until SIGINT or SIGTERM; then requests in flight may finish, up to `config.shutdown_timeout`.

    Args:
        examples: requests to print as command lines once the server is up.

    Raises:
        ValueError: a setting, the base or an adapter cannot be used.
        OSError: the address cannot be listened on, or the base cannot be read.
    """
    log_to_stderr(config.log_format)
    # Before the model is loaded, which may take minutes
    listener = _listen(config.host, config.port)
    with listener:
        tokenizer = load_tokenizer(engine_config.model)
        tracing = None
        if config.otlp_traces_endpoint is not None:
            tracing = start_tracing(
                config.otlp_traces_endpoint,
                version=version("perft-serve"),
                tokenizer=tokenizer,
                with_prompts=config.trace_prompts == "on",
            )
        metrics = Metrics(
            CollectorRegistry(),
            max_adapter_labels=config.max_adapter_labels,
            adapter_labels=config.adapter_labels,
            lora_info=config.lora_info_metric,
            version=version("perft-serve"),
        )
        client = EngineClient(engine_config, config, metrics)
        metrics.watch_processes(lambda: client.engine_pid)
        base_name = config.served_model_name or _base_name(engine_config.model)
        try:
            client.start()
            app = build_app(
                client,
                tokenizer,
                metrics,
                config,
                base_name=base_name,
                sources=SourcePolicy(allowed=config.allow_adapter_sources, adapter_dir=engine_config.adapter_dir),
                version=version("perft-serve"),
                tracing=tracing,
            )
            port = listener.getsockname()[1]
            names = [ref.name for ref in client.catalog.page()]
            server = _Server(
                uvicorn_config(app, config, lambda status: metrics.count_http(UNKNOWN, UNKNOWN, status)),
                announcement=_announcement(config.host, port, base_name, names, examples),
            )
            _run(server, listener)
        finally:
            client.close()
            if tracing is not None:
                tracing.close()


class _Server(uvicorn.Server):
    """Prints a few lines once it answers."""

    def __init__(self, config: uvicorn.Config, *, announcement: str) -> None:
        super().__init__(config)
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._announcement, flush=True)


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Runs until a signal; uvicorn raises it again when done, which is a normal end here."""
    # uvicorn's own handlers stand while it runs; ours catch what comes before, and what it raises again afterwards

    def stop(*_: object) -> None:
        server.should_exit = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that has the address, so that nobody else takes it while the model loads; until then, clients wait."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # a bound address alone is not taken yet: two could be bound to it
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def _base_name(model: str) -> str:
    """The base's name in requests: its Hub id, or its folder's name (clients learn no paths)."""
    return Path(model).resolve().name if Path(model).is_dir() else model


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A request to try: the route and what goes into its body beside the common settings."""

    path: str
    body: Mapping[str, Any]

    def curl(self, url: str) -> str:
        """A command line for it."""
        body = {**self.body, "max_tokens": 40, "temperature": 0}
        return f"curl -s {url}{self.path} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"


def _demo_examples(adapter_dir: Path) -> list[Example]:
    """One request for each demo adapter that has held-out data beside it (`demo/data`): a question it has never seen."""
    examples = []
    for ref in AdapterCatalog(adapter_dir=str(adapter_dir)).page():
        name = ref.name
        file = adapter_dir.parent / "data" / f"{name}.heldout.jsonl"
        if file.is_file():
            record = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
            if "messages" in record:
                asked = {"model": name, "messages": record["messages"][:-1]}
                examples.append(Example(path="/v1/chat/completions", body=asked))
            else:
                examples.append(Example(path="/v1/completions", body={"model": name, "prompt": record["prompt"]}))
    return examples


def _announcement(
    host: str, port: int, base_name: str, adapters: Sequence[str], examples: Sequence[Example] = ()
) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{reachable}:{port}"
    lines = [f"Serving {base_name} and {len(adapters)} adapters on {url}"]
    if examples:
        lines.append(f"Models: {', '.join([base_name, *adapters])}. Try (and then with another model's name):")
        lines += [example.curl(url) for example in examples]
    return "\n".join(lines)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perft-serve"


if __name__ == "__main__":
    sys.exit(main())
