"""`perft train` on tiny models: it learns, leaves the base alone, resumes exactly, and says what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

import perft.train
from perft.adapter import read_adapter
from perft.config import PerftConfig
from perft.errors import BaseModelError, PerftError
from perft.layer import PerftLayer
from perft.recipe import TrainConfig, recipe_values
from perft.train import train

DDP = ("--multi_gpu",)
FSDP2 = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
WORDS = ["hello", "world", "experts", "router", "token", "adapter", "fox", "dog"]


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Eight short completions to learn by heart."""
    file = tmp_path / "train.jsonl"
    records = [{"prompt": word, "completion": f" {other}"} for word, other in zip(WORDS, WORDS[::-1], strict=True)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def recipe(tiny_base: Path, data_file: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": str(tiny_base),
            "data": (str(data_file),),
            "output": str(tmp_path / "out"),
            "loss_on": "answer",
            "learning_rate": 1e-2,
            "max_steps": 6,
            "batch_size": 4,
            "warmup": 0,
            "log_steps": 1,
            "save_steps": 3,
            "seed": 1,
            "dtype": "float32",
        }
        return TrainConfig(**{**values, **changes})

    return make


def log_of(output: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(output) / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "adapter",
    [
        PerftConfig(variant="R", num_experts=3, top_k=2, r=4),
        PerftConfig(variant="E", unit="parallel", r=4),
        PerftConfig(variant="D", num_experts=2, r=4),
        PerftConfig(variant="S", r=8, unit="parallel"),
    ],
    ids=lambda adapter: f"{adapter.variant}-{adapter.unit}",
)
def test_it_learns_and_writes_everything(adapter: PerftConfig, recipe: Callable[..., TrainConfig]) -> None:
    config = recipe(max_steps=40, batch_size=8, save_steps=40)
    finished = train(config, adapter)
    log = log_of(config.output)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    assert all(("router_aux_loss" in entry) == (adapter.variant == "R") for entry in log if "loss" in entry)
    output = Path(config.output)
    assert read_adapter(output).digest == finished.digest
    assert (output / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    run = json.loads((output / "perft_training.json").read_text())
    assert run["recipe"]["variant"] == adapter.variant
    assert run["outcome"]["digest"] == finished.digest
    assert adapter.base_model_name_or_path is None, "the caller's configuration is left as it was"


def test_the_written_adapter_is_what_was_trained(recipe: Callable[..., TrainConfig], tiny_base: Path) -> None:
    grabbed: dict[str, torch.Tensor] = {}

    class Grab(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"].eval()
            with torch.no_grad():
                grabbed["logits"] = model(torch.arange(10)[None]).logits

    config = recipe()
    train(config, PerftConfig(num_experts=3, top_k=2, r=4), callbacks=[Grab()])
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, config.output).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(10)[None]).logits, grabbed["logits"], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_stays_bit_identical(dtype: str, recipe: Callable[..., TrainConfig]) -> None:
    digests: list[str] = []

    class Digest(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            digests.append(base_digest(kwargs["model"]))
            adapter_dtypes = {p.dtype for p in kwargs["model"].parameters() if p.requires_grad}
            assert adapter_dtypes == {torch.float32}, "the adapter trains in float32 whatever the base is"

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            digests.append(base_digest(kwargs["model"]))

    train(recipe(dtype=dtype), PerftConfig(num_experts=3, top_k=2, r=4), callbacks=[Digest()])
    assert len(digests) == 2
    assert digests[0] == digests[1]


def base_digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".perft_" not in name:
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Cut(TrainerCallback):
    """Pulls the plug after a number of steps, when the checkpoint has been written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("adapter", [{"variant": "R", "num_experts": 3, "top_k": 2}, {"variant": "E"}])
def test_resume_continues_exactly(adapter: dict[str, Any], recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = PerftConfig(r=4, dropout=0.1, **adapter)
    whole = train(recipe(output=str(tmp_path / "whole")), config)
    cut = recipe(output=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train(cut, config, callbacks=[Cut(3)])
    assert not (tmp_path / "cut" / "adapter_config.json").exists(), "no adapter before the end"
    resumed = train(cut, config, resume=True)
    assert resumed.digest == whole.digest
    steps = [entry["step"] for entry in log_of(cut.output) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "cut" / "perft_training.json").read_text())["outcome"]["resumed"] is True


def test_resume_with_another_recipe_or_other_data_is_refused(
    recipe: Callable[..., TrainConfig], data_file: Path
) -> None:
    adapter = PerftConfig(r=2)
    with pytest.raises(PerftError, match="nothing to resume"):
        train(recipe(), adapter, resume=True)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), adapter, callbacks=[Cut(3)])
    with pytest.raises(PerftError, match=r"another recipe: learning_rate was 0\.01, is 0\.02"):
        train(recipe(learning_rate=0.02), adapter, resume=True)
    with pytest.raises(PerftError, match=r"another recipe: r was 2, is 3"):
        train(recipe(), PerftConfig(r=3), resume=True)
    data_file.write_text(data_file.read_text() * 2)
    with pytest.raises(PerftError, match="data files have changed"):
        train(recipe(), adapter, resume=True)


def test_an_output_folder_is_not_overwritten_unasked(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = recipe(max_steps=1)
    train(config, PerftConfig(r=2))
    with pytest.raises(PerftError, match="not empty; give --resume"):
        train(config, PerftConfig(r=2))
    assert train(config, PerftConfig(r=3), overwrite=True).config.r == 3
    with pytest.raises(PerftError, match="contradict"):
        train(config, PerftConfig(r=3), overwrite=True, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(PerftError, match="so it is not deleted"):
        train(recipe(output=str(tmp_path / "mine")), PerftConfig(r=2), overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_evaluation_is_the_language_models_loss(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with_router = recipe(eval_split=2, eval_steps=2)
    train(with_router, PerftConfig(num_experts=3, top_k=2, r=4, router_aux_loss_coef=100.0))
    entries = [entry for entry in log_of(with_router.output) if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    assert all(entry["eval_loss"] < 50 for entry in entries), "without the router's loss, which is about 200 here"
    first = next(entry for entry in log_of(with_router.output) if "loss" in entry)
    assert first["loss"] > 100 * first["router_aux_loss"]
    run = json.loads((tmp_path / "out" / "perft_training.json").read_text())
    assert (run["outcome"]["train_examples"], run["outcome"]["eval_examples"]) == (6, 2)


def test_gradient_accumulation_is_a_larger_batch(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    adapter = PerftConfig(num_experts=3, top_k=2, r=4, router_aux_loss_coef=0.0)
    whole = recipe(output=str(tmp_path / "whole"), batch_size=8, max_steps=2)
    parts = recipe(output=str(tmp_path / "parts"), batch_size=4, gradient_accumulation=2, max_steps=2)
    train(whole, adapter)
    train(parts, adapter)
    losses = [[entry["loss"] for entry in log_of(c.output) if "loss" in entry] for c in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    adapter = PerftConfig(num_experts=3, top_k=2, r=4)
    plain = recipe(output=str(tmp_path / "plain"), max_steps=3)
    saving = recipe(output=str(tmp_path / "saving"), max_steps=3, gradient_checkpointing=True)
    assert train(plain, adapter).digest == train(saving, adapter).digest


def test_the_adapter_can_be_stored_in_bfloat16(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe(save_dtype="bfloat16")
    finished = train(config, PerftConfig(num_experts=3, top_k=2, r=4))
    tensors = load_file(Path(config.output) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert finished.num_bytes == 2 * finished.num_parameters


def test_some_layers_only(recipe: Callable[..., TrainConfig]) -> None:
    assert list(train(recipe(), PerftConfig(variant="S", r=2, layers_to_transform=[1])).layers) == [1]


def test_a_base_of_many_layers(
    recipe: Callable[..., TrainConfig], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """PEFT treats twenty or more adapted modules differently from fewer."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "deep")
    tiny_tokenizer.save_pretrained(tmp_path / "deep")
    finished = train(recipe(model=str(tmp_path / "deep"), max_steps=1), PerftConfig(r=2))
    assert list(finished.layers) == list(range(24))


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                layer = next(m for m in kwargs["model"].modules() if isinstance(m, PerftLayer))
                layer.perft_up["default"].data.fill_(float("nan"))

    with pytest.raises(PerftError, match="the loss became nan by step 3; lower learning_rate"):
        train(recipe(), PerftConfig(r=2), callbacks=[Poison()])
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": ("nothing.jsonl",)}, PerftError, "data file not found: nothing.jsonl"),
        ({"eval_data": ("nothing.jsonl",)}, PerftError, "data file not found: nothing.jsonl"),
        ({"model": "/no/such/base"}, BaseModelError, "no tokenizer for the base model '/no/such/base'"),
        ({"eval_split": 8}, PerftError, "eval_split=8 does not divide 8 examples"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    changes: dict[str, Any],
    error: type[PerftError],
    message: str,
    recipe: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        train(recipe(**changes), PerftConfig(r=2))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_not_fit_the_base_is_refused(recipe: Callable[..., TrainConfig]) -> None:
    with pytest.raises(PerftError, match=r"layers without an MoE block: \[9\]"):
        train(recipe(), PerftConfig(layers_to_transform=[9]))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, recipe: Callable[..., TrainConfig]) -> None:
    monkeypatch.setattr(perft.train, "EXTRA_PACKAGES", ("datasets", "no_such_package"))
    with pytest.raises(PerftError, match=r'training needs no_such_package: pip install "perft-serve\[train\]"'):
        train(recipe(), PerftConfig(r=2))


def test_the_plot_has_a_sensible_size(tmp_path: Path) -> None:
    history = [{"step": step, "loss": 2 / step} for step in range(1, 50)] + [{"step": 49, "eval_loss": 0.5}]
    perft.train.plot_losses(history, tmp_path / "loss.png")
    data = (tmp_path / "loss.png").read_bytes()
    assert struct.unpack(">II", data[16:24]) == (640, 360)
    assert len(data) < 60_000


def test_every_setting_reaches_the_trainer(recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that is added must change something."""
    handled_elsewhere = {
        *("model", "data", "eval_data", "eval_split", "loss_on", "max_length", "dtype", "save_dtype"),
        *("columns", "streaming", "shuffle_buffer", "packing", "early_stopping"),
    }
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    config = recipe(max_steps=None, gradient_checkpointing=True)
    changes: dict[str, Any] = {
        "output": "elsewhere",
        "eval_steps": 7,
        "save_steps": 11,
        "keep_checkpoints": 5,
        "log_steps": 3,
        "learning_rate": 0.5,
        "epochs": 2.0,
        "max_steps": 9,
        "batch_size": 3,
        "gradient_accumulation": 2,
        "warmup": 4,
        "scheduler": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": 3.0,
        "seed": 17,
        "gradient_checkpointing": False,
        "mixed_precision": "bfloat16",
        "keep_best": True,
        "report_to": ("tensorboard",),
    }
    assert changes.keys() | handled_elsewhere == {field.name for field in dataclasses.fields(TrainConfig)}
    before = perft.train.trainer_arguments(config, has_eval=True).to_dict()
    for name, value in changes.items():
        changed: dict[str, Any] = {name: value}
        if name == "eval_steps":
            changed["eval_split"] = 0.5
        if name == "keep_best":
            changed |= {"eval_split": 0.5, "eval_steps": config.save_steps}
        after = perft.train.trainer_arguments(dataclasses.replace(config, **changed), has_eval=True)
        assert after.to_dict() != before, name


def test_packing_learns_and_resumes_exactly(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"packing": True, "max_length": 24, "batch_size": 1}
    adapter = PerftConfig(num_experts=3, top_k=2, r=4)
    whole = train(recipe(output=str(tmp_path / "whole"), **changes), adapter)
    cut = recipe(output=str(tmp_path / "cut"), **changes)
    with pytest.raises(KeyboardInterrupt):
        train(cut, adapter, callbacks=[Cut(3)])
    assert train(cut, adapter, resume=True).digest == whole.digest
    found = [entry["loss"] for entry in log_of(cut.output) if "loss" in entry]
    assert found[-1] < found[0]


@pytest.mark.parametrize("packing", [False, True])
def test_streaming_resumes_exactly(packing: bool, recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Over the end of the data too: eight examples, 6 steps of 4."""
    changes: dict[str, Any] = {"streaming": True, "shuffle_buffer": 3, "packing": packing, "max_length": 40}
    adapter = PerftConfig(variant="S", r=4)
    whole = train(recipe(output=str(tmp_path / "whole"), **changes), adapter)
    cut = recipe(output=str(tmp_path / "cut"), **changes)
    with pytest.raises(KeyboardInterrupt):
        train(cut, adapter, callbacks=[Cut(3)])
    assert train(cut, adapter, resume=True).digest == whole.digest
    assert json.loads((tmp_path / "cut" / "perft_training.json").read_text())["outcome"]["train_examples"] is None


def test_early_stopping_keeps_the_best(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe(learning_rate=0.5, max_steps=40, eval_split=2, eval_steps=1, save_steps=1, early_stopping=3)
    train(config, PerftConfig(r=4))
    evaluations = [entry["eval_loss"] for entry in log_of(config.output) if "eval_loss" in entry]
    best = evaluations.index(min(evaluations))
    assert len(evaluations) == best + 1 + 3 < 40
    at_best = load_file(Path(config.output) / f"checkpoints/checkpoint-{best + 1}/adapter_model.safetensors")
    finished = load_file(Path(config.output) / "adapter_model.safetensors")
    assert at_best.keys() == finished.keys()
    assert all(torch.equal(at_best[name], finished[name]) for name in finished)


def test_mixed_precision_is_autocast(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            head = kwargs["model"].get_base_model().lm_head
            head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    adapter = PerftConfig(num_experts=3, top_k=2, r=4)
    train(recipe(mixed_precision="bfloat16", output=str(tmp_path / "mixed")), adapter, callbacks=[Look()])
    train(recipe(output=str(tmp_path / "plain")), adapter, callbacks=[Look()])
    assert seen == [torch.bfloat16] * 6 + [torch.float32] * 6
    losses = [[entry["loss"] for entry in log_of(tmp_path / n) if "loss" in entry] for n in ("mixed", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_the_routers_health_is_logged(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    class Collapse(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                for module in kwargs["model"].modules():
                    if isinstance(module, PerftLayer):  # equal logits: the first adapter expert wins every time
                        module.perft_gate["default"].data.zero_()

    train(recipe(learning_rate=1e-12), PerftConfig(num_experts=3, top_k=1, r=4), callbacks=[Collapse()])
    entries = {entry["step"]: entry for entry in log_of(tmp_path / "out") if "loss" in entry}
    assert 1 <= entries[1]["router_peak_load"] <= 3
    assert 0.9 < entries[1]["router_entropy"] <= 1
    assert entries[4]["router_dead"] == 2 * 2, "two of three adapter experts in each of two layers"
    assert entries[4]["router_peak_load"] == pytest.approx(3)
    train(recipe(output=str(tmp_path / "single")), PerftConfig(variant="S", r=2))
    assert not any("router_dead" in entry for entry in log_of(tmp_path / "single"))


def test_a_logger_that_is_not_installed_is_named(
    recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(PerftError, match="report_to names wandb, which is not installed: pip install wandb"):
        train(recipe(report_to=("wandb",)), PerftConfig(r=2))


def test_streaming_a_hub_data_set_needs_its_commit(recipe: Callable[..., TrainConfig]) -> None:
    with pytest.raises(PerftError, match="name the commit"):
        train(recipe(data=("acme/tickets:train",), streaming=True), PerftConfig(r=2))


@pytest.mark.parametrize("way", [DDP, FSDP2], ids=["DDP", "FSDP2"])
def test_two_processes_have_the_loss_curve_of_one(
    way: tuple[str, ...], recipe: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """`accelerate launch` on two gloo processes with half the batch each, accumulating, equals one process; and it resumes
    to the very bits of no interruption."""
    adapter = PerftConfig(num_experts=3, top_k=2, r=4, router_aux_loss_coef=0.0)
    changes: dict[str, Any] = {"eval_split": 2, "eval_steps": 3, "max_steps": 5, "gradient_accumulation": 2}
    alone = recipe(output=str(tmp_path / "alone"), batch_size=2, **changes)
    train(alone, adapter)
    shared = recipe(output=str(tmp_path / "shared"), batch_size=1, **changes)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_values(shared, adapter)))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", *way, "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *("--module", "perft.cli", "train", "--config", str(tmp_path / "recipe.yaml")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def launch(*more: str) -> dict[str, torch.Tensor]:
        done = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=110, check=False
        )
        assert done.returncode == 0, done.stderr
        return load_file(tmp_path / "shared" / "adapter_model.safetensors")

    finished = launch()
    record = json.loads((tmp_path / "shared" / "perft_training.json").read_text())
    assert record["outcome"]["processes"] == 2
    for key in ("loss", "eval_loss", "grad_norm"):
        curves = [[entry[key] for entry in log_of(tmp_path / n) if key in entry] for n in ("alone", "shared")]
        assert len(curves[0]) == len(curves[1]) > 0
        assert curves[0] == pytest.approx(curves[1], rel=1e-4), key
    for name, tensor in load_file(tmp_path / "alone" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, finished[name], atol=1e-5, rtol=0)
    shutil.rmtree(tmp_path / "shared" / "checkpoints" / "checkpoint-5")
    (tmp_path / "shared" / "adapter_model.safetensors").unlink()
    resumed = launch("--resume")
    assert json.loads((tmp_path / "shared" / "perft_training.json").read_text())["outcome"]["resumed"]
    assert all(torch.equal(resumed[name], finished[name]) for name in finished)


def test_one_process_trains_on_one_gpu(recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several are for `accelerate launch`; Trainer alone would make threads of them (DataParallel)."""
    setup = TrainingArguments.__post_init__

    def on_four_gpus(self: Any) -> None:
        setup(self)
        assert self.device is not None
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_four_gpus)
    arguments = perft.train.trainer_arguments(recipe(), has_eval=False)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 4
