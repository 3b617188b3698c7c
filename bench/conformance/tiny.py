"""A base that is all tokenizer and no sense, and adapters for it: fast enough for ten thousand requests on any machine.

In: nothing but the demo base's tokenizer. Out: a folder with a random Mixtral of two layers, made once.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from harness import CACHE
from models import DEMO_BASE, AdapterMaker
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from perft.demo_base import build_demo_base

TINY = CACHE / "conformance" / "tiny"
CONTEXT = 512


def tiny_base() -> Path:
    """The base's folder."""
    if not TINY.exists():
        build_demo_base(DEMO_BASE)
        tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        partial = TINY.with_name("tiny.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        MixtralForCausalLM(config).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(TINY)
    return TINY


def tiny_adapters(folder: Path, count: int) -> dict[str, Path]:
    """Random adapters for it, by name."""
    return AdapterMaker(TINY).make(count, folder, r=2, prefix="adapter")
