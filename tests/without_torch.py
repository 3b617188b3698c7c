"""Importing this makes `perft` and `perft_serve` importable without torch: their `__init__` files, which import all there is,
are not run. For processes of tests that need some plain module only, and need it in a fraction of a second.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

for _name in ("perft", "perft_serve"):
    _spec = find_spec(_name)
    assert _spec is not None
    assert _name not in sys.modules
    _package = ModuleType(_name)
    _package.__path__ = list(_spec.submodule_search_locations or ())
    sys.modules[_name] = _package
