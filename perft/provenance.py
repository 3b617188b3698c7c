"""Where a trained adapter comes from: `perft_training.json` and the model card beside its weights.

In: what a training run knows (recipe, data, base, outcome). Out: the record as JSON, and a README.md with the front matter
that PEFT writes, so that the Hub files the adapter under its base. It trains nothing and reads no tensor: a base's digest
is one over its files.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers.utils import cached_file

from perft.adapter import Adapter
from perft.errors import AdapterError
from perft.lora import LoraAdapter, can_be_served

TRAINING_FILE = "perft_training.json"
CARD_FILE = "README.md"
_PACKAGES = ("perft-serve", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TAGS = {False: ("perft",), True: ("lora",)}
_VARIANT_NAMES = {"R": "Routed", "E": "Embedded", "D": "Dense", "S": "Single"}


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def describe_base(base: str) -> dict[str, Any]:
    """What identifies the base model `base` (a folder or a hub id): name, hub commit, digest.

    The digest is a sha256 over the names and sha256s of config.json and of the weights, `None` if they are not safetensors
    files on this disk. The Hub's cache names a large file by its sha256, so nothing of it is read again.
    """
    config = cached_file(base, "config.json", _raise_exceptions_for_missing_entries=False)
    if config is None:
        return {"name": base, "revision": None, "digest": None}
    folder = Path(config).parent
    revision = folder.name if folder.parent.name == "snapshots" else None
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return {"name": base, "revision": revision, "digest": None}
    digest = hashlib.sha256()
    for file in (folder / "config.json", *weights):
        digest.update(f"{file.name} {_known_sha256(file) or file_sha256(file)}\n".encode())
    return {"name": base, "revision": revision, "digest": digest.hexdigest()}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # of an extra that is not installed
            continue
    return versions


def metrics_of(history: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """What a log says at its end: the last of each loss and of each measure of the router, and the best `eval_loss`."""
    metrics: dict[str, float] = {}
    for entry in history:
        metrics |= {name: entry[name] for name in entry if name in ("loss", "eval_loss") or name.startswith("router_")}
        if "eval_loss" in entry:
            metrics["best_eval_loss"] = min(entry["eval_loss"], metrics.get("best_eval_loss", entry["eval_loss"]))
    return metrics


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `perft_training.json`."""
    text = json.dumps(record, indent=2) + "\n"
    temporary = folder / f"{TRAINING_FILE}.part"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / TRAINING_FILE)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `perft_training.json` in `folder` holds; `None` if there is none.

    Raises:
        AdapterError: it is not readable.
    """
    file = folder / TRAINING_FILE
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        raise AdapterError(f"{file}: not the record of a training run (no recipe)")
    return record


def hub_id(base: str | None) -> str | None:
    """`base` if it can be the name of a repository on the Hub; a folder of this machine is nobody else's business."""
    return base if base and _HUB_ID.fullmatch(base) and not Path(base).exists() else None


def method_name(adapter: Adapter | LoraAdapter) -> str:
    """What kind of adapter it is: `PERFT-R`, `LoRA`."""
    return "LoRA" if isinstance(adapter, LoraAdapter) else f"PERFT-{adapter.config.variant}"


def model_card(adapter: Adapter | LoraAdapter, record: Mapping[str, Any]) -> str:
    """The text of a README.md for a trained adapter: front matter as PEFT's, then what it is and where it comes from."""
    recipe = record["recipe"]
    base = hub_id(recipe.get("model"))
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[
            *_TAGS[isinstance(adapter, LoraAdapter)],
            "peft",
            "mixture-of-experts",
            *([f"base_model:adapter:{base}"] if base else []),
        ],
    )
    outcome, metrics = record.get("outcome", {}), record.get("outcome", {}).get("metrics", {})
    facts = [
        ("base model", f"`{base}`" if base else "a local folder"),
        ("base digest", f"`{record.get('base', {}).get('digest')}`"),
        ("adapter digest", f"`{adapter.digest}`"),
        ("parameters", f"{adapter.num_parameters:,}"),
        ("optimiser steps", f"{outcome.get('steps')}"),
        ("training examples", f"{outcome.get('train_examples')}"),
        *((name, f"{value:.4g}") for name, value in metrics.items()),
    ]
    settings = ("learning_rate", "scheduler", "batch_size", "gradient_accumulation", "max_length", "loss_on", "seed")
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            "",
            *(_what_lora_is(adapter) if isinstance(adapter, LoraAdapter) else _what_perft_is(adapter)),
            "",
            *_table(("", ""), facts),
            "",
            "## Use",
            "",
            *(_how_to_serve(base) if can_be_served(adapter) else ()),
            "```python",
            *(() if isinstance(adapter, LoraAdapter) else ("import perft  # registers the method with PEFT",)),
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "THIS_REPOSITORY")',
            "```",
            "",
            "## Training",
            "",
            f"The whole recipe, digests of the data and versions are in `{TRAINING_FILE}`.",
            "",
            *_table(("setting", "value"), [(name, f"`{recipe[name]}`") for name in settings if name in recipe]),
            "",
            "### Framework versions",
            "",
            *(f"- {name} {number}" for name, number in record.get("versions", {}).items()),
            "",
        ]
    )


def _what_perft_is(adapter: Adapter) -> list[str]:
    config = adapter.config
    shape = (
        f"{config.unit} units of rank {config.r}, {adapter.num_experts} adapter experts in each of "
        f"{len(adapter.layers)} layers"
    )
    return [
        f"# PERFT-{config.variant} ({_VARIANT_NAMES[config.variant]}) adapter",
        "",
        f"Trained by `perft train` (PERFT, arXiv 2411.08212): {shape}.",
        "It cannot be merged into its base; it runs beside it.",
    ]


def _what_lora_is(adapter: LoraAdapter) -> list[str]:
    targets = ", ".join(adapter.targets)
    return [
        f"# LoRA adapter ({targets})",
        "",
        f"Trained by `perft train` with PEFT's LoRA: rank {adapter.config.r} on {targets}, in {len(adapter.layers)} layers.",
    ]


def _how_to_serve(base: str | None) -> list[str]:
    return ["```bash", f"perft-serve serve --model {base or 'BASE'} --adapter NAME=THIS_REPOSITORY", "```", ""]


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rows)]


def _known_sha256(file: Path) -> str | None:
    """The sha256 of a large file in the Hub's cache, which is the name of what its link leads to."""
    target = file.resolve()
    is_blob = target != file.absolute() and target.parent.name == "blobs" and len(target.name) == 64
    return target.name if is_blob else None
