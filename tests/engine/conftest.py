"""The base that most tests of the engine use, with every kind of adapter; and Triton's kernels in the place of a GPU's."""

from __future__ import annotations

import pytest
import torch
from served import Served, make_served

from perft_kernels import gpu


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A tiny Mixtral with all the adapters of `tiny.variant_configs`."""
    return make_served("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ops that have Triton kernels run them."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the engine's other tests run on the GPU")
    monkeypatch.setattr(gpu, "takes", lambda *_tensors: True)
