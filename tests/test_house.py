"""The house rules that no single test of a part would notice: import direction, the `kernels/` trap, stale documents.

In: the source files themselves (syntax trees and text), nothing of what they compute. Every import counts, lazy ones
inside functions too. ARCHITECTURE.md draws the picture that these tests hold.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    name: ROOT / folder / name for name, folder in {"perft_kernels": "kernels", "perft": "", "perft_serve": ""}.items()
}

# Bottom to top; a module stands on the floor of its longest prefix here, and imports from its own floor or below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("perft_kernels",),
    ("perft",),
    ("perft_serve.adapters",),
    ("perft_serve.engine",),
    ("perft_serve.text", "perft_serve.inputs", "perft_serve.outputs", "perft_serve.llm"),
    ("perft_serve.beam", "perft_serve.evaluation", "perft_serve.harness"),
    ("perft_serve.server",),
    ("perft_serve",),
)

# What a part must not know, however it would come by it.
HTTP = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "httpx", "openai"}
TEXT = {"tokenizers", "jinja2"}
TENSORS = {"torch", "numpy", "transformers", "peft", "safetensors"}
UNKNOWN_TO: dict[str, set[str]] = {
    "perft_kernels": HTTP | TEXT | {"transformers", "peft", "safetensors"},
    "perft": HTTP | {"pickle"},
    "perft_serve.adapters": HTTP | TEXT | {"pickle"},
    "perft_serve.engine": HTTP | TEXT | {"pickle"},
    "perft_serve.server": TENSORS | {"pickle"},
}

# The engine's planning: plain Python, so that it is tested in milliseconds. Here what is imported counts as well.
PLANNING = tuple(
    f"perft_serve.engine.{name}" for name in ("params", "events", "limits", "sequence", "pages", "scheduler", "config")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Import:
    """`importer` (a module of ours) imports `imported` (any module) at `line`."""

    importer: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """Every module of ours: dotted name to file."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(module: str, source: str, ours: Iterable[str]) -> Iterator[Import]:
    """All imports in a source text, wherever they stand in it; `from a import b` is of `a.b` if that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer=module, line=node.lineno, imported=alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import; write the absolute name"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(importer=module, line=node.lineno, imported=inner if inner in ours else node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            raise AssertionError(f"{module}:{node.lineno}: import by string; write an import statement")


def all_imports() -> list[Import]:
    ours = modules()
    return [found for name, file in ours.items() for found in imports_of(name, file.read_text(encoding="utf-8"), ours)]


def stands_under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def floor(module: str) -> int | None:
    """Index into FLOORS, or `None` for a module that is not ours."""
    prefixes = [
        (len(prefix), index) for index, names in enumerate(FLOORS) for prefix in names if stands_under(module, prefix)
    ]
    return max(prefixes)[1] if prefixes else None


def upward(imports: Iterable[Import]) -> list[Import]:
    """The imports that point up."""
    found = []
    for each in imports:
        here, there = floor(each.importer), floor(each.imported)
        assert here is not None, each.importer
        if there is not None and there > here:
            found.append(each)
    return found


def forbidden(imports: Iterable[Import]) -> list[Import]:
    """The imports of something that the importing part must not know."""
    return [
        each
        for each in imports
        for prefix, names in UNKNOWN_TO.items()
        if stands_under(each.importer, prefix) and each.imported.split(".")[0] in names
    ]


def cycle(imports: Iterable[Import]) -> list[str] | None:
    """The modules of one import cycle among our own, or `None`."""
    graph: dict[str, set[str]] = {}
    for each in imports:
        if floor(each.imported) is not None and each.imported != each.importer:
            graph.setdefault(each.importer, set()).add(each.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def reached(module: str, imports: Iterable[Import]) -> set[str]:
    """Everything that a module imports, directly or through modules of ours."""
    graph: dict[str, set[str]] = {}
    for each in imports:
        graph.setdefault(each.importer, set()).add(each.imported)
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for imported in graph.get(waiting.pop(), set()) - seen:
            seen.add(imported)
            waiting.append(imported)
    return seen


def test_imports_point_down() -> None:
    assert not [str(each) for each in upward(all_imports())]


def test_no_import_cycle() -> None:
    assert cycle(all_imports()) is None


def test_no_part_knows_what_it_should_not() -> None:
    assert not [str(each) for each in forbidden(all_imports())]


@pytest.mark.parametrize("module", PLANNING)
def test_planning_is_plain_python(module: str) -> None:
    assert module in modules()
    third_party = {name.split(".")[0] for name in reached(module, all_imports()) if floor(name) is None}
    assert third_party <= set(sys.stdlib_module_names)


def test_the_front_computes_nothing() -> None:
    """The server's process has no tensors, through whatever it imports; Transformers brings it the tokenizer, nothing else."""
    imports = all_imports()
    for module in modules():
        if stands_under(module, "perft_serve.server"):
            allowed = set() if module.endswith((".client", ".supervisor", ".metrics")) else {"transformers"}
            known = {name.split(".")[0] for name in reached(module, imports)}
            assert known & TENSORS <= allowed, module


