"""Loading off the engine's thread: results and reasons as data, one core, and a load that hangs holds up nobody else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from staging import BLOCKS, make_adapter, make_arena, read
from tiny import random_adapter

from perft import PerftConfig
from perft import adapter as perft_adapter
from perft.errors import AdapterError
from perft_serve.adapters import loader as loader_module
from perft_serve.adapters.arena import StagedAdapter
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.loader import MAX_LOADS, Loaded, Loader


@pytest.fixture
def woken() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def loader(woken: threading.Semaphore) -> Iterator[Loader]:
    loader = Loader(BLOCKS, make_arena(100).stage, woken.release)
    yield loader
    loader.close()


def ref(source: str, version: int = 1) -> AdapterRef:
    return AdapterRef(name="a", source=source, version=version)


def staged(loaded: Loaded) -> StagedAdapter:
    assert loaded.staged is not None, loaded.error
    return loaded.staged


def test_loads_end_with_results(loader: Loader, woken: threading.Semaphore, tmp_path: Path) -> None:
    sources = [make_adapter(tmp_path / f"a{i}", seed=i) for i in range(MAX_LOADS)]
    for i, source in enumerate(sources):
        loader.start(i, ref(source))
    assert loader.num_loads == MAX_LOADS
    for _ in sources:
        assert woken.acquire(timeout=30)
    assert loader.has_results
    results = {loaded.number: loaded for loaded in loader.take_results()}
    assert loader.num_loads == 0
    assert loader.take_results() == []
    for i, source in enumerate(sources):
        assert staged(results[i]).digest == read(source).digest
        assert results[i].seconds > 0


def broken_adapters(folder: Path) -> dict[str, str]:
    """Adapters that are wrong in one way each: reason to folder."""
    made = {
        "is missing": "tensor",
        "NaN or infinity": "nan",
        "not a whole safetensors file": "cut",
        "never loaded": "pickle",
        "not readable as JSON": "json",
        "peft_type is 'IA3'": "method",
        "it has no adapter_config.json": "config",
        "is the adapter for another base": "base",
        "the file does not exist": "weights",
    }
    for name in made.values():
        source = Path(make_adapter(folder / name))
        file, config = source / "adapter_model.safetensors", source / "adapter_config.json"
        tensors = load_file(file)
        if name == "tensor":
            del tensors[next(iter(tensors))]
        elif name == "nan":
            next(iter(tensors.values()))[0, 0, 0] = float("nan")
        if name in ("tensor", "nan"):
            save_file(tensors, file)
        elif name == "cut":
            file.write_bytes(file.read_bytes()[:-7])
        elif name == "pickle":
            file.rename(file.with_name("adapter_model.bin"))
        elif name == "json":
            config.write_text("{")
        elif name == "method":
            config.write_text(config.read_text().replace("PERFT", "IA3"))
        elif name == "config":
            config.unlink()
        elif name == "weights":
            file.unlink()
        elif name == "base":
            shutil.rmtree(source)
            wide = [replace(block, hidden_size=64) for block in BLOCKS]
            random_adapter(source, PerftConfig(variant="S", r=2), wide)
    return {reason: str(folder / name) for reason, name in made.items()}


def test_reasons_are_data_and_name_no_path(loader: Loader, woken: threading.Semaphore, tmp_path: Path) -> None:
    broken = {**broken_adapters(tmp_path), "does not exist": str(tmp_path / "nowhere")}
    for reason, source in broken.items():
        loader.start(0, ref(source))
        assert woken.acquire(timeout=30)
        (loaded,) = loader.take_results()
        assert loaded.staged is None
        assert reason in (loaded.error or "")
        assert str(tmp_path) not in (loaded.error or ""), "clients read this"


def test_reasons_can_be_encoded(
    loader: Loader, woken: threading.Semaphore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's name need not be text, and what cannot be encoded would end the engine's process."""
    source = Path(make_adapter(tmp_path / "a"))
    (source / "adapter_model.safetensors").unlink()
    Path(os.fsdecode(os.fsencode(source) + b"/w\xff.bin")).touch()
    loader.start(0, ref(str(source)))
    assert woken.acquire(timeout=30)
    assert r"w\udcff.bin: pickled weights" in (loader.take_results()[0].error or "").encode().decode()

    def fetched(source: str, max_bytes: int | None) -> None:
        raise AdapterError(f"no \udcff in {source}")

    monkeypatch.setattr(loader_module, "fetched", fetched)
    loader.start(0, ref("s3://bucket/a"))
    assert woken.acquire(timeout=30)
    assert loader.take_results()[0].error == r"no \udcff in s3://bucket/a"


