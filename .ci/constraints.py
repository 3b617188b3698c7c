"""Prints the environment it runs in as a pip constraints file: `make constraints` writes `constraints.txt` with it.

In: the installed distributions of the running interpreter. Out: one `name==version` a line on standard output, sorted,
without the project itself, without pip's own tools, and without local labels (`torch==2.13.0` is satisfied by a `+cpu`
and by a CUDA build alike). A release that does not support the oldest Python of ours gets a marker, so that pip is
free to choose an older one there. It does not know which of the packages are direct dependencies.
"""

from __future__ import annotations

from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

OLDEST_PYTHON = "3.10.99"
NOT_PINNED = {"perft-serve", "pip", "setuptools", "wheel"}

lines = []
for distribution in distributions():
    name = canonicalize_name(distribution.metadata["Name"])
    if name in NOT_PINNED:
        continue
    pin = f"{name}=={Version(distribution.version).public}"
    requires_python = distribution.metadata.get("Requires-Python")
    if requires_python and OLDEST_PYTHON not in SpecifierSet(requires_python):
        pin += ' ; python_version >= "3.11"'
    lines.append(pin)

print("# What CI tested, on Python 3.11. Remade by `make constraints`; used by the Makefile and the Dockerfile.")
print("\n".join(sorted(set(lines))))