def test_nothing_is_unpickled() -> None:
    """An adapter is a file from a stranger: safetensors only."""
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "pickle.load", "pickle.loads"), (
                    f"{name}:{node.lineno}"
                )


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("perft_kernels.made_up", "from perft import errors"),
        ("perft.made_up", "def late():\n    import perft_serve.engine.config"),
        ("perft_serve.adapters.made_up", "from perft_serve.engine.config import EngineConfig"),
        ("perft_serve.adapters.made_up", "from perft_serve.engine import config"),
        ("perft_serve.engine.made_up", "from perft_serve import LLM"),
        ("perft_serve.text", "from perft_serve.server import app"),
        ("perft_serve.server.made_up", "from perft_serve import cli"),
    ],
)
def test_an_upward_import_is_found(importer: str, source: str) -> None:
    assert upward(imports_of(importer, source, modules()))


def test_a_cycle_an_unknown_and_a_string_import_are_found() -> None:
    there = imports_of("perft.a", "from perft import b", ("perft.a", "perft.b"))
    back = imports_of("perft.b", "def late():\n    from perft.a import thing", ("perft.a", "perft.b"))
    assert cycle([*there, *back]) is not None
    assert forbidden(imports_of("perft_serve.server.made_up", "from torch import nn", ()))
    assert "torch.nn" in reached(
        "perft.a", [*imports_of("perft.a", "import perft.b", ()), *imports_of("perft.b", "import torch.nn", ())]
    )
    with pytest.raises(AssertionError, match="relative"):
        list(imports_of("perft.a", "from .b import thing", ()))
    with pytest.raises(AssertionError, match="by string"):
        list(imports_of("perft.a", "importlib.import_module('perft_serve')", ()))


KERNELS_TRAP = """
import transformers.integrations.hub_kernels
import torch
from transformers import MixtralConfig, MixtralForCausalLM

config = MixtralConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
)
print(MixtralForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape[-1])
"""


def test_the_kernels_folder_is_not_taken_for_the_kernels_package() -> None:
    """Transformers probes for a package named `kernels`; started in the repo root, Python would find our folder."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    run = subprocess.run([sys.executable, "-c", KERNELS_TRAP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "16"


def test_one_version() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared
    assert importlib.metadata.version("perft-serve") == declared[1]
    for package in ("perft", "perft_serve"):
        assert importlib.import_module(package).__version__ == declared[1]
    assert f"## [{declared[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_documents_name_only_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "bench/README.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
        assert named <= targets, document
    assert {"demo", "test"} <= set(
        re.findall(r"^make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_the_documents_name_only_files_that_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "bench/README.md", "deploy/README.md"):
        file = ROOT / document
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (file.parent / link).exists(), f"{document}: {link}"


# Put together here, so that this file does not hold what it looks for.
OF_ONE_MACHINE = re.compile(
    "|".join(
        (
            r"(?<![\w.~-])/(?:" + "root|home|Users|work|opt|mnt" + r")/\w",
            "pythonhosted" + r"\.org",
            "index" + "-url",
        )
    )
)


def tracked_files() -> list[Path]:
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return [ROOT / name for name in run.stdout.split("\0") if name]
    return [file for file in ROOT.rglob("*") if not any(part.startswith(".") for part in file.relative_to(ROOT).parts)]


def test_no_path_of_one_machine_in_a_tracked_file() -> None:
    found = []
    for file in tracked_files():
        if file.is_file() and file.suffix not in {".safetensors", ".png"}:
            text = file.read_text(encoding="utf-8")
            found += [f"{file.relative_to(ROOT)}: {match[0]}" for match in OF_ONE_MACHINE.finditer(text)]
    assert not found
