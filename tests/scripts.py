"""Scripts of this project that are no modules of a package, loaded as modules."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType


def load_script(file: Path, name: str) -> ModuleType:
    """The script as the module `name`; its `main` is not run."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_script(file: Path, *arguments: str, environ: Mapping[str, str]) -> str:
    """The script in a process of its own, with `environ` over this one's environment; what it prints."""
    run = subprocess.run(
        [sys.executable, str(file), *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
