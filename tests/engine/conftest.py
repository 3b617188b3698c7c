"""The base that most tests of the engine use, with every kind of adapter."""

from __future__ import annotations

import pytest
from served import Served, make_served


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A tiny Mixtral with all the adapters of `tiny.variant_configs`."""
    return make_served("mixtral", tmp_path_factory.mktemp("mixtral"))
