"""Tiny models for all tests: a random Mixtral with a real (byte-level BPE) tokenizer, and random adapters for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import triton_on_cpu  # noqa: F401 - before Transformers' models are
from tiny import random_adapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from perft.config import PerftConfig
from perft.moe import find_moe_blocks

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.first %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The router sends each token to two of the experts, and the adapter adds what its own experts say.",
    "hello world, hello there; the quick brown fox jumps over the lazy dog. 1 2 3 4 5 6 7 8 9 10",
    "Grüße aus Köln! Ça va très bien, merci. 你好，世界。 🙂🚀",
]
TINY_CONTEXT = 256


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; every character can be written, most non-ASCII ones in pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_base_without_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A random Mixtral with sharp enough logits that greedy tokens do not hang on rounding."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tiny_tokenizer) + 4,  # as with real models, a few ids are not the tokenizer's
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=TINY_CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    path = tmp_path_factory.mktemp("tiny") / "tiny-mixtral-ids"
    MixtralForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_base(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base_without_tokenizer: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """The random Mixtral with the tokenizer."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-mixtral"
    path.mkdir()
    for file in tiny_base_without_tokenizer.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Mapping[str, str]:
    """One random adapter of each variant, large enough to change what the base says; name to folder."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    blocks = find_moe_blocks(model)
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "routed": PerftConfig(variant="R", r=4, unit="lora", num_experts=3, top_k=2, norm_topk=True),
        "embedded": PerftConfig(variant="E", r=2, unit="parallel"),
        "dense": PerftConfig(variant="D", r=3, unit="lora", num_experts=2),
        "single": PerftConfig(variant="S", r=8, unit="parallel"),
    }
    return {
        name: str(random_adapter(folder / name, config, blocks, seed))
        for seed, (name, config) in enumerate(configs.items())
    }
