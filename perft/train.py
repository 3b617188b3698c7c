"""Training an adapter: the base frozen, the adapter in float32, Transformers' Trainer underneath.

In: a `TrainConfig`, and a `PerftConfig` or a `LoraRecipe` (see `perft.recipe`). Out, in `TrainConfig.output`:

    adapter_config.json, adapter_model.safetensors   the adapter
    training_log.jsonl                               one line per log entry: loss, router_aux_loss, eval_loss, ...
    loss.png                                         the losses over the steps
    perft_training.json                              the recipe, digests of data and base, versions, the outcome
    README.md                                        a model card of it
    checkpoints/                                     what `resume` continues from

`loss` in the log is what is minimised: language-model loss plus the weighted load-balancing loss of the adapter's router.
`router_aux_loss` is that term before its weight (variant R), `eval_loss` the language-model loss alone.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from perft.adapter import WEIGHTS_FILE, Adapter, LayerTensors, read_adapter, write_adapter
from perft.base import first_line, load_base
from perft.config import PerftConfig
from perft.data import HubData, PaddingCollator, StreamedRows, iter_records, pack, tokenize_files
from perft.errors import BaseModelError, PerftError
from perft.layer import PerftLayer
from perft.lora import LoraAdapter, LoraRecipe, read_any_adapter, read_lora
from perft.model import PerftModel
from perft.provenance import (
    CARD_FILE,
    TRAINING_FILE,
    describe_base,
    file_sha256,
    metrics_of,
    model_card,
    package_versions,
    write_record,
)
from perft.recipe import DEFAULT_EPOCHS, METHOD, TrainConfig, recipe_values

if TYPE_CHECKING:
    from datasets import Dataset

LOG_FILE = "training_log.jsonl"
PLOT_FILE = "loss.png"
CHECKPOINTS = "checkpoints"
EXTRA_PACKAGES = ("accelerate", "datasets", "matplotlib", "yaml")


def require_train_extra() -> None:
    """Raises PerftError if a package that only training needs is not installed."""
    missing = [name for name in EXTRA_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PerftError(f'training needs {", ".join(missing)}: pip install "perft-serve[train]"')


def train(
    config: TrainConfig,
    adapter: PerftConfig | LoraRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Adapter | LoraAdapter:
    """Trains an adapter and writes it.

    Args:
        config: how.
        adapter: what.
        resume: continue from the last checkpoint in the output folder; the recipe and the data must be what they were.
        overwrite: start anew in an output folder that holds an earlier run, which is deleted.
        callbacks: more of Trainer's callbacks.

    Returns:
        The finished adapter, as read back from the output folder.

    Raises:
        PerftError: the configuration, the data or the output folder cannot be used, or the loss is no longer finite.
        BaseModelError: the base cannot be loaded or has no MoE blocks.
    """
    require_train_extra()
    from accelerate import PartialState  # of the extra `train`

    output = Path(config.output)
    run = describe_run(config, adapter)
    processes = PartialState()
    if processes.is_main_process:
        check_output(output, run, resume=resume, overwrite=overwrite)
        if overwrite:
            clear_output(output)
    tokenizer = load_tokenizer(config.model)
    train_data, eval_data = load_data(config, tokenizer)
    base = load_base(config.model, config.dtype)
    run["base"] = describe_base(config.model)
    if resume:
        check_same_base(output, run["base"])
    set_seed(config.seed)
    # a copy: attaching settles in place what depends on the base
    model = get_peft_model(base, adapter.to_peft(base) if isinstance(adapter, LoraRecipe) else copy.deepcopy(adapter))
    checkpoint = get_last_checkpoint(str(output / CHECKPOINTS)) if resume else None
    processes.wait_for_everyone()  # nobody writes before all have looked
    log = LogCallback(output)
    stopping = [] if config.early_stopping is None else [EarlyStoppingCallback(config.early_stopping)]
    trainer = PerftTrainer(
        model=model,
        args=trainer_arguments(config, has_eval=eval_data is not None),
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=PaddingCollator(pad_token_id=tokenizer.pad_token_id or 0),
        callbacks=[log, *stopping, *callbacks],
    )
    check_packing(config, base)  # where Trainer has put it
    if processes.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_record(output, run)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    _make_whole(model)
    if processes.is_main_process:
        outcome = {
            "steps": trainer.state.global_step,
            "seconds": round(time.perf_counter() - start, 1),
            "resumed": checkpoint is not None,
            "processes": processes.num_processes,
            **count_examples(train_data, eval_data),
        }
        history = trainer.state.log_history
        record = {**run, "outcome": outcome}
        if isinstance(adapter, LoraRecipe):
            _write_lora(model, config, record, history)
        else:
            layers = [module for module in model.modules() if isinstance(module, PerftLayer)]
            name = model.active_adapter
            write_finished(layers, name, model.peft_config[name], config, record, history)
        log.write(history)
    processes.wait_for_everyone()
    return read_any_adapter(output)


def _make_whole(model: nn.Module) -> None:
    """Brings trained parameters that FSDP has spread over the processes together again; every process takes part."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and isinstance(parameter, DTensor):
                module.register_parameter(name, nn.Parameter(parameter.full_tensor()))


