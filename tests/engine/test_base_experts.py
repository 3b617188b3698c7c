"""The base experts' kernels behind Transformers' experts call, interpreted on a CPU; and a whole engine on Triton kernels."""

from __future__ import annotations

import pytest
import torch
from driving import request, run
from served import Served
from tiny import FAMILIES, tiny_model
from transformers import MixtralConfig, MixtralForCausalLM

from perft.moe import find_moe_blocks
from perft_serve.engine.base_experts import EXPERTS, Form, form_of, use_kernels

PLAIN = Form(transposed=False, interleaved=False, alpha=1.0, limit=0.0)
FORMS = dict.fromkeys(FAMILIES, PLAIN) | {"gpt_oss": Form(transposed=True, interleaved=True, alpha=1.702, limit=7.0)}


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_transformers(family: str) -> None:
    model = tiny_model(family)
    blocks = find_moe_blocks(model)
    assert form_of(model.get_submodule(blocks[0].name)) == FORMS[family]
    ids = torch.arange(9).view(1, 9)
    with torch.inference_mode():
        want = model(ids).logits
        use_kernels(model, blocks)
        assert model.config._experts_implementation == EXPERTS
        got = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, want), "another order of sums: ours have run"


@pytest.mark.usefixtures("triton")
def test_another_activation_stays_as_transformers_has_it() -> None:
    config = MixtralConfig(
        hidden_act="gelu",
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    blocks = find_moe_blocks(model)
    before = model.config._experts_implementation
    use_kernels(model, blocks)
    assert model.config._experts_implementation == before != EXPERTS


def test_a_model_on_a_cpu_is_left_alone() -> None:
    model = tiny_model("mixtral")
    use_kernels(model, find_moe_blocks(model))
    assert model.config._experts_implementation != EXPERTS


@pytest.mark.usefixtures("triton")
def test_an_engine_on_triton_kernels_gives_the_tokens_of_transformers(mixtral: Served) -> None:
    """A long prompt, a short one and a decoding sequence share steps."""
    prompts = {"short": [5, 6, 7], "long": list(range(20, 41)), "adapted": [9, 8, 7, 6]}
    names = {"short": None, "long": None, "adapted": "R-lora"}
    engine = mixtral.engine(decode_programs="off")
    outputs = run(engine, [request(key, ids, names[key], max_tokens=4) for key, ids in prompts.items()])
    for key, ids in prompts.items():
        assert outputs[key].token_ids == mixtral.generate(names[key], ids, 4), key
