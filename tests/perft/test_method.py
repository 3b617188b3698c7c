"""PERFT as a PEFT method, on every family: what PEFT promises of a method holds for this one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny import FAMILIES, VOCAB_SIZE, tiny_model, variant_configs
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from perft import BaseModelError, PerftConfig, PerftError, PerftLayer, PerftModel
from perft.config import Unit
from perft.losses import router_load_balancing_loss
from perft.moe import find_moe_blocks

TOKENS = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))


def attach(model: PreTrainedModel, config: PerftConfig | None = None, name: str = "default") -> PeftModel:
    return get_peft_model(model, config or PerftConfig(variant="R", r=4, num_experts=3), adapter_name=name)


def disturb(model: PeftModel) -> None:
    """Give every adapter weight a value that shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "perft_" in name:
                parameter.normal_(std=0.3)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def weights_hash(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "perft_" not in name:
            digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found(family: str) -> None:
    model = tiny_model(family)
    blocks = find_moe_blocks(model)
    assert [block.layer for block in blocks] == [0, 1]
    experts = {"olmoe": 8, "deepseek_v3": 8, "qwen2_moe": 6, "qwen3_moe": 6}.get(family, 4)
    assert all((b.hidden_size, b.num_experts, b.top_k) == (32, experts, 2) for b in blocks)
    assert all(b.norm_topk == (family not in ("olmoe", "qwen2_moe")) for b in blocks)
    attach(model)
    assert find_moe_blocks(model) == blocks, "wrapped blocks are still found, under the same names"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_identity_and_trains(family: str) -> None:
    """Every variant: same logits bit by bit; after one step of SGD the loss falls and the base has not moved."""
    for config in variant_configs().values():
        base = tiny_model(family)
        before, plain = weights_hash(base), logits(base)
        model = attach(base, config)
        assert torch.equal(logits(model), plain)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {name for name, _ in model.named_parameters() if "perft_" in name}
        model.train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.eval()
        assert not torch.equal(logits(model), plain)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert weights_hash(model.unload()) == before


def test_official_init_is_nearly_the_identity() -> None:
    base = tiny_model("mixtral")
    plain = logits(base)
    model = attach(base, PerftConfig(variant="R", init="official"))
    up = [p for name, p in model.named_parameters() if "perft_up" in name]
    assert all(p.any() for p in up)
    assert max(float(p.detach().abs().max()) for p in up) < 1e-5
    down = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "perft_down" in name])
    assert float(down.std()) == pytest.approx((2 / 8) ** 0.5, rel=0.05)
    torch.testing.assert_close(logits(model), plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["R-lora", "E-parallel"])
def test_save_and_load(family: str, name: str, tmp_path: Path) -> None:
    model = attach(tiny_model(family), variant_configs()[name])
    disturb(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(tiny_model(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again), logits(model))
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, PerftConfig)
    assert config.variant == name[0]
    assert config.target_modules is None, "derived from the model, not written down"


def test_several_adapters_on_one_model(tmp_path: Path) -> None:
    """set_adapter, two at once, delete_adapter, get_model_status; a second adapter is not trained with the first."""
    configs = variant_configs()
    base = tiny_model("mixtral")
    plain = logits(base)
    model = attach(base, configs["R-lora"], "a")
    model.add_adapter("b", configs["E-lora"])
    model.add_adapter("c", configs["S-one-layer"])
    disturb(model)
    seen = {}
    for name in ("a", "b", "c"):
        model.set_adapter(name)
        seen[name] = logits(model)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert all(f".{name}" in n for n in trainable)
    assert not torch.equal(seen["a"], seen["b"])
    status = model.get_model_status()
    assert status.peft_types == {"a": "PERFT", "b": "PERFT", "c": "PERFT"}
    assert (status.active_adapters, status.num_adapter_layers) == (["c"], 2)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    loaded = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "b")
    assert torch.equal(logits(loaded), seen["b"])
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    assert not torch.equal(both, seen["a"])
    model.base_model.set_adapter("a")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("a")
    model.set_adapter("b")
    assert torch.equal(logits(model), seen["b"])
    assert not [n for n, _ in model.named_parameters() if n.endswith(".a")]
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_trainable_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = attach(tiny_model("mixtral"), PerftConfig(variant="R", r=4, num_experts=3, top_k=1))
    assert model.get_nb_trainable_parameters()[0] == 2 * (2 * 3 * 4 * 32 + 3 * 32)
    model.print_trainable_parameters()
    assert "trainable params: 1,728" in capsys.readouterr().out


def test_merging_is_refused() -> None:
    model = attach(tiny_model("mixtral"))
    for merge in (model.merge_and_unload, model.merge_adapter, next(iter(layers(model))).merge):
        with pytest.raises(PerftError, match="cannot be merged"):
            merge()
    assert torch.isfinite(logits(model)).all()


def checkpoint(model: PeftModel, *, use_reentrant: bool) -> None:
    """Turn on gradient checkpointing by the name that this version of Transformers has for it."""
    base = model.base_model.model
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    base.enable_input_require_grads()


