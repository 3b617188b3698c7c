"""Tiny random bases of many families, and random adapters for them. Imported by tests (`pythonpath` in pyproject.toml)."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from perft import PerftConfig
from perft.adapter import LayerTensors, write_adapter
from perft.moe import MoeBlock, find_moe_blocks

VOCAB_SIZE = 128
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,  # sharp enough that greedy tokens do not hang on rounding
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_MOE = {"moe_intermediate_size": 24, "intermediate_size": 48}


def _configs() -> dict[str, PreTrainedConfig]:
    return {
        "olmoe": OlmoeConfig(**_COMMON, intermediate_size=24, num_experts=8, norm_topk_prob=False),
        "mixtral": MixtralConfig(**_COMMON, intermediate_size=48, num_local_experts=4),
        "qwen2_moe": Qwen2MoeConfig(
            **_COMMON, **_MOE, num_experts=6, shared_expert_intermediate_size=16, norm_topk_prob=False
        ),
        "qwen3_moe": Qwen3MoeConfig(**_COMMON, **_MOE, num_experts=6, head_dim=16, norm_topk_prob=True),
        "deepseek_v3": DeepseekV3Config(
            **(_COMMON | {"num_key_value_heads": 4}),
            **_MOE,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=0,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
        ),
        "gpt_oss": GptOssConfig(**_COMMON, intermediate_size=24, num_local_experts=4, head_dim=16, sliding_window=8),
        "granitemoe": GraniteMoeConfig(**_COMMON, intermediate_size=24, num_local_experts=4),
    }


FAMILIES = tuple(_configs())


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of a family, two layers, in evaluation mode."""
    torch.manual_seed(seed + zlib.crc32(family.encode()))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(_configs()[family], dtype=torch.float32)
    for parameter in model.parameters():  # some families start biases, gates and sinks at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_tiny_model(family: str, path: Path) -> Path:
    """A tiny model as a checkpoint; returns `path`."""
    tiny_model(family).save_pretrained(path)
    return path


def random_adapter(path: Path, config: PerftConfig, blocks: Sequence[MoeBlock], seed: int = 0) -> Path:
    """An adapter with random tensors, large enough to change what a tiny base says; returns `path`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    layers = {}
    for block in blocks:
        if config.layers_to_transform is not None and block.layer not in config.layers_to_transform:
            continue
        num_experts = block.num_experts if config.num_experts is None else config.num_experts
        layers[block.layer] = LayerTensors(
            down_MRD=random(num_experts, config.r, block.hidden_size),
            up_MRD=random(num_experts, config.r, block.hidden_size),
            gate_MD=random(num_experts, block.hidden_size) if config.variant == "R" else None,
        )
    write_adapter(path, config, layers, {block.layer: block.name for block in blocks})
    return path


def random_lora(path: Path, model: PreTrainedModel, seed: int = 0, **settings: Any) -> Path:
    """A LoRA of PEFT's with random tensors, for a model that is left as it is; returns `path`."""
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    lora.save_pretrained(str(path))
    return path


LORA_SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA-qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "LoRA-all": {
        "r": 3,
        "lora_alpha": 2,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
    "LoRA-patterns": {
        "r": 8,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
    },
    "LoRA-one-layer": {"r": 7, "lora_alpha": 14, "target_modules": ["v_proj"], "layers_to_transform": [1]},
}
"""LoRAs on attention projections: subsets of them, scales and ranks by pattern, one layer only; all ranks differ."""


def random_loras(folder: Path, model: PreTrainedModel) -> dict[str, str]:
    """A random LoRA of each of `LORA_SETTINGS` in its own sub-folder of `folder`; name to path."""
    return {
        name: str(random_lora(folder / name, model, seed=50 + i, **settings))
        for i, (name, settings) in enumerate(LORA_SETTINGS.items())
    }


def variant_configs() -> dict[str, PerftConfig]:
    """One configuration for each variant and unit kind, and the rules that R can follow; ranks, M and k all differ."""
    return {
        "R-lora": PerftConfig(variant="R", r=4, num_experts=5, top_k=2),
        "R-parallel": PerftConfig(variant="R", r=3, unit="parallel", num_experts=4, top_k=1, norm_topk=False),
        "R-norm": PerftConfig(variant="R", r=2, num_experts=6, top_k=3, norm_topk=True),
        "R-base-rank": PerftConfig(variant="R", r=4, num_experts=3, top_k=2, combine="base-rank"),
        "E-lora": PerftConfig(variant="E", r=2),
        "E-parallel": PerftConfig(variant="E", r=5, unit="parallel"),
        "D-lora": PerftConfig(variant="D", r=3, num_experts=3),
        "D-parallel": PerftConfig(variant="D", r=2, unit="parallel", num_experts=2),
        "S-lora": PerftConfig(variant="S", r=8, alpha=4.0),
        "S-parallel": PerftConfig(variant="S", r=7, unit="parallel"),
        "S-one-layer": PerftConfig(variant="S", r=6, layers_to_transform=[1]),
    }


def random_adapters(folder: Path, model: PreTrainedModel) -> dict[str, str]:
    """A random adapter of each of `variant_configs` in its own sub-folder of `folder`; name to path."""
    blocks = find_moe_blocks(model)
    return {
        name: str(random_adapter(folder / name, config, blocks, seed=i))
        for i, (name, config) in enumerate(variant_configs().items())
    }