class PerftTrainer(Trainer):
    """Trainer that also logs the adapter router's loss and stops when the loss is no longer finite."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._aux_sum: Tensor | float = 0.0
        self._aux_count = 0

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """As Trainer's; keeps the router loss that the forward pass left."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if model.training:
            tuner = self.accelerator.unwrap_model(model).base_model
            for value in tuner.router_aux_loss.values() if isinstance(tuner, PerftModel) else ():
                self._aux_sum = self._aux_sum + value  # stays on the device until it is logged
                self._aux_count += 1
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with `router_aux_loss` beside `loss`.

        Raises:
            PerftError: the loss is NaN or infinite.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise PerftError(
                    f"the loss became {logs['loss']} by step {self.state.global_step}; lower learning_rate "
                    f"(now {self.args.learning_rate:g}) or raise warmup"
                )
            if self._aux_count:
                logs["router_aux_loss"] = float(self._aux_sum) / self._aux_count
                self._aux_sum, self._aux_count = 0.0, 0
            tuner = self.accelerator.unwrap_model(self.model).base_model
            for health in tuner.router_health.values() if isinstance(tuner, PerftModel) else ():
                logs.update(health.take())
        super().log(logs, start_time)


class LogCallback(TrainerCallback):
    """Keeps `training_log.jsonl` and `loss.png` up to date while training runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the log so far; the plot follows at evaluations and at the end."""
        if state.is_world_process_zero:
            self._write_log(state.log_history)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws what there is."""
        if state.is_world_process_zero:
            self.write(state.log_history)

    def write(self, history: list[dict[str, float]]) -> None:
        """Writes the log and draws the plot."""
        self._write_log(history)
        plot_losses(history, self._folder / PLOT_FILE)

    def _write_log(self, history: list[dict[str, float]]) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        (self._folder / LOG_FILE).write_text(lines, encoding="utf-8")


def plot_losses(history: Sequence[dict[str, float]], path: str | Path) -> None:
    """Draws the training loss and, if there is any, the evaluation loss over the steps, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "held-out", "o")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=label, marker=marker or ("." if len(points) < 3 else ""), markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path)


def describe_run(config: TrainConfig, adapter: PerftConfig | LoraRecipe) -> dict[str, Any]:
    """What the outcome depends on, as it goes into `perft_training.json`.

    Raises:
        PerftError: data is not there, or has nothing to be known by.
    """
    data = {name: _fingerprint(name, config) for name in config.data}
    data |= {name: _fingerprint(name, dataclasses.replace(config, streaming=False)) for name in config.eval_data}
    return {"recipe": recipe_values(config, adapter), "data_sha256": data, "versions": package_versions()}


def _fingerprint(source: str, config: TrainConfig) -> str:
    """Sha256 of a file, or of a Hub data set's rows; of rows that are only streamed, the commit stands for them."""
    hub = HubData.parse(source)
    if hub is None:
        if not Path(source).is_file():
            raise PerftError(f"data file not found: {source}")
        return file_sha256(Path(source))
    if not config.streaming:
        digest = hashlib.sha256()
        for record in iter_records(source, config.columns):
            digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()
    if hub.revision is None or not re.fullmatch("[0-9a-f]{40}", hub.revision):
        raise PerftError(
            f"{source}: to stream from the Hub, name the commit ({hub.repo}@COMMIT:{hub.split}), so that the run can be "
            "resumed and told from others"
        )
    return f"commit {hub.revision}"


