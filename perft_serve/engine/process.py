"""The engine as a process of its own: `python -m perft_serve.engine.process FOLDER`. `perft-serve` starts it, nobody else."""

from __future__ import annotations

import sys

from perft_serve.engine.engine import Engine
from perft_serve.engine.loop import run_process

if __name__ == "__main__":
    sys.exit(run_process(sys.argv[1:], Engine))
