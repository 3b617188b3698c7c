"""What a base may not ask of the engine: it is refused at the start, not answered wrongly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from perft.errors import BaseModelError
from perft_serve.engine.runner import _check_rope
from perft_serve.engine.seam import _attention


@pytest.mark.parametrize(
    ("asked", "message"), [({"is_causal": False}, "later tokens"), ({"softcap": 30.0}, r"\['softcap'\]")]
)
def test_attention_that_is_not_ours_is_refused(asked: dict[str, Any], message: str) -> None:
    """Soft-capped or bidirectional attention would come out wrong in silence."""
    x = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError, match=message):
        _attention(nn.Identity(), x, x, x, None, dropout=0.0, **asked)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True], ids=["one", "by layer type"])
def test_rope_that_depends_on_the_batch_is_refused(rope_type: str, nested: bool) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0}
    parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}} if nested else rope
    with pytest.raises(BaseModelError, match=f"'{rope_type}' depend on the longest sequence"):
        _check_rope(SimpleNamespace(rope_parameters=parameters))
    _check_rope(SimpleNamespace(rope_parameters={"rope_type": "yarn", "factor": 2.0}))
    _check_rope(SimpleNamespace())
