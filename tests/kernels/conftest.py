"""Every test of an op runs on both CPU backends: the compiled kernels, and plain torch; and on Triton where its module says so
(`BACKENDS = ("native", "torch", "triton")`): on the GPU if there is one, else interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import perft_kernels.gpu
import perft_kernels.native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("backend", getattr(metafunc.module, "BACKENDS", ("native", "torch")), indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of them runs."""
    if request.param == "torch":
        monkeypatch.setattr(perft_kernels.native, "library", lambda: None)
    elif request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(perft_kernels.gpu, "takes", lambda *_tensors: True)
    elif perft_kernels.native.library() is None:
        pytest.skip("the CPU kernels cannot be compiled here")
    return str(request.param)


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of a test that names no device lie."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture
def uninitialised_is_nan(device: torch.device) -> Iterator[None]:
    """On a CPU: what a kernel does not write, shows."""
    torch.use_deterministic_algorithms(device.type == "cpu")  # fills what `torch.empty` makes with NaN
    yield
    torch.use_deterministic_algorithms(False)