def test_an_exception_of_somebody_elses_library_is_a_reason_too(
    loader: Loader, woken: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(source: str, max_bytes: int | None) -> None:
        raise RuntimeError(f"token 12345 refused for {source}")

    monkeypatch.setattr(loader_module, "fetched", fetched)
    loader.start(0, ref("s3://bucket/a"))
    assert woken.acquire(timeout=30)
    (loaded,) = loader.take_results()
    assert loaded.error == "it cannot be read from its source (RuntimeError)"


def test_loads_that_hang_hold_up_nobody_else(
    loader: Loader, woken: threading.Semaphore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_adapter(tmp_path / "a")
    network = threading.Event()

    @contextmanager
    def fetched(where: str, max_bytes: int | None) -> Iterator[Path]:
        if where == "hangs":
            assert network.wait(30)
        yield Path(source)

    monkeypatch.setattr(loader_module, "fetched", fetched)
    for i in range(MAX_LOADS - 1):
        loader.start(i, ref("hangs"))
    loader.start(99, ref(source))
    assert woken.acquire(timeout=30)
    assert [loaded.number for loaded in loader.take_results()] == [99]
    network.set()
    for _ in range(MAX_LOADS - 1):
        assert woken.acquire(timeout=30)
    assert len(loader.take_results()) == MAX_LOADS - 1


def test_loads_that_hang_are_given_up(
    loader: Loader, woken: threading.Semaphore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that hang, remote or not: others can be loaded in their place, and what they bring later finds no taker."""
    source = make_adapter(tmp_path / "a")
    network = threading.Event()

    @contextmanager
    def fetched(where: str, max_bytes: int | None) -> Iterator[Path]:
        if where != source:
            assert network.wait(30)
        yield Path(source)

    monkeypatch.setattr(loader_module, "fetched", fetched)
    monkeypatch.setattr(loader_module, "LOAD_DEADLINE_SECONDS", 0.2)
    for i in range(MAX_LOADS):
        loader.start(i, ref("s3://bucket/hangs"))
    assert not loader.has_slot(remote=True)
    assert loader.has_slot(remote=False)
    loader.start(99, ref(source))
    seen: dict[int, Loaded] = {}
    while len(seen) < MAX_LOADS + 1:
        assert woken.acquire(timeout=30), "an engine that waits for nothing else must be woken"
        seen |= {loaded.number: loaded for loaded in loader.take_results()}
    assert staged(seen.pop(99)).digest == read(source).digest
    assert {loaded.error for loaded in seen.values()} == {"reading it from its source was given up after 0 seconds"}
    assert loader.num_loads == 0
    assert loader.has_slot(remote=True)
    network.set()
    for thread in loader._given_up.values():
        thread.join(30)
    assert loader.has_results
    assert loader.take_results() == []
    assert not loader._given_up


def test_a_thread_that_cannot_be_started(
    loader: Loader, woken: threading.Semaphore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    source = make_adapter(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        loader.start(0, ref(source))
    assert woken.acquire(timeout=1)
    loader.close()
    assert [loaded.error for loaded in loader.take_results()] == [
        "the server has no thread left to read it with; try again later"
    ]
    loader.start(1, ref(source))
    assert woken.acquire(timeout=30)
    assert staged(loader.take_results()[0]).digest == read(source).digest


def test_a_disk_that_hangs_holds_up_nobody_for_long(
    loader: Loader, woken: threading.Semaphore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_adapter(tmp_path / "a")
    monkeypatch.setattr(loader_module, "_READING_PATIENCE_SECONDS", 0.01)
    while loader._reading.acquire(blocking=False):  # all that may read at once do, and hang
        pass
    loader.start(0, ref(source))
    assert woken.acquire(timeout=30)
    assert staged(loader.take_results()[0]).digest == read(source).digest


def test_loading_threads_use_one_core_and_change_nothing_for_others(
    woken: threading.Semaphore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    arena = make_arena(100)

    def stage(adapter: object) -> StagedAdapter:
        seen.append(torch.get_num_threads())
        return arena.stage(adapter)  # type: ignore[arg-type]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loader = Loader(BLOCKS, stage, woken.release)
        loader.start(0, ref(make_adapter(tmp_path / "a")))
        assert woken.acquire(timeout=30)
        newcomer = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        newcomer.start()
        newcomer.join()
        assert seen == [1, 2]
        assert torch.get_num_threads() == 2
        loader.close()
    finally:
        torch.set_num_threads(before)


def test_an_interpreter_that_ends_while_an_adapter_is_loaded(tmp_path: Path) -> None:
    """A daemon thread inside torch would abort the process."""
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from staging import BLOCKS, make_arena
from perft_serve.adapters.loader import Loader
from perft_serve.adapters.catalog import AdapterRef
loader = Loader(BLOCKS, make_arena(100).stage, lambda: None)
for i in range(4):
    loader.start(i, AdapterRef(name="a", source={make_adapter(tmp_path / "a")!r}))
loader.read_ahead(AdapterRef(name="b", source={make_adapter(tmp_path / "a")!r}))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


class Reads:
    """Counts what is read, and holds it up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sources: list[str] = []
        self.may_end = threading.Event()
        self.may_end.set()

        def read_adapter(path: Path, blocks: object, attention: object) -> object:
            self.sources.append(str(path))
            assert self.may_end.wait(30)
            return perft_adapter.read_adapter(path, blocks)  # type: ignore[arg-type]

        monkeypatch.setattr(loader_module, "read_served_adapter", read_adapter)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.mark.parametrize("is_done", [True, False])
def test_what_was_read_ahead_is_the_load(
    is_done: bool, loader: Loader, woken: threading.Semaphore, reads: Reads, tmp_path: Path
) -> None:
    source = make_adapter(tmp_path / "a")
    if not is_done:
        reads.may_end.clear()
    loader.read_ahead(ref(source))
    assert loader._ahead is not None
    if is_done:
        loader._ahead.thread.join(30)
    assert not loader.has_results
    assert loader.num_loads == 0
    assert not woken.acquire(blocking=False)
    loader.start(7, ref(source))
    assert loader.num_loads == 1
    reads.may_end.set()
    assert woken.acquire(timeout=30)
    (loaded,) = loader.take_results()
    assert loaded.number == 7
    assert staged(loaded).digest == read(source).digest
    assert reads.sources == [source]
    assert loader.num_loads == 0


def test_what_was_read_ahead_is_for_its_own_version_only(
    loader: Loader, woken: threading.Semaphore, reads: Reads, tmp_path: Path
) -> None:
    """The files of the next version may be others by then."""
    source = make_adapter(tmp_path / "a", seed=0)
    loader.read_ahead(ref(source))
    assert loader._ahead is not None
    loader._ahead.thread.join(30)
    make_adapter(tmp_path / "a", seed=1)
    loader.start(0, ref(source, version=2))
    assert woken.acquire(timeout=30)
    (loaded,) = loader.take_results()
    assert staged(loaded).digest == read(source).digest
    assert reads.sources == [source, source]


def test_what_nobody_claims_in_time_is_dropped(
    loader: Loader, woken: threading.Semaphore, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_adapter(tmp_path / "a")
    loader.read_ahead(ref(source))
    assert loader._ahead is not None
    loader._ahead.thread.join(30)
    monkeypatch.setattr(loader_module, "AHEAD_SECONDS", 0.0)
    loader.start(0, ref(source))
    assert woken.acquire(timeout=30)
    assert reads.sources == [source, source]
    assert len(loader.take_results()) == 1
    assert loader._ahead is None


def test_nobody_is_overtaken_by_what_is_read_ahead(
    loader: Loader, woken: threading.Semaphore, reads: Reads, tmp_path: Path
) -> None:
    first, other = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b")
    reads.may_end.clear()
    loader.start(0, ref(first))
    loader.read_ahead(ref(other))
    assert loader._ahead is None
    reads.may_end.set()
    assert woken.acquire(timeout=30)
    loader.take_results()
    reads.may_end.clear()
    loader.read_ahead(ref(first))
    loader.read_ahead(ref(other))  # one at a time
    loader.read_ahead(ref("s3://bucket/a"))  # and no network
    reads.may_end.set()
    assert loader._ahead is not None
    assert loader._ahead.ref == ref(first)
    loader._ahead.thread.join(30)
    assert reads.sources == [first, first]


def test_a_failure_that_was_read_ahead(loader: Loader, woken: threading.Semaphore, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    loader.read_ahead(ref(missing))
    loader.start(3, ref(missing))
    assert woken.acquire(timeout=30)
    (loaded,) = loader.take_results()
    assert (loaded.number, loaded.staged) == (3, None)
    assert "does not exist" in str(loaded.error)
