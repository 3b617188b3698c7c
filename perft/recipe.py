"""A training recipe: everything that decides what `perft train` does, from a YAML file, from flags, or from both.

In: values by field name, as text or as YAML gave them. Out: a checked `TrainConfig`, and a `PerftConfig` or (the paper's
baseline, `method: lora`) a `LoraRecipe`. The command line is made from the same fields, so a new field is an option at once.
It knows no model and reads no data.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig

from perft.config import PerftConfig
from perft.data import LossOn
from perft.errors import PerftError
from perft.lora import LoraRecipe

Method = Literal["perft", "lora"]
BaseDtype = Literal["auto", "float32", "bfloat16"]
MixedPrecision = Literal["bfloat16", "float16"]
Reporter = Literal["tensorboard", "wandb"]
SaveDtype = Literal["float32", "bfloat16"]
Scheduler = Literal["linear", "cosine", "constant"]

DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How an adapter is trained. What the adapter is, is its `PerftConfig`'s or its `LoraRecipe`'s matter.

    The defaults are the authors' for OLMoE where they gave one (their Mixtral learning rate is 2e-5).
    """

    model: str = field(metadata={"help": "base model: a folder or a hub id"})
    data: tuple[str, ...] = field(
        metadata={
            "help": "training data: .jsonl, .json or .parquet files, or data sets of the Hub as "
            "org/name[@revision]:[config/]split"
        }
    )
    output: str = field(metadata={"help": "folder for the adapter, its log and its checkpoints"})
    eval_data: tuple[str, ...] = field(default=(), metadata={"help": "held-out data, named likewise"})
    eval_split: float | None = field(
        default=None, metadata={"help": "hold out part of the data: a share below 1, or a number of examples"}
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "evaluate every so many steps (default: once an epoch)"}
    )
    save_steps: int | None = field(
        default=None, metadata={"help": "checkpoint every so many steps (default: once an epoch)"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "how many of the latest checkpoints to keep"})
    log_steps: int = field(default=10, metadata={"help": "log every so many steps"})
    report_to: tuple[Reporter, ...] = field(
        default=(), metadata={"help": "also log to tensorboard or wandb, if they are installed"}
    )
    columns: tuple[str, ...] = field(
        default=(),
        metadata={"help": "fields of the data to take, as theirs=ours (question=prompt); all others are left out"},
    )
    streaming: bool = field(
        default=False, metadata={"help": "read training data while training, never all of it at once; needs max_steps"}
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "examples that streaming shuffles among"})
    packing: bool = field(
        default=False,
        metadata={"help": "fill rows of max_length with several examples, which do not see each other"},
    )
    loss_on: LossOn = field(
        default="all", metadata={"help": "learn the whole text, as in the paper, or the answer only"}
    )
    max_length: int = field(default=256, metadata={"help": "cut examples at this many tokens"})
    learning_rate: float = field(default=1e-5, metadata={"help": "peak learning rate of AdamW"})
    epochs: float | None = field(
        default=None,
        metadata={"help": f"passes over the data (default {DEFAULT_EPOCHS:g}, unless max_steps is given)"},
    )
    max_steps: int | None = field(default=None, metadata={"help": "optimiser steps, instead of epochs"})
    batch_size: int = field(default=16, metadata={"help": "examples per device and forward pass"})
    gradient_accumulation: int = field(default=1, metadata={"help": "forward passes per optimiser step"})
    warmup: float = field(
        default=0.03, metadata={"help": "warm-up: a share of all steps below 1, or a number of steps"}
    )
    scheduler: Scheduler = field(default="linear", metadata={"help": "what the learning rate does after warm-up"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the gradient's norm; 0 does not"})
    early_stopping: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a new best; keeps the best"}
    )
    keep_best: bool = field(
        default=False, metadata={"help": "the adapter is that of the best evaluation, not of the last step"}
    )
    mixed_precision: MixedPrecision | None = field(
        default=None, metadata={"help": "autocast of the forward pass, base and adapter alike"}
    )
    seed: int = field(default=42, metadata={"help": "seed of initial values, order and dropout"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass to save memory"}
    )
    dtype: BaseDtype = field(
        default="auto", metadata={"help": "dtype of the frozen base; the adapter trains in float32"}
    )
    save_dtype: SaveDtype = field(default="float32", metadata={"help": "dtype that the finished adapter is stored in"})

    def __post_init__(self) -> None:
        for name in ("model", "output"):
            if not getattr(self, name):
                raise PerftError(f"{name} is empty")
        if not self.data:
            raise PerftError("data names no file")
        for column in self.columns:
            if not all(column.partition("=")) or column.count("=") != 1:
                raise PerftError(f"columns are given as theirs=ours, got {column!r}")
        for name in (
            *("eval_steps", "save_steps", "max_steps", "keep_checkpoints", "log_steps", "batch_size"),
            *("shuffle_buffer", "early_stopping"),
        ):
            self._check_minimum(name, 1)
        for name in ("gradient_accumulation", "max_length"):
            self._check_minimum(name, 1 if name == "gradient_accumulation" else 2)
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise PerftError(f"{name} must be a positive number, got {value}")
        for name in ("warmup", "weight_decay", "max_grad_norm", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise PerftError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise PerftError(f"warmup of 1 or more is a number of steps, so it must be whole, got {self.warmup}")
        if self.epochs is not None and self.max_steps is not None:
            raise PerftError("epochs and max_steps both say how long to train; give one")
        if self.streaming and self.max_steps is None:
            raise PerftError("streaming does not know how much data there is: give max_steps")
        if self.streaming and self.eval_split is not None:
            raise PerftError("eval_split cannot divide data that is streamed: give eval_data")
        self._check_evaluation()

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter is that of the best evaluation."""
        return self.keep_best or self.early_stopping is not None

    def _check_minimum(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if value is not None and value < minimum:
            raise PerftError(f"{name} must be at least {minimum}, got {value}")

    def _check_evaluation(self) -> None:
        split = self.eval_split
        if split is not None and self.eval_data:
            raise PerftError("eval_data and eval_split both say what to evaluate on; give one")
        if split is not None and not (0 < split < 1 or (split >= 1 and split == int(split))):
            raise PerftError(f"eval_split must be a share below 1 or a whole number of examples, got {split}")
        if self.eval_steps is not None and split is None and not self.eval_data:
            raise PerftError("eval_steps needs something to evaluate on: give eval_data or eval_split")
        if self.keeps_best:
            name = "keep_best" if self.early_stopping is None else "early_stopping"
            if split is None and not self.eval_data:
                raise PerftError(f"{name} needs something to evaluate on: give eval_data or eval_split")
            if self.save_steps != self.eval_steps:
                raise PerftError(
                    f"{name} needs a checkpoint of each evaluation: save_steps must be what eval_steps is "
                    f"({self.eval_steps}), got {self.save_steps}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeField:
    """One field of a recipe.

    Args:
        name: its name, in YAML and (with dashes) as a flag.
        hint: its type.
        help: what it is, for people.
        default: its default; `dataclasses.MISSING` if it must be given.
        owner: `TrainConfig`, `PerftConfig` or `LoraRecipe`, the first that has it; `None` for `method`, which chooses.
    """

    name: str
    hint: Any
    help: str
    default: Any
    owner: type | None

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it may be, if it is one of a few."""
        bare = _without_none(self.hint)[0]
        return get_args(bare) if get_origin(bare) is Literal else ()

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return get_origin(_without_none(self.hint)[0]) in (list, tuple)

    @property
    def is_switch(self) -> bool:
        """Whether it is a plain yes or no."""
        return self.hint is bool

    def convert(self, value: object) -> Any:
        """`value`, which may be text from a flag, as this field's type.

        Raises:
            PerftError: it cannot be that.
        """
        bare, optional = _without_none(self.hint)
        if value is None or value == "none":
            if optional:
                return None
            raise PerftError(f"{self.name} needs a value")
        if get_origin(bare) in (list, tuple):
            items = list(value) if isinstance(value, (list, tuple)) else [value]
            return get_origin(bare)(_scalar(self.name, get_args(bare)[0], item) for item in items)
        return _scalar(self.name, bare, value)


METHOD = RecipeField(
    name="method",
    hint=Method,
    help="what kind of adapter: perft, or lora, the paper's baseline",
    default="perft",
    owner=None,
)


def recipe_fields() -> list[RecipeField]:
    """Every field of a recipe: those of `TrainConfig`, `method`, then those of the adapter of either method."""
    return [*_fields_of(TrainConfig), METHOD, *{**_adapter_fields("lora"), **_adapter_fields("perft")}.values()]


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The values in the YAML file `path`, by field name; paths in it are relative to where the command runs.

    Raises:
        PerftError: the file is missing, is not a mapping, or has an unknown key.
    """
    values = read_mapping(path)
    check_keys(values, path)
    return values


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`.

    Raises:
        PerftError: the file is missing, or is not a mapping.
    """
    import yaml  # of the extra `train`

    file = Path(path)
    if not file.is_file():
        raise PerftError(f"recipe not found: {file}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PerftError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise PerftError(f"{file}: a recipe is a mapping of field: value")
    return values


def check_keys(values: Mapping[str, Any], where: str | Path) -> None:
    """Raises PerftError if a key is no field of a recipe; `where` is what the message begins with."""
    known = [recipe_field.name for recipe_field in recipe_fields()]
    for name in values:
        if name not in known:
            raise PerftError(f"{where}: unknown key {name!r}; known are {', '.join(known)}")


def build_configs(values: Mapping[str, Any]) -> tuple[TrainConfig, PerftConfig | LoraRecipe]:
    """How and what to train, as `values` describe it.

    Raises:
        PerftError: a value is missing, of the wrong type, out of range, or has no meaning for the method.
    """
    method: Method = METHOD.convert(values.get("method", METHOD.default))
    train_fields = {item.name: item for item in _fields_of(TrainConfig)}
    adapter_fields = _adapter_fields(method)
    given: dict[str, Any] = {}
    for name, item in {**train_fields, **adapter_fields}.items():
        if name in values:
            given[name] = item.convert(values[name])
        elif item.default is MISSING:
            flag = name.replace("_", "-")
            raise PerftError(f"{name} is missing: give --{flag}, or {name}: in the recipe")
    for item in recipe_fields():
        if item is not METHOD and item.name in values and item.name not in given:
            raise PerftError(f"{item.name} has no meaning for method={method!r}; leave it out")
    train = TrainConfig(**{name: given[name] for name in train_fields if name in given})
    chosen = {name: given[name] for name in adapter_fields if name in given}
    return train, LoraRecipe(**chosen) if method == "lora" else PerftConfig(task_type="CAUSAL_LM", **chosen)


def recipe_values(train: TrainConfig, adapter: PerftConfig | LoraRecipe) -> dict[str, Any]:
    """The recipe as plain data, every field with its value; the inverse of `build_configs`."""
    method: Method = "lora" if isinstance(adapter, LoraRecipe) else "perft"
    values: dict[str, Any] = {}
    for owner, fields in ((train, _fields_of(TrainConfig)), (adapter, _adapter_fields(method).values())):
        for item in fields:
            value = getattr(owner, item.name)
            values[item.name] = list(value) if isinstance(value, tuple) else value
    return {**values, METHOD.name: method}


def _adapter_fields(method: Method) -> dict[str, RecipeField]:
    """The fields that describe an adapter of a method, by name."""
    perft = {item.name: item for item in _fields_of(PerftConfig, skip=("target_modules",), above=PeftConfig)}
    if method == "perft":
        return perft
    # what both have is described where PERFT has it
    return {item.name: replace(perft.get(item.name, item), default=item.default) for item in _fields_of(LoraRecipe)}


def _fields_of(owner: type, *, skip: tuple[str, ...] = (), above: type | None = None) -> Iterator[RecipeField]:
    hints = get_type_hints(owner)
    inherited = {item.name for item in dataclasses.fields(above)} if above is not None else set()
    for item in dataclasses.fields(owner):
        if item.name in skip or item.name in inherited:
            continue
        yield RecipeField(
            name=item.name, hint=hints[item.name], help=item.metadata.get("help", ""), default=item.default, owner=owner
        )


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type without `| None`, and whether it had that."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [part for part in get_args(hint) if part is not type(None)]
        assert len(rest) == 1
        return rest[0], True
    return hint, False


def _scalar(name: str, kind: Any, value: object) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise PerftError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
        raise PerftError(f"{name} must be true or false, got {value!r}")
    if kind is str:
        if isinstance(value, str):
            return value
        raise PerftError(f"{name} must be text, got {value!r}")
    assert kind in (int, float)
    # YAML reads 1e-3 as text, and flags are text
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = kind(value)
        except ValueError:
            number = None
        if number is not None and (isinstance(value, str) or number == value):
            return number
    raise PerftError(f"{name} must be {'a whole number' if kind is int else 'a number'}, got {value!r}")