def check_output(output: Path, run: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """The output folder is fit for what is asked; an earlier run in it may be deleted only with `overwrite`."""
    if resume and overwrite:
        raise PerftError("--resume and --overwrite contradict each other; give one")
    if output.exists() and not output.is_dir():
        raise PerftError(f"output {output} is a file; choose a folder")
    run_file = output / TRAINING_FILE
    if resume:
        if not run_file.is_file() or get_last_checkpoint(str(output / CHECKPOINTS)) is None:
            raise PerftError(f"nothing to resume: {output} holds no checkpoint of an earlier run")
        check_same_run(json.loads(run_file.read_text(encoding="utf-8")), run, output)
    elif output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise PerftError(f"output {output} is not empty; give --resume to continue, or --overwrite to start anew")
        if not run_file.is_file():
            raise PerftError(
                f"output {output} holds no earlier run (no {TRAINING_FILE}), so it is not deleted; choose another folder"
            )


def clear_output(output: Path) -> None:
    """Deletes the earlier run that `check_output` has found in the folder."""
    if output.is_dir():
        shutil.rmtree(output)


def check_same_run(before: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Refuses to go on with a run under another recipe or on other data."""
    old, new = {METHOD.name: METHOD.default, **before.get("recipe", {})}, now["recipe"]
    changed = [
        f"{name} was {old.get(name)!r}, is {new[name]!r}"
        for name in new
        if name != "output" and old.get(name) != json.loads(json.dumps(new[name]))
    ]
    if changed:
        raise PerftError(f"cannot resume {output} with another recipe: {'; '.join(changed)}")
    if list(before.get("data_sha256", {}).values()) != list(now["data_sha256"].values()):
        raise PerftError(f"cannot resume {output}: the data files have changed since")


def check_same_base(output: Path, base: dict[str, Any]) -> None:
    """Refuses to go on with a run on another base."""
    before = json.loads((output / TRAINING_FILE).read_text(encoding="utf-8")).get("base", {})
    if before.get("digest") != base["digest"]:
        raise PerftError(f"cannot resume {output}: the base model's files are not those it was begun with")


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the base `model`."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"no tokenizer for the base model {model!r}: {first_line(error)}") from error
    return tokenizer


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Dataset | None]:
    """Training rows (a `Dataset`, or `StreamedRows`) and held-out rows."""
    if config.streaming:
        train_data: Any = StreamedRows(
            config.data,
            tokenizer,
            max_length=config.max_length,
            loss_on=config.loss_on,
            columns=config.columns,
            buffer_size=config.shuffle_buffer,
            seed=config.seed,
            packing=config.packing,
        )
        eval_data = _tokenized("held-out", config.eval_data, config, tokenizer) if config.eval_data else None
        return train_data, eval_data
    train_data = _tokenized("training", config.data, config, tokenizer)
    eval_data = None
    if config.eval_data:
        eval_data = _tokenized("held-out", config.eval_data, config, tokenizer)
    elif config.eval_split is not None:
        held_out = config.eval_split if config.eval_split < 1 else int(config.eval_split)
        if held_out >= len(train_data) or held_out * len(train_data) < 1:
            raise PerftError(
                f"eval_split={config.eval_split:g} does not divide {len(train_data)} examples; give eval_data"
            )
        parts = train_data.train_test_split(test_size=held_out, seed=config.seed)
        train_data, eval_data = parts["train"], parts["test"]
    return (_packed(train_data, config.max_length) if config.packing else train_data), eval_data


def count_examples(train_data: Any, eval_data: Dataset | None) -> dict[str, int | None]:
    """How many rows there are to train and to evaluate on; of a stream nobody knows."""
    return {
        "train_examples": None if isinstance(train_data, StreamedRows) else len(train_data),
        "eval_examples": 0 if eval_data is None else len(eval_data),
    }


@torch.no_grad()
def check_packing(config: TrainConfig, base: PreTrainedModel) -> None:
    """Refuses to pack where examples in a row would see each other, which is tried out.

    Whether positions that begin anew keep examples apart is up to the family (some do not hand them to the attention mask), to
    its layers (a recurrent one mixes) and to the attention's implementation. So a probe stands behind two different
    examples: its logits must not care which.

    Raises:
        PerftError: they do.
    """
    if not config.packing:
        return
    length, rows = 8, min(config.batch_size, 2)
    ids = torch.randint(
        base.config.get_text_config().vocab_size, (3, length), generator=torch.Generator().manual_seed(0)
    )
    was_training = base.training
    base.eval()

    def sway(position_ids: Tensor) -> Tensor:
        """How far the probe's logits move with what stands before it."""
        logits = [
            base(
                input_ids=torch.cat([before, ids[2]]).repeat(rows, 1).to(base.device),
                position_ids=position_ids.repeat(rows, 1).to(base.device),
                use_cache=False,
            ).logits[:, length:]
            for before in ids[:2]
        ]
        return (logits[0].float() - logits[1].float()).abs().max()

    leak, seen = sway(torch.arange(length).repeat(2)), sway(torch.arange(2 * length))
    base.train(was_training)
    if leak > 0.1 * seen:
        raise PerftError(
            f"packing: with {type(base).__name__} ({base.config.get_text_config()._attn_implementation} attention, batch_size "
            f"{config.batch_size}) the examples of a row would see each other; leave packing out"
        )


def _packed(data: Dataset, max_length: int) -> Dataset:
    from datasets import Dataset  # of the extra `train`

    rows = Dataset.from_list(list(pack(data, max_length)))
    print(f"packed: {len(data):,} examples in {len(rows):,} rows of up to {max_length} tokens", flush=True)
    return rows


def _tokenized(what: str, paths: Sequence[str], config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    data = tokenize_files(
        paths, tokenizer, max_length=config.max_length, loss_on=config.loss_on, columns=config.columns
    )
    tokens = sum(len(ids) for ids in data.dataset["input_ids"])
    cut = f", {data.num_truncated} cut at max_length={config.max_length}" if data.num_truncated else ""
    dropped = f", {data.num_dropped} left out (nothing to learn after the cut)" if data.num_dropped else ""
    print(f"{what} data: {len(data.dataset):,} examples, {tokens:,} tokens{cut}{dropped}", flush=True)
    return data.dataset


def trainer_arguments(config: TrainConfig, *, has_eval: bool) -> TrainingArguments:
    """The recipe as Trainer's arguments."""
    for package in config.report_to:
        if importlib.util.find_spec(package) is None:
            raise PerftError(f"report_to names {package}, which is not installed: pip install {package}")
    scheduler = "constant_with_warmup" if config.scheduler == "constant" else config.scheduler
    arguments = TrainingArguments(
        output_dir=str(Path(config.output) / CHECKPOINTS),
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs or DEFAULT_EPOCHS,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        warmup_steps=config.warmup,
        lr_scheduler_type=scheduler,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=config.mixed_precision == "bfloat16",
        fp16=config.mixed_precision == "float16",
        eval_strategy=_strategy(config.eval_steps) if has_eval else "no",
        eval_steps=config.eval_steps,
        prediction_loss_only=True,
        save_strategy=_strategy(config.save_steps),
        save_steps=config.save_steps or 500,
        save_total_limit=config.keep_checkpoints,
        load_best_model_at_end=config.keeps_best,
        metric_for_best_model="eval_loss" if config.keeps_best else None,
        greater_is_better=False if config.keeps_best else None,
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=list(config.report_to) or "none",
        **_checkpointing_arguments(config),
    )
    if arguments.n_gpu > 1:
        # one process with several GPUs would be DataParallel, whose threads share what the layers keep of a forward pass
        arguments._n_gpu = 1
    return arguments


def _checkpointing_arguments(config: TrainConfig) -> dict[str, Any]:
    if not config.gradient_checkpointing:
        return {}
    # Transformers renamed the pair; the reentrant kind gives the adapter's router loss no gradient
    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _strategy(steps: int | None) -> str:
    return "epoch" if steps is None else "steps"


def write_finished(
    layers: Iterable[PerftLayer],
    name: str,
    adapter: PerftConfig,
    config: TrainConfig,
    record: dict[str, Any],
    history: list[dict[str, float]],
) -> Adapter:
    """Writes adapter `name` of `layers` with its record and card into the output folder, and returns it as read back."""
    output, dtype = Path(config.output), getattr(torch, config.save_dtype)
    tensors: dict[int, LayerTensors] = {}
    block_names: dict[int, str] = {}
    for layer in layers:
        if name in layer.perft_down:
            gate = layer.perft_gate.get(name)
            tensors[layer.block.layer] = LayerTensors(
                down_MRD=_stored(layer.perft_down[name], dtype),
                up_MRD=_stored(layer.perft_up[name], dtype),
                gate_MD=None if gate is None else _stored(gate, dtype),
            )
            block_names[layer.block.layer] = layer.block.name
    finished_config = copy.copy(adapter)
    finished_config.inference_mode = True
    write_adapter(output, finished_config, tensors, block_names)
    finished = read_adapter(output)
    _write_record_and_card(output, finished, record, history)
    return finished


def _write_lora(model: PeftModel, config: TrainConfig, record: dict[str, Any], history: list[dict[str, float]]) -> None:
    """Writes a trained LoRA as PEFT does, with its record and card."""
    output, dtype = Path(config.output), getattr(torch, config.save_dtype)
    name = model.active_adapter
    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: _stored(tensor, dtype).contiguous() for key, tensor in found.items()}
    save_file(tensors, output / WEIGHTS_FILE, metadata={"format": "pt"})
    (output / WEIGHTS_FILE).chmod(0o644)  # as in `write_adapter`
    lora = copy.copy(model.peft_config[name])
    lora.inference_mode = True
    lora.save_pretrained(str(output))
    _write_record_and_card(output, read_lora(output), record, history)


def _write_record_and_card(
    output: Path, finished: Adapter | LoraAdapter, record: dict[str, Any], history: list[dict[str, float]]
) -> None:
    record = {
        **record,
        "outcome": {**record["outcome"], "digest": finished.digest, "metrics": metrics_of(history)},
    }
    write_record(output, record)
    (output / CARD_FILE).write_text(model_card(finished, record), encoding="utf-8")


def _stored(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parameter.detach().to("cpu", dtype)
