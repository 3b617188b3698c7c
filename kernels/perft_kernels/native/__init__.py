"""The CPU kernels: the C files beside this one, compiled on first use for the processor at hand.

In: a C compiler (`$CC`, or cc). Out: `library()`, whose functions take tensors, sizes and numbers in the order of their C
declarations. What was compiled is kept in a cache folder (`$PERFT_CACHE`, or `perft` in the user's cache) under a hash of
sources, compiler and processor, so it takes some seconds once. Without a compiler, or with `PERFT_NATIVE=0`, `library()` is
`None`, and the ops run their references in plain torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# No -ffast-math: NaN has to stay NaN, and sums keep their order.
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
# The arguments of each kernel, 64 bits each: p an address, l an int64, f a float.
_SIGNATURES = {
    "perft_linear": "ppppllll",
    "perft_linear_argmax": "pppppplll",
    "perft_moe_experts": "pppppplllll",
    "perft_base_router": "ppppp" + "lllll",
    "perft_rms_norm": "ppp" + "llf",
    "perft_adapter_router": "plppppl" + "pppp" + "lllll",
    "perft_routed_units": "pplppppl" + "ppppp" + "p" + "lllllll",
    "perft_kv_write": "pllpllppp" + "llll",
    "perft_paged_attention": "pllppl" + "ppppp" + "lllllll" + "fl",
    "perft_argmax": "ppll",
    "perft_elementwise": "l" + "plplpl" + "llll" * 4,
    "perft_gather": "pppll",
    "perft_run": "pl",
}
_WORDS = {"p": "Q", "l": "q", "f": "f4x"}
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1}

Argument: TypeAlias = "Tensor | float | None"
Observer: TypeAlias = "Callable[[str, tuple[Argument, ...]], None]"


class Library:
    """The compiled kernels.

    Args:
        file: the shared library.

    Attributes:
        addresses: where each kernel's code lies, by its name.
    """

    def __init__(self, file: Path) -> None:
        handle = ctypes.CDLL(str(file))
        self._functions = {}
        self._words = {}
        self.addresses = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(handle, name)
            function.argtypes = [ctypes.c_char_p]
            self._functions[name] = function
            self._words[name] = struct.Struct("=" + "".join(_WORDS[letter] for letter in signature))
            address = ctypes.cast(function, ctypes.c_void_p).value
            assert address is not None
            self.addresses[name] = address
        self._observers = threading.local()

    def __call__(self, name: str, *arguments: Argument) -> None:
        """Run a kernel; a tensor's address is passed for it, and whoever calls keeps it alive and contiguous.

        Raises:
            MemoryError: there is no room for its intermediate results.
        """
        observer = getattr(self._observers, "present", None)
        if observer is not None:
            observer(name, arguments)
        if self._functions[name](self.pack(name, arguments)):
            raise MemoryError(f"{name} has found no memory for its intermediate results")

    def pack(self, name: str, arguments: Sequence[Argument]) -> bytes:
        """The arguments as the kernel takes them, 8 bytes each."""
        return self._words[name].pack(
            *[a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
        )

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Tells `observer` of each of this thread's calls before it runs."""
        self._observers.present = observer
        try:
            yield
        finally:
            del self._observers.present


@functools.cache
def library() -> Library | None:
    """The kernels, compiled if need be; `None` where they cannot be had. Says so once."""
    if os.environ.get("PERFT_NATIVE", "1") == "0":
        return None
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        logger.warning("no C compiler (cc, or $CC): the CPU kernels run in plain torch, several times slower")
        return None
    try:
        return Library(_compiled(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error))[-2000:]
        logger.warning("the CPU kernels cannot be compiled and run in plain torch, several times slower: %s", reason)
        return None


def native(*tensors: Tensor) -> Library | None:
    """The kernels, if they can take these tensors: on the CPU, of float32 or bfloat16, the last axis in whole vectors of 16."""
    if all(t.device.type == "cpu" and t.dtype in ELEMENT_TYPES and t.shape[-1] % 16 == 0 for t in tensors):
        return library()
    return None


def element_type(tensor: Tensor) -> int:
    """How the C side calls the tensor's dtype."""
    return ELEMENT_TYPES[tensor.dtype]


def _compiled(compiler: Sequence[str]) -> Path:
    """The shared library, out of the cache or newly compiled."""
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.c"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    openmp = _torch_openmp()
    identity = [*compiler, *_FLAGS, version, _processor(), str(openmp)]
    identity += [file.read_text(encoding="utf-8") for file in [*sources, *sorted(folder.glob("*.h"))]]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    target = _cache_folder() / f"perft-{digest}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _lock(target.with_suffix(".lock")):
        if not target.is_file():  # another process may have made it meanwhile
            logger.info("compiling the CPU kernels (once, some seconds)")
            _compile(compiler, sources, openmp, target)
    return target


def _compile(compiler: Sequence[str], sources: Sequence[Path], openmp: Path | None, target: Path) -> None:
    """Each source by itself, as many at a time as there are cores; `target` is made whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]

        def run(*arguments: object) -> None:
            command = [*compiler, *_FLAGS, *map(str, arguments)]
            subprocess.run(command, capture_output=True, text=True, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            # the largest first: it takes longest
            order = sorted(zip(sources, objects, strict=True), key=lambda pair: -pair[0].stat().st_size)
            list(threads.map(lambda pair: run("-c", pair[0], "-o", pair[1]), order))
        # torch's own OpenMP, where it brings one: two of them would fight for the cores
        run("-shared", *objects, *([openmp] if openmp else []), "-lm", "-o", made)
        made.replace(target)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Held by one process at a time; let go by the system when its holder dies. Where there are no locks, held by all."""
    with file.open("w") as opened:
        with contextlib.suppress(OSError):  # a file system without them
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _torch_openmp() -> Path | None:
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)


def _processor() -> str:
    """What `-march=native` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path:
    cache = os.environ.get("PERFT_CACHE")
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perft"
