"""How both processes log: to stderr, in one format."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> None:
    """Sets up this process's logging; for the beginning of a command."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(name)s: %(message)s", stream=sys.stderr)
