"""Every test of an op runs on both CPU backends: the compiled kernels, and plain torch."""

from __future__ import annotations

import pytest

import perft_kernels.native


@pytest.fixture(autouse=True, params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two runs."""
    if request.param == "torch":
        monkeypatch.setattr(perft_kernels.native, "library", lambda: None)
    elif perft_kernels.native.library() is None:
        pytest.skip("the CPU kernels cannot be compiled here")
    return str(request.param)