def layers(model: PeftModel) -> list[PerftLayer]:
    return [module for module in model.modules() if isinstance(module, PerftLayer)]


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(BaseModelError, match="no Mixture-of-Experts block.*dense"):
        attach(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "X"}, "variant must be one of R, E, D, S"),
        ({"r": 0}, "r must be an integer >= 1"),
        ({"r": True}, "r must be an integer"),
        ({"unit": "mlp"}, "unit must be one of"),
        ({"unit": "parallel", "alpha": 8}, "alpha has no meaning"),
        ({"alpha": -1}, "alpha must be a positive"),
        ({"num_experts": 2, "top_k": 3}, "top_k=3 is more than num_experts=2"),
        ({"variant": "E", "num_experts": 4}, "num_experts has no meaning for variant='E'"),
        ({"variant": "S", "num_experts": 2}, "exactly one"),
        ({"variant": "D"}, "needs num_experts"),
        ({"variant": "D", "num_experts": 2, "top_k": 1}, "top_k has no meaning"),
        ({"variant": "E", "norm_topk": True}, "norm_topk has no meaning"),
        ({"variant": "S", "combine": "base-rank"}, "combine has no meaning"),
        ({"variant": "E", "router_aux_loss_coef": 0.1}, "router_aux_loss_coef has no meaning"),
        ({"combine": "base-rank", "norm_topk": True}, "norm_topk has no meaning with combine"),
        ({"norm_topk": "yes"}, "norm_topk must be"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"init": "zeros"}, "init must be one of"),
        ({"layers_to_transform": []}, "non-empty list"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform must be an integer"),
        ({"target_modules": ["q_proj"]}, "target_modules cannot be chosen"),
    ],
)
def test_senseless_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PerftError, match=message):
        PerftConfig(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PerftConfig(combine="base-rank", num_experts=4, top_k=3), "must not be more than the base's 2"),
        (PerftConfig(layers_to_transform=[0, 7]), r"without an MoE block: \[7\]"),
    ],
)
def test_configurations_that_the_base_contradicts(config: PerftConfig, message: str) -> None:
    with pytest.raises(PerftError, match=message):
        attach(tiny_model("mixtral"), config)


@pytest.mark.parametrize(("family", "norm"), [("olmoe", False), ("mixtral", True)])
def test_norm_topk_follows_the_base(family: str, norm: bool) -> None:
    model = attach(tiny_model(family))
    assert model.peft_config["default"].norm_topk is norm


def test_router_loss_is_added_and_reported() -> None:
    """Equal to Transformers' own formula over the gate logits, padding left out, in training only."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = PerftConfig(variant="R", r=4, num_experts=4, top_k=2, router_aux_loss_coef=0.5)
    model = attach(tiny_model("mixtral"), config)
    disturb(model)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].reshape(-1, 32) @ module.perft_gate["default"].T)
        )
        for layer in layers(model)
    ]
    model.eval()
    plain = model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS).loss
    assert model.base_model.router_aux_loss == {}
    seen.clear()
    model.train()
    loss = model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS).loss
    for hook in hooks:
        hook.remove()
    want = load_balancing_loss_func(tuple(seen), 4, 2, mask)
    torch.testing.assert_close(model.base_model.router_aux_loss["default"], want.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, plain + 0.5 * want, atol=1e-5, rtol=0)
    balanced = router_load_balancing_loss([torch.eye(4) * 1e-6], 1)
    assert float(balanced) == pytest.approx(1.0, abs=1e-4)
    # Trainer's convention for accumulated batches: losses are sums over the whole batch's items
    share = model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS, num_items_in_batch=32).loss
    torch.testing.assert_close(share, plain * 16 / 32 + 0.5 * want * 16 / 32, atol=1e-5, rtol=0)


def test_router_learns_from_its_loss_alone() -> None:
    """With zero `up` the language model's loss says nothing to the gate; the balancing loss does."""
    model = attach(tiny_model("mixtral"), PerftConfig(variant="R", num_experts=4, top_k=2))
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gates = [p for n, p in model.named_parameters() if "perft_gate" in n]
    assert all(p.grad is not None and p.grad.any() for p in gates)


@pytest.mark.parametrize("variant", ["R-lora", "E-parallel"])
def test_gradient_checkpointing_changes_no_gradient(variant: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = attach(tiny_model("mixtral"), variant_configs()[variant])
        disturb(model)
        if checkpointing:
            checkpoint(model, use_reentrant=False)
        model.train()
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_reentrant_checkpointing_with_a_router_loss_is_refused() -> None:
    """It would silently cut the router off from its loss."""
    model = attach(tiny_model("mixtral"))
    checkpoint(model, use_reentrant=True)
    model.train()
    with pytest.raises(PerftError, match="use_reentrant"):
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False)


def test_bf16_base_with_float32_adapter() -> None:
    """The adapter's weights and gradients are float32, its output joins a bf16 stream."""
    model = attach(tiny_model("mixtral").bfloat16(), PerftConfig(variant="R", r=4, num_experts=3))
    assert {p.dtype for n, p in model.named_parameters() if "perft_" in n} == {torch.float32}
    model.train()
    output = model(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("unit", ["lora", "parallel"])
def test_dropout_is_for_training_only(unit: Unit) -> None:
    model = attach(tiny_model("mixtral"), PerftConfig(variant="S", r=8, unit=unit, dropout=0.5))
    disturb(model)
    model.eval()
    assert torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    assert not torch.equal(first, logits(model))
    torch.manual_seed(0)
    assert torch.equal(first, logits(model))


def test_the_tuner_is_ours() -> None:
    assert isinstance(attach(tiny_model("olmoe")).base_model, PerftModel)
