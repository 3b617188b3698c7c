"""The programs of others that our server is tried with: an environment for each group, made once under `.cache/conformance`.

In: a name. Out: a folder with a Python (or Node) that has the programs of that group, each pinned so that a result can be
repeated. It does not know what is done with them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import CACHE
from peers import TORCH

HERE = CACHE / "conformance"


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """One environment.

    Args:
        name: its folder's.
        packages: what is in it, and what results name the versions of.
        needs_torch: installed first: pip must not choose its build.
        further: also installed, and not named.
        node: the packages are npm's.
    """

    name: str
    packages: tuple[str, ...]
    needs_torch: bool = False
    further: tuple[str, ...] = ()
    node: bool = False

    @property
    def folder(self) -> Path:
        """Where it is, made or not."""
        return HERE / self.name

    @property
    def bin(self) -> Path:
        """Its commands."""
        return self.folder / "bin"

    @property
    def is_there(self) -> bool:
        """Whether it was made, to the end."""
        return (self.folder / ".installed").exists()

    def require(self) -> None:
        """Makes it if it is not there."""
        if not self.is_there:
            self.make()

    def make(self) -> None:
        """Makes it, anew if a try was broken off."""
        print(f"{self.name}: installing into {self.folder}", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.node:
            self.folder.mkdir(parents=True)
            (self.folder / "package.json").write_text('{"private": true}\n')
            subprocess.run(["npm", "install", "--silent", *self.packages], cwd=self.folder, check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
            pip = [str(self.bin / "python"), "-m", "pip", "install", "--quiet"]
            if self.needs_torch:
                subprocess.run([*pip, TORCH], check=True)
            subprocess.run([*pip, *self.packages, *self.further], check=True)
        (self.folder / ".installed").touch()

    def versions(self) -> dict[str, str]:
        """What is installed."""
        names = [package.partition("[")[0].partition("==")[0] for package in self.packages]
        if self.node:
            names = [package.rpartition("@")[0] for package in self.packages]
            files = {name: self.folder / "node_modules" / name / "package.json" for name in names}
            return {name: json.loads(file.read_text())["version"] for name, file in files.items()}
        code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
        found = subprocess.run([self.bin / "python", "-c", code], capture_output=True, text=True, check=True).stdout
        versions: dict[str, str] = json.loads(found)
        return versions


ENVIRONMENTS = {
    each.name: each
    for each in (
        Environment(name="schemathesis", packages=("schemathesis==4.32.5",)),
        Environment(name="clients", packages=("litellm==1.110.2", "langchain-openai==1.7.4", "llm==0.36")),
        Environment(name="node", packages=("openai@6.49.0",), node=True),
        Environment(
            name="lm-eval", packages=("lm-eval[api,hf]==0.4.13",), needs_torch=True, further=("peft", "accelerate")
        ),
        Environment(name="guidellm", packages=("guidellm==0.8.1",), needs_torch=True),
        Environment(name="aiperf", packages=("aiperf==0.13.0",)),
    )
}


def find(names: Sequence[str]) -> list[Environment]:
    """The environments of these names; all, if there are none."""
    unknown = sorted(set(names) - set(ENVIRONMENTS))
    if unknown:
        raise SystemExit(f"conformance: unknown: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    return [ENVIRONMENTS[name] for name in names or ENVIRONMENTS]
