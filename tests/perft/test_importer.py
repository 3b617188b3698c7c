"""Official checkpoints become adapters that compute what the authors' code computed; everything else is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from perft.errors import AdapterError, BaseModelError
from perft.importer import import_checkpoint

ORACLE = Path(__file__).parents[1] / "oracle"
CASES = sorted(str(folder.relative_to(ORACLE)) for folder in ORACLE.glob("*/*-*") if (folder / "config.json").is_file())


def base_of(case: str) -> Path:
    return ORACLE / case.split("/", maxsplit=1)[0] / "base"


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Path]:
    """A copy of an oracle case with changed config fields or tensors."""

    def make(
        case: str, fields: dict[str, Any] | None = None, change: Callable[[dict[str, Tensor]], None] | None = None
    ) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(ORACLE / case, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **(fields or {})}))
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def test_all_cases_are_there() -> None:
    assert len(CASES) == 18


@pytest.mark.parametrize("case", CASES)
def test_imported_adapter_gives_the_authors_logits(case: str, tmp_path: Path) -> None:
    import_checkpoint(ORACLE / case, tmp_path / "adapter", base=base_of(case))
    base = AutoModelForCausalLM.from_pretrained(base_of(case), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    io = load_file(ORACLE / case / "io.safetensors")
    with torch.no_grad():
        logits = model(io["input_ids"]).logits
    torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_every_number_of_the_file_is_kept(case: str, tmp_path: Path) -> None:
    adapter = import_checkpoint(ORACLE / case, tmp_path / "adapter", base=base_of(case))
    theirs = load_file(ORACLE / case / "model.safetensors")
    assert adapter.num_parameters == sum(tensor.numel() for tensor in theirs.values())
    ours = [tensor for layer in adapter.layers.values() for tensor in layer.named().values()]
    assert sum(float(t.double().sum()) for t in ours) == pytest.approx(
        sum(float(t.double().sum()) for t in theirs.values())
    )


def test_up_is_stored_as_rank_rows(tmp_path: Path) -> None:
    adapter = import_checkpoint(ORACLE / "mixtral/R4-2-lora", tmp_path / "a", base=ORACLE / "mixtral/base")
    theirs = load_file(ORACLE / "mixtral/R4-2-lora/model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.shared_routing_adapter.2.unit"
    torch.testing.assert_close(adapter.layers[1].up_MRD[2], theirs[f"{prefix}.lora_B.weight"].T, rtol=0, atol=0)
    torch.testing.assert_close(adapter.layers[1].down_MRD[2], theirs[f"{prefix}.lora_A.weight"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "combine", "expected"),
    [
        ("olmoe/R4-2-lora", None, ("base-rank", None)),
        ("olmoe/R4-2-lora", "own", ("own", False)),
        ("mixtral/R4-2-lora", None, ("own", True)),
        ("mixtral/R4-2-lora", "base-rank", ("base-rank", None)),
    ],
)
def test_combine_follows_the_familys_released_code_unless_told(
    case: str, combine: Any, expected: tuple[str, bool | None], tmp_path: Path
) -> None:
    config = import_checkpoint(ORACLE / case, tmp_path / "a", base=base_of(case), combine=combine).config
    assert (config.combine, config.norm_topk) == expected


def test_combine_is_refused_where_it_has_no_meaning(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="variant E"):
        import_checkpoint(ORACLE / "olmoe/E-lora", tmp_path / "a", base=ORACLE / "olmoe/base", combine="own")


def test_config_says_what_the_checkpoint_said(tmp_path: Path) -> None:
    config = import_checkpoint(ORACLE / "olmoe/R6-1-lora", tmp_path / "a", base=ORACLE / "olmoe/base").config
    theirs = json.loads((ORACLE / "olmoe/R6-1-lora/config.json").read_text())
    args = theirs["shared_routing_adapter_args"]
    assert (config.r, config.alpha, config.dropout) == (args["r"], args["lora_alpha"], args["lora_dropout"])
    assert (config.num_experts, config.top_k, config.router_aux_loss_coef) == (6, 1, 0.01)
    assert config.layers_to_transform is None


def test_a_checkpoint_of_some_layers_becomes_an_adapter_of_these(broken: Callable[..., Path], tmp_path: Path) -> None:
    def drop_layer_0(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            del tensors[name]

    source = broken("mixtral/R4-2-lora", change=drop_layer_0)
    adapter = import_checkpoint(source, tmp_path / "a", base=ORACLE / "mixtral/base")
    assert adapter.config.layers_to_transform == [1]
    assert list(adapter.layers) == [1]


S = "model.layers.0.mlp.shared_adapter.0.unit"
R = "model.layers.1.mlp.shared_routing_adapter"


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("olmoe/S-lora", lambda t: t.pop(f"{S}.lora_B.weight"), r"layer 0 has lora_B of units none"),
        ("olmoe/R4-2-lora", lambda t: t.pop(f"{R}.2.unit.lora_A.weight"), r"missing \[2\]"),
        ("olmoe/R4-2-lora", lambda t: t.pop(f"{R}_gate.weight"), r"layer 1 has no shared_routing_adapter_gate"),
        ("olmoe/S-lora", lambda t: t.update({"model.norm.weight": torch.ones(64)}), r"1 tensors do not.*model\.norm"),
        (
            "olmoe/S-lora",
            lambda t: t.update({f"{S}.adapter_w1.weight": torch.ones(5, 64)}),
            r"do not belong.*adapter_w1",
        ),
        ("olmoe/S-lora", lambda t: t.update({f"{R}_gate.weight": torch.ones(4, 64)}), r"do not belong.*_gate"),
        ("olmoe/S-lora", lambda t: t.update({f"{S}.lora_A.weight": torch.ones(4, 64)}), r"shape \[4, 64\].*\[5, 64\]"),
        ("olmoe/S-lora", lambda t: t[f"{S}.lora_A.weight"].fill_(float("nan")), r"NaN"),
        (
            "olmoe/S-lora",
            lambda t: t.update({f"{S}.lora_A.weight": torch.ones(5, 64, dtype=torch.int32)}),
            r"dtype torch\.int32",
        ),
        (
            "olmoe/S-lora",
            lambda t: t.update({S.replace("0.mlp", "7.mlp") + ".lora_A.weight": torch.ones(5, 64)}),
            r"layer 7; the base has MoE blocks in \[0, 1\]",
        ),
        ("olmoe/S-lora", lambda t: [t.pop(name) for name in list(t)], r"no adapter tensors"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(
    case: str,
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    broken: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(AdapterError, match=message):
        import_checkpoint(broken(case, change=change), tmp_path / "out", base=base_of(case))
    assert not (tmp_path / "out").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"], "no half-made folder stays behind"


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        (
            "olmoe/E-lora",
            {"shared_adapter": True},
            r"shared_adapter with embedded_routing_adapter \(variants S/D and E\)",
        ),
        ("olmoe/S-lora", {"shared_adapter": False}, r"none of .* is true"),
        ("olmoe/S-lora", {"model_type": "llama"}, r"model_type is 'llama'"),
        ("olmoe/S-lora", {"shared_adapter_type": "Prompt"}, r"shared_adapter_type is 'Prompt'"),
        ("olmoe/S-lora", {"shared_adapter_num": 0}, r"shared_adapter_num must be a positive integer, got 0"),
        ("olmoe/S-lora", {"shared_adapter_args": {"r": 5}}, r"must hold exactly lora_alpha, lora_dropout, r"),
        ("olmoe/S-parallel", {"shared_adapter_args": {"hidden_dim": 5, "hidden_act": "gelu", "dropout": 0}}, r"'gelu'"),
        ("olmoe/S-lora", {"hidden_size": 128}, r"hidden size \(D\) is 128 in the checkpoint and 64 in the base"),
        ("olmoe/S-lora", {"num_experts": 64}, r"base experts \(N\) is 64 in the checkpoint and 8 in the base"),
        ("olmoe/S-lora", {"num_hidden_layers": 16}, r"number of layers is 16 in the checkpoint and 2 in the base"),
        ("olmoe/S-lora", {"num_experts_per_tok": 8}, r"per token \(K\) is 8 in the checkpoint and 4 in the base"),
        ("olmoe/S-lora", {"norm_topk_prob": True}, r"norm_topk_prob is True in the checkpoint and False in the base"),
        ("olmoe/R4-2-lora", {"shared_routing_adapter_num_experts_per_tok": 5}, r"top_k=5 is more than num_experts=4"),
    ],
)
def test_a_wrong_config_is_refused_by_name(
    case: str, fields: dict[str, Any], message: str, broken: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        import_checkpoint(broken(case, fields=fields), tmp_path / "out", base=base_of(case))


def test_another_family_of_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'olmoe', but this base is 'mixtral'"):
        import_checkpoint(ORACLE / "olmoe/S-lora", tmp_path / "out", base=ORACLE / "mixtral/base")


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no base model at"):
        import_checkpoint(ORACLE / "olmoe/S-lora", tmp_path / "out", base=tmp_path / "nothing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_read(name: str, broken: Callable[..., Path], tmp_path: Path) -> None:
    source = broken("olmoe/S-lora")
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(AdapterError, match=f"{name}.*pickle file can run code"):
        import_checkpoint(source, tmp_path / "out", base=ORACLE / "olmoe/base")


def test_a_truncated_file_is_refused(broken: Callable[..., Path], tmp_path: Path) -> None:
    source = broken("olmoe/S-lora")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        import_checkpoint(source, tmp_path / "out", base=ORACLE / "olmoe/base")


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        import_checkpoint(tmp_path / "nothing", tmp_path / "out", base=ORACLE / "olmoe/base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"has no config\.json"):
        import_checkpoint(tmp_path / "empty", tmp_path / "out", base=ORACLE / "olmoe/base")
    import_checkpoint(ORACLE / "olmoe/S-lora", tmp_path / "ours", base=ORACLE / "olmoe/base")
    with pytest.raises(AdapterError, match="is an adapter already"):
        import_checkpoint(tmp_path / "ours", tmp_path / "out", base=ORACLE / "olmoe/base")


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(AdapterError, match="not empty"):
        import_checkpoint(ORACLE / "olmoe/S-lora", tmp_path / "out", base=ORACLE / "olmoe/base")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
