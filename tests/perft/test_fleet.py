"""`perft train-many`: each adapter comes out as if trained alone, and none depends on another's fate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast

import perft.fleet
import perft.layer
from perft.adapter import read_adapter
from perft.cli import main
from perft.config import PerftConfig
from perft.errors import PerftError
from perft.fleet import Member, last_checkpoint, train_many
from perft.recipe import TrainConfig
from perft.train import train

WORDS = ["hello", "world", "experts", "router", "token", "adapter", "fox", "dog", "brown", "quick", "lazy", "jumps"]
Recipe = tuple[str, TrainConfig, PerftConfig]


def write_data(path: Path, count: int, repeats: int) -> str:
    records = [
        {"prompt": " ".join([WORDS[i % 12]] * (1 + i % repeats)), "completion": f" {WORDS[(i * 5) % 12]}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def recipes(tiny_base: Path, tmp_path: Path) -> Callable[..., list[Recipe]]:
    """Recipes that differ in everything a fleet allows to differ; `folder` is where they write."""
    short, long = write_data(tmp_path / "short.jsonl", 11, 2), write_data(tmp_path / "long.jsonl", 7, 9)
    common: dict[str, Any] = {"model": str(tiny_base), "dtype": "float32", "log_steps": 1, "warmup": 0}
    kinds: dict[str, tuple[dict[str, Any], PerftConfig]] = {
        "R": (
            {"data": (short,), "max_steps": 7, "learning_rate": 1e-2, "batch_size": 4, "seed": 1, "eval_split": 3},
            PerftConfig(num_experts=3, top_k=2, r=4),
        ),
        "E": (
            {
                "data": (long,),
                "max_steps": 4,
                "learning_rate": 3e-3,
                "batch_size": 2,
                "scheduler": "cosine",
                "warmup": 2,
            },
            PerftConfig(variant="E", unit="parallel", r=3),
        ),
        "D": (
            {"data": (long, short), "epochs": 1.5, "batch_size": 3, "gradient_accumulation": 2, "learning_rate": 5e-3},
            PerftConfig(variant="D", num_experts=2, r=5, layers_to_transform=[1]),
        ),
        "S": (
            {
                "data": (short,),
                "max_steps": 5,
                "weight_decay": 0.1,
                "max_grad_norm": 0.05,
                "loss_on": "answer",
                "packing": True,
                "max_length": 40,
                "batch_size": 2,
                "learning_rate": 1e-2,
                "seed": 9,
            },
            PerftConfig(variant="S", unit="parallel", r=6),
        ),
        "R-rank": (
            {"data": (short,), "max_steps": 3, "batch_size": 5, "learning_rate": 2e-2, "scheduler": "constant"},
            PerftConfig(num_experts=4, top_k=1, r=2, combine="base-rank", dropout=0.2, unit="parallel"),
        ),
        "R-drop": (
            {
                "data": (long,),
                "max_steps": 6,
                "batch_size": 3,
                "learning_rate": 1e-2,
                "seed": 3,
                "eval_split": 2,
                "eval_steps": 2,
                "save_steps": 2,
                "keep_best": True,
            },
            PerftConfig(num_experts=4, top_k=2, r=2, dropout=0.1, init="official"),
        ),
    }

    def make(folder: str, names: Sequence[str] = tuple(kinds), **changes: Any) -> list[Recipe]:
        return [
            (
                name,
                TrainConfig(**{**common, **kinds[name][0], "output": str(tmp_path / folder / name), **changes}),
                kinds[name][1],
            )
            for name in names
        ]

    return make


def tensors_of(folder: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(Path(folder) / "adapter_model.safetensors")
    return tensors


def assert_equal(one: str, other: str, tolerance: float) -> None:
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    assert {
        name: (left[name] - right[name]).abs().max().item()
        for name in left
        if not left[name].allclose(right[name], atol=tolerance, rtol=0)
    } == {}


def losses(folder: str, key: str = "loss") -> list[tuple[int, float]]:
    log = [json.loads(line) for line in (Path(folder) / "training_log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry[key]) for entry in log if key in entry]


def test_each_adapter_equals_training_it_alone(recipes: Callable[..., list[Recipe]]) -> None:
    """Unlike variants, unit kinds, ranks, data, lengths, batches, rates, schedules, steps, dropout, packing, evaluation."""
    alone, together = recipes("alone"), recipes("together")
    for _, config, adapter in alone:
        train(config, adapter)
    members = train_many(together)
    assert [(member.label, member.state) for member in members] == [(label, "done") for label, _, _ in together]
    for (label, one, adapter), (_, other, _) in zip(alone, together, strict=True):
        assert_equal(one.output, other.output, 1e-5)
        assert [step for step, _ in losses(one.output)] == [step for step, _ in losses(other.output)], label
        for key in (
            "loss",
            "eval_loss",
            "learning_rate",
            *(["router_aux_loss", "router_entropy"] if adapter.variant == "R" else []),
        ):
            expected, found = losses(one.output, key), losses(other.output, key)
            assert [step for step, _ in found] == [step for step, _ in expected], (label, key)
            assert [v for _, v in found] == pytest.approx([v for _, v in expected], abs=1e-4), (label, key)
        assert any(tensor.abs().max() > 1e-3 for name, tensor in tensors_of(other.output).items() if "up" in name)
        record = json.loads((Path(other.output) / "perft_training.json").read_text())
        assert record["outcome"]["fleet"] is True
        assert record["outcome"]["digest"] == read_adapter(other.output).digest


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_other_families(
    family: str, recipes: Callable[..., list[Recipe]], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(family)
    model.resize_token_embeddings(len(tiny_tokenizer))
    model.save_pretrained(tmp_path / family)
    tiny_tokenizer.save_pretrained(tmp_path / family)
    names = ["R", "E", "S"]
    changes = {"model": str(tmp_path / family), "max_steps": 3, "epochs": None, "learning_rate": 3e-3}
    if family == "gpt_oss":  # cannot be packed
        changes["packing"] = False
    for _, config, adapter in recipes("alone", names, **changes):
        train(config, adapter)
    train_many(recipes("together", names, **changes))
    for name in names:
        assert_equal(str(tmp_path / "alone" / name), str(tmp_path / "together" / name), 1e-5)


@pytest.mark.parametrize("options", [{"at_once": 2}, {"tokens_per_pass": 1}])
def test_how_the_work_is_divided_changes_nothing(options: dict[str, Any], recipes: Callable[..., list[Recipe]]) -> None:
    train_many(recipes("all"))
    seen: list[int] = []

    def look(members: Sequence[Member]) -> None:
        seen.append(sum(member.state == "training" for member in members))

    train_many(recipes("parts"), progress=look, **options)
    for (_, one, _), (_, other, _) in zip(recipes("all"), recipes("parts"), strict=True):
        assert_equal(one.output, other.output, 1e-5)
    assert max(seen) <= options.get("at_once", 6)


def test_one_that_fails_stops_no_other(recipes: Callable[..., list[Recipe]], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["R", "E", "D", "S"]
    train_many(recipes("sound", ["R", "D", "S"]))
    take_step = perft.fleet._Trainee.take_step

    def poison(self: Any) -> None:
        take_step(self)
        if self.member.label == "E" and self.member.step == 2:
            for layer in self._fleet.layers:
                layer.perft_up[self.name].data.fill_(float("nan"))

    monkeypatch.setattr(perft.fleet._Trainee, "take_step", poison)
    members = {member.label: member for member in train_many(recipes("mixed", names))}
    assert {label: member.state for label, member in members.items()} == {
        "R": "done",
        "E": "failed",
        "D": "done",
        "S": "done",
    }
    assert "the loss became nan by step 3" in members["E"].reason
    for (label, one, _), (_, other, _) in zip(recipes("sound", names), recipes("mixed", names), strict=True):
        if label == "E":
            assert not (Path(other.output) / "adapter_config.json").exists()
        else:
            assert_equal(one.output, other.output, 1e-5)


def test_each_is_written_as_soon_as_it_is_done_and_leaves_the_base(recipes: Callable[..., list[Recipe]]) -> None:
    written: dict[str, int] = {}
    held: list[int] = []
    rounds = 0

    def look(members: Sequence[Member]) -> None:
        nonlocal rounds
        for member in members:
            if (Path(member.config.output) / "adapter_config.json").exists():
                written.setdefault(member.label, rounds)
        rounds += 1

    run = perft.fleet.Fleet.run

    class Watched(perft.fleet.Fleet):
        def run(self, *args: Any) -> None:
            run(self, *args)
            held.extend(len(layer.perft_config) for layer in self.layers)

    perft.fleet.Fleet, original = Watched, perft.fleet.Fleet  # type: ignore[misc]
    try:
        train_many(recipes("out", ["R", "E", "R-rank"]), progress=look)
    finally:
        perft.fleet.Fleet = original  # type: ignore[misc]
    assert written == {"R-rank": 3, "E": 4, "R": 7}
    assert held == [0, 0]


def test_resume_after_an_interruption_is_bit_identical(recipes: Callable[..., list[Recipe]]) -> None:
    names, changes = ["R", "E", "R-drop"], {"save_steps": 2, "eval_steps": None, "keep_best": False}
    changes |= {"keep_best": False}
    whole, cut = recipes("whole", names, **changes), recipes("cut", names, **changes)
    train_many(whole)

    def pull_the_plug(members: Sequence[Member]) -> None:
        if members[0].step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_many(cut, progress=pull_the_plug)
    assert [last_checkpoint(Path(config.output)).name for _, config, _ in cut] == ["fleet-2"] * 3  # type: ignore[union-attr]
    members = train_many(cut, resume=True)
    assert [member.state for member in members] == ["done"] * 3
    for (_, one, _), (_, other, _) in zip(whole, cut, strict=True):
        assert_equal(one.output, other.output, 0.0)
        assert losses(one.output) == losses(other.output)
    again = train_many(cut, resume=True)
    assert [member.reason for member in again] == ["was done before"] * 3
    with pytest.raises(PerftError, match=r"R: cannot resume .* learning_rate was 0\.01, is 0\.5"):
        train_many(recipes("cut", names, **changes, learning_rate=0.5), resume=True)


def test_early_stopping_is_each_ones_own(recipes: Callable[..., list[Recipe]]) -> None:
    (one,) = recipes("early", ["R"], learning_rate=0.5, early_stopping=2, eval_steps=1, save_steps=1, max_steps=30)
    (alone,) = recipes("alone", ["R"], learning_rate=0.5, early_stopping=2, eval_steps=1, save_steps=1, max_steps=30)
    other = recipes("early", ["E"])[0]
    members = train_many([one, other])
    assert members[0].step < 30
    assert "no better eval_loss in 2 evaluations" in members[0].reason
    assert members[1].step == 4
    train(alone[1], alone[2])
    found, expected = losses(one[1].output, "eval_loss"), losses(alone[1].output, "eval_loss")
    assert [step for step, _ in found] == [step for step, _ in expected]
    # at such a rate rounding grows from step to step
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-2)


def test_gradient_checkpointing_changes_nothing(recipes: Callable[..., list[Recipe]]) -> None:
    names = ["R", "E", "S"]
    train_many(recipes("plain", names))
    train_many(recipes("saving", names, gradient_checkpointing=True))
    for (_, one, _), (_, other, _) in zip(recipes("plain", names), recipes("saving", names), strict=True):
        assert_equal(one.output, other.output, 1e-6)


def test_a_mixed_pass_is_one_call_of_the_op(
    recipes: Callable[..., list[Recipe]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    add_units = perft.layer._add_units

    def count(y_TD: Any, h_TD: Any, ids_TX: Any, weights_TX: Any, rows: Any, table: Any, mask_TXR: Any) -> Any:
        calls.append(table.rank_E.unique().numel())
        return add_units(y_TD, h_TD, ids_TX, weights_TX, rows, table, mask_TXR)

    monkeypatch.setattr(perft.layer, "_add_units", count)
    train_many(recipes("out", ["R", "E"], max_steps=1, eval_split=None))
    assert calls == [2, 2], "one call a layer, with both ranks in it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, r"dtype is 'float32' in R, 'bfloat16' in E"),
        ({"streaming": True}, r"E: streaming is for `perft train`"),
        ({"data": ("nothing.jsonl",)}, r"E: data file not found: nothing\.jsonl"),
        ({"report_to": ("tensorboard",)}, r"E: report_to is for `perft train`"),
    ],
)
def test_a_bad_recipe_stops_all_before_anything_is_written(
    changes: dict[str, Any], message: str, recipes: Callable[..., list[Recipe]], tmp_path: Path
) -> None:
    with pytest.raises(PerftError, match=message):
        train_many([*recipes("out", ["R"]), *recipes("out", ["E"], **changes)])
    assert not (tmp_path / "out").exists()


def test_other_refusals(recipes: Callable[..., list[Recipe]], tmp_path: Path) -> None:
    with pytest.raises(PerftError, match="R and R write to one folder"):
        train_many(recipes("out", ["R"]) * 2)
    with pytest.raises(PerftError, match="R-drop: with gradient_checkpointing"):
        train_many(recipes("out", ["R-drop"], gradient_checkpointing=True))
    (tmp_path / "out" / "R").mkdir(parents=True)
    (tmp_path / "out" / "R" / "thesis.tex").write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(PerftError, match="R: output .* (is not empty|holds no earlier run)"):
            train_many(recipes("out", ["R", "E"]), **options)  # type: ignore[arg-type]
    assert (tmp_path / "out" / "R" / "thesis.tex").exists()


def test_a_base_that_draws_at_random_is_refused(
    recipes: Callable[..., list[Recipe]], tiny_base: Path, tmp_path: Path
) -> None:
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    for file in tiny_base.iterdir():
        (noisy / file.name).write_bytes(file.read_bytes())
    config = json.loads((noisy / "config.json").read_text())
    (noisy / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    with pytest.raises(PerftError, match=r"attention_dropout=0\.1"):
        train_many(recipes("out", ["R"], model=str(noisy)))


def test_the_command(
    recipes: Callable[..., list[Recipe]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, rate in (("good", "1e-3"), ("bad", "1e30")):
        _, config, _ = recipes("cli", ["R"])[0]
        (tmp_path / f"{name}.yaml").write_text(
            f"model: {config.model}\ndata: {config.data[0]}\noutput: {tmp_path / 'cli' / name}\nmax_steps: 4\nr: 2\n"
            f"batch_size: 4\nwarmup: 0\nlearning_rate: {rate}\nmax_grad_norm: 0\ndtype: float32\nlog_steps: 1\n"
        )
    paths = [str(tmp_path / f"{name}.yaml") for name in ("good", "bad")]
    assert main(["train-many", *paths]) == 1
    out = capsys.readouterr().out
    assert "good.yaml  done  step 4/4" in out
    assert "bad.yaml  failed" in out
    assert read_adapter(tmp_path / "cli" / "good").config.r == 2
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich can tell
    assert main(["train-many", paths[0], "--overwrite"]) == 0
    out = capsys.readouterr().out
    assert "training" in out, "the table while it runs"
    assert "4/4" in out
    assert main(["train-many", paths[0]]) == 2
