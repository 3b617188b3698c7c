"""PERFT (arXiv 2411.08212) as a PEFT method. Naming `PerftConfig`, `PerftLayer` or `PerftModel` registers the method with PEFT.

Only then are PEFT and torch imported: the server's process needs neither, and has this package for its errors.
"""

from typing import TYPE_CHECKING

from perft.errors import AdapterError as AdapterError
from perft.errors import BaseModelError as BaseModelError
from perft.errors import PerftError as PerftError

if TYPE_CHECKING:
    from perft.config import PerftConfig as PerftConfig
    from perft.layer import PerftLayer as PerftLayer
    from perft.model import PerftModel as PerftModel
else:

    def __getattr__(name: str) -> object:
        if name not in ("PerftConfig", "PerftLayer", "PerftModel"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from perft.config import PerftConfig
        from perft.layer import PerftLayer
        from perft.model import PerftModel  # registers the method

        globals().update(PerftConfig=PerftConfig, PerftLayer=PerftLayer, PerftModel=PerftModel)
        return globals()[name]


__version__ = "0.1.0"
