"""`batch_invariant`: no bit of a request's result depends on what else is in its batch, on how it is cut into chunks, on
preemption, or on what is cached. On a CPU, where it can be shown; a GPU's kernels are looked at in tests/kernels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Output, request, run
from tiny import random_adapters, random_loras, tiny_model
from transformers import AutoModelForCausalLM, OlmoeConfig

import perft_kernels.native
from perft.errors import BaseModelError
from perft_serve.engine.batch import long_if_prompt
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest
from perft_serve.engine.params import SamplingParams
from perft_serve.engine.scheduler import Chunk
from perft_serve.engine.sequence import Sequence

VOCAB_SIZE = 128


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    if perft_kernels.native.library() is None:
        pytest.skip("the CPU kernels cannot be compiled here")
    folder = tmp_path_factory.mktemp("invariance")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    return folder / "base", random_adapters(folder, model.float()) | random_loras(folder, model)


def make_engine(base: tuple[Path, dict[str, str]], **settings: Any) -> Engine:
    path, adapters = base
    defaults = {"dtype": "bfloat16", "kv_memory": 1 << 22, "batch_invariant": "on", "prefix_caching": "off"}
    return Engine(EngineConfig(model=str(path), adapters=adapters, **(defaults | settings)))  # type: ignore[arg-type]


def requests(names: list[str]) -> list[EngineRequest]:
    """Prompts of 20 to 70 tokens, some of which begin alike, with the log-probabilities of all they hold."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(VOCAB_SIZE, (32,), generator=generator).tolist()
    made = []
    for i, name in enumerate([None, *names, None]):
        own = torch.randint(VOCAB_SIZE, (20 + 7 * (i % 8),), generator=generator).tolist()
        params = SamplingParams(
            max_tokens=6,
            temperature=float(i % 2),
            seed=i,
            logprobs=2,
            prompt_logprobs=1 if i % 3 == 0 else None,
            ignore_eos=True,
        )
        plain = request(str(i), [*shared[: 16 * (i % 3)], *own], name)
        made.append(replace(plain, params=params))
    return made


def everything(output: Output) -> tuple[list[int], list[float]]:
    return output.token_ids, output.logprobs


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 32, "max_num_batched_tokens": 512},
        {"max_num_seqs": 8, "max_num_batched_tokens": 19},
        {"max_num_seqs": 16, "max_num_batched_tokens": 64, "kv_memory": 60_000, "page_size": 4},
        {"max_num_seqs": 8, "max_num_batched_tokens": 33, "prefix_caching": "on", "page_size": 4},
        {"max_num_seqs": 8, "decode_programs": "off", "async_scheduling": "on"},
    ],
    ids=["together", "in chunks", "preempted", "cached", "ahead"],
)
def test_no_bit_depends_on_the_rest(base: tuple[Path, dict[str, str]], settings: dict[str, Any]) -> None:
    engine = make_engine(base)
    alone = {r.request_id: everything(run(engine, [r])[r.request_id]) for r in requests(list(base[1]))}
    engine.close()
    engine = make_engine(base, **settings)
    together = run(engine, requests(list(base[1])))
    assert {key: everything(output) for key, output in together.items()} == alone
    if settings.get("kv_memory"):
        assert engine.stats().num_preemptions > 0
    engine.close()


def test_a_base_that_cannot_be_is_refused(base: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"aten::linear.*bfloat16.*--batch-invariant off"):
        make_engine(base, dtype="float32")
    tiny_model("deepseek_v3").bfloat16().save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"DeepseekV3ForCausalLM cannot be batch-invariant: it computes .*aten::"):
        make_engine((tmp_path, {}))


def test_what_is_long_depends_on_the_sequence_alone() -> None:
    seq = Sequence(request=request("a", list(range(10))), seed=0, max_tokens=9)
    chunks = [
        Chunk(seq, start, n, samples=False) for start, n in ((0, 10), (0, 4), (4, 6), (9, 1), (8, 5), (10, 1), (12, 3))
    ]
    assert long_if_prompt(chunks) == [10, 4, 6, 1, 2, 0, 0]
