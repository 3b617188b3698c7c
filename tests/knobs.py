"""Knobs on an engine that runs in another process: a small file that the test writes and the engine reads at every step."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How an engine under test is to behave.

    Args:
        pace: seconds that each step takes longer.
        failure: steps raise this.
        start_failure: the next engine cannot be built, and says this; "exit" and "kill" end its process without a word, "hang"
            takes for ever.
        refuse: requests with this prompt cannot be submitted, because of a bug.
        spoil: requests end with this error.
        say: the tokens that every request generates, whatever the model would say; then 0.
    """

    pace: float = 0.0
    failure: str | None = None
    start_failure: str | None = None
    refuse: tuple[int, ...] = ()
    spoil: str | None = None
    say: tuple[int, ...] = ()


class Knobs:
    """The file; every attribute of `Settings` can be read and set here."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, **settings: Any) -> None:
        """Changes some settings; the others stay."""
        new = Path(f"{self.path}.new")
        new.write_bytes(msgspec.json.encode(replace(self.read(), **settings)))
        os.replace(new, self.path)

    def reset(self) -> None:
        """As it was at first."""
        self.path.unlink(missing_ok=True)

    def read(self) -> Settings:
        """All settings."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Settings)
        except FileNotFoundError:
            return Settings()

    def fail_start(self) -> None:
        """In the engine's process: does not let an engine be built, if so told."""
        match self.read().start_failure:
            case None:
                pass
            case "exit":
                os._exit(7)
            case "hang":
                time.sleep(10_000)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case reason:
                raise ValueError(reason)


def engine_command(module: str, knobs: Knobs) -> list[str]:
    """The command line of an engine's process: `main` of a module in this folder, with the file of knobs."""
    # At the end of the path: some folders here are named as packages are
    code = (
        f"import sys; sys.path.append({os.fspath(Path(__file__).parent)!r}); import {module}; sys.exit({module}.main())"
    )
    return [sys.executable, "-c", code, str(knobs.path)]
