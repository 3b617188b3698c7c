"""The base on a GPU as it is captured, interpreted on a CPU: a few operations a layer, and the tokens of Transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driving import request, run
from frozen_step import FrozenCapture
from tiny import FAMILIES, random_adapters, tiny_model
from transformers import PreTrainedModel

from perft.errors import BaseModelError
from perft.moe import find_moe_blocks
from perft_kernels import gpu
from perft_kernels.fusion import FusedStep, fuse
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.gpu_base import StoredLinear, use_gpu_ops

# What a layer of these is, once neighbours are put together.
ATTENTION = ["linears", "rotate_and_write", "paged_attention", "aten::linear", "add_rms_norm"]
EXPERTS = ["aten::linear", "router_top_k", "stored_experts", "add_rms_norm"]
WHOLE = {"olmoe", "mixtral", "qwen3_moe", "gpt_oss"}
# The others, whose models compute more: the most operations of a layer.
MOST = {"qwen2_moe": 16, "granitemoe": 12, "deepseek_v3": 52}


def has_pages(*tensors: torch.Tensor) -> bool:
    """In the place of `gpu.takes`: only what has to do with KV pages is interpreted, all else is plain torch."""
    return any(tensor.dim() == 4 for tensor in tensors)


def make_engine(path: Path, adapters: dict[str, str], **more: str) -> Engine:
    settings = {"max_num_seqs": 1, "kv_memory": 1 << 20, "adapter_memory": 1 << 20, "decode_programs": "off"}
    return Engine(EngineConfig(model=str(path), adapters=adapters, **settings, **more))  # type: ignore[arg-type]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_are_few_operations(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    adapters, name = {}, None
    if family == "mixtral":  # of one is enough: adapters know no family
        name, path = next(iter(random_adapters(tmp_path / "adapters", model).items()))
        adapters = {name: path}
    requests = [request("a", [5, 6, 7], name, max_tokens=2)]
    with monkeypatch.context() as context:
        context.setattr(gpu, "takes", lambda *_tensors: False)
        want = run(make_engine(tmp_path / "base", adapters), requests)
    steps: list[FusedStep] = []

    def noted(step: object) -> FusedStep:
        steps.append(fuse(step))  # type: ignore[arg-type]
        return steps[-1]

    engine = make_engine(tmp_path / "base", adapters)
    runner = engine._runner
    runner._programs = runner._graphs(FrozenCapture(), fuse=noted, max_num_seqs=1, max_pages=2)
    if family != "mixtral":  # interpreting takes seconds: all of it for one of them
        monkeypatch.setattr(gpu, "takes", has_pages)
    got = run(engine, requests)
    assert {key: output.token_ids for key, output in got.items()} == {key: o.token_ids for key, o in want.items()}
    assert runner._programs.num_captured == len(steps) == 1
    assert steps[0].names.count("routed_units") == 2 * len(adapters)
    names = [name for name in steps[0].names if name not in ("adapter_router", "routed_units")]
    if family in WHOLE:
        first = names.index("rms_norm")
        assert names[first + 1 :][:18] == 2 * [*ATTENTION, *EXPERTS]
    else:
        assert names.count("paged_attention") == 2
        at = [i for i, name in enumerate(names) if name == "paged_attention"]
        assert at[1] - at[0] <= MOST[family]


def test_a_model_on_a_cpu_is_left_alone() -> None:
    model = tiny_model("olmoe")
    before = [type(module) for module in model.modules()]
    prepare(model, batch_invariant=True)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])  # both have biases
def test_batch_invariant_layers_are_those_of_transformers(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(9).view(1, 9)
    with torch.inference_mode():
        want = model(ids).logits
        prepare(model, batch_invariant=True)
        got = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert any(isinstance(module, StoredLinear) for module in model.modules())


@pytest.mark.usefixtures("triton")
def test_a_batch_invariant_engine_computes_nothing_in_torch_that_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so itself when it starts, and refuses a base where something does."""
    tiny_model("gpt_oss").save_pretrained(tmp_path / "gpt_oss")
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "deepseek_v3")
    with pytest.raises(BaseModelError, match="cannot be batch-invariant: it computes .*aten::sum"):
        make_engine(tmp_path / "deepseek_v3", {}, batch_invariant="on")
    engines = [make_engine(tmp_path / "gpt_oss", {}, batch_invariant=mode) for mode in ("on", "off")]
    monkeypatch.setattr(gpu, "takes", has_pages)
    got, want = (run(engine, [request("a", list(range(20, 38)), max_tokens=2)])["a"] for engine in engines)
    assert got.token_ids == want.token_ids


@pytest.mark.usefixtures("triton")
def test_weights_that_lie_together_are_those_that_were_there() -> None:
    model = tiny_model("gpt_oss")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    prepare(model, batch_invariant=False)
    assert {name for name, _ in model.named_parameters()} == before.keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def prepare(model: PreTrainedModel, *, batch_invariant: bool) -> None:
    use_gpu_ops(model, find_moe_blocks(model), batch_invariant=batch_invariant)
