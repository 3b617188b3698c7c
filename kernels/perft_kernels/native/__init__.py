"""The CPU kernels: the C files beside this one, compiled on first use for the processor at hand.

In: a C compiler (`$CC`, or cc). Out: `library()`, whose functions take tensors, sizes and numbers in the order of their C
declarations. What was compiled is kept in a cache folder (`$PERFT_CACHE`, or `perft` in the user's cache) under a hash of
sources, compiler and processor, so it takes some seconds once. Without a compiler, or with `PERFT_NATIVE=0`, `library()` is
`None`, and the ops run their references in plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# No -ffast-math: NaN has to stay NaN, and sums keep their order.
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
# The parameters of each function: p an address, l an int64, f a float. Those with `:` return 0, or -1 out of memory.
_SIGNATURES = {
    "perft_linear": "ppppllll",
    "perft_moe_experts": "pppppplllll:",
    "perft_base_router": "ppppp" + "lllll",
    "perft_rms_norm": "ppp" + "llf",
    "perft_adapter_router": "plppppl" + "pppp" + "lllll",
    "perft_routed_units": "pplppppl" + "ppppp" + "p" + "llll:",
    "perft_kv_write": "pllpllppp" + "llll",
    "perft_paged_attention": "pllppl" + "ppppp" + "lllllll" + "fl:",
}
_ARGUMENTS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float}
_ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Library:
    """The compiled functions.

    Args:
        file: the shared library.
    """

    def __init__(self, file: Path) -> None:
        handle = ctypes.CDLL(str(file))
        self._functions = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(handle, name)
            function.argtypes = [_ARGUMENTS[letter] for letter in signature.removesuffix(":")]
            function.restype = ctypes.c_int if signature.endswith(":") else None
            self._functions[name] = function

    def __call__(self, name: str, *arguments: Tensor | float | None) -> None:
        """Run a function; a tensor's address is passed for it, and whoever calls keeps it alive and contiguous.

        Raises:
            MemoryError: there is no room for its intermediate results.
        """
        if self._functions[name](*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]):
            raise MemoryError(f"{name} has found no memory for its intermediate results")


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
    if all(t.device.type == "cpu" and t.dtype in _ELEMENT_TYPES and t.shape[-1] % 16 == 0 for t in tensors):
        return library()
    return None


def element_type(tensor: Tensor) -> int:
    """How the C side calls the tensor's dtype."""
    return _ELEMENT_TYPES[tensor.dtype]


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
    logger.info("compiling the CPU kernels (once, some seconds)")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        # torch's own OpenMP, where it brings one: two of them would fight for the cores
        linked = ["-shared", *map(str, sources), *([str(openmp)] if openmp else []), "-lm", "-o", str(made)]
        subprocess.run([*compiler, *_FLAGS, *linked], capture_output=True, text=True, check=True)
        made.replace(target)  # whole or not at all, also when two processes compile at once
    return target


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
