"""PERFT (arXiv 2411.08212) as a PEFT method. Importing the package registers the method with PEFT; nothing else happens."""

from perft.config import PerftConfig as PerftConfig
from perft.errors import AdapterError as AdapterError
from perft.errors import BaseModelError as BaseModelError
from perft.errors import PerftError as PerftError
from perft.layer import PerftLayer as PerftLayer
from perft.model import PerftModel as PerftModel

__version__ = "0.1.0"
