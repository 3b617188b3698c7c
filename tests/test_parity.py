"""Training and serving say the same: log-probabilities of the model in Trainer's hands, and of the adapter once served."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from perft.config import PerftConfig
from perft.recipe import TrainConfig
from perft.train import train
from perft_serve import LLM, SamplingParams

TOLERANCE = 1e-4
ADAPTERS: dict[str, dict[str, Any]] = {
    f"{variant}-{unit}": {"variant": variant, "unit": unit, **settings}
    for (variant, settings), unit in itertools.product(
        {
            "R": {"r": 4, "num_experts": 3, "top_k": 2},
            "E": {"r": 3},
            "S": {"r": 8},
            "D": {"r": 2, "num_experts": 3},
        }.items(),
        ("lora", "parallel"),
    )
}
PROMPTS = [list(range(3, 43)), [7] * 5, [200, 41, 9, 300, 12, 77, 150, 31, 88], [5, 250]]
NUM_NEW = 6


class Keep(TrainerCallback):
    """Takes the model out of Trainer's hands at the end, as it is."""

    model: PeftModel

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model = kwargs["model"]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PeftModel]]:
    """Each adapter after a few steps: its folder, and the model that Trainer had."""
    folder = tmp_path_factory.mktemp("parity")
    data = folder / "train.jsonl"
    records = [
        {"prompt": f"hello {word}", "completion": f" {word[::-1]}"} for word in ("router", "token", "fox", "dog")
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = {}
    for name, settings in ADAPTERS.items():
        keep = Keep()
        config = TrainConfig(
            model=str(tiny_base),
            data=(str(data),),
            output=str(folder / name),
            learning_rate=3e-2,
            max_steps=5,
            save_steps=5,
            batch_size=4,
            warmup=0,
            dtype="float32",
        )
        train(config, PerftConfig(dropout=0.05, **settings), callbacks=[keep])
        found[name] = (folder / name, keep.model.eval())
    return found


@pytest.fixture(scope="module")
def llm(trained: Mapping[str, tuple[Path, PeftModel]], tiny_base: Path) -> Iterator[LLM]:
    adapters = {name: str(path) for name, (path, _) in trained.items()}
    # a small budget, so that prompts are computed in chunks
    llm = LLM(str(tiny_base), adapters, dtype="float32", kv_memory=1 << 23, max_num_batched_tokens=64, max_num_seqs=16)
    yield llm
    llm.close()


@torch.no_grad()
def log_probs(model: PeftModel, token_ids: list[int]) -> torch.Tensor:
    """Of every token but the first, given those before it: [T - 1]."""
    logits = model(torch.tensor([token_ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def test_log_probabilities_are_those_of_training(trained: Mapping[str, tuple[Path, PeftModel]], llm: LLM) -> None:
    asked = list(itertools.product(trained, PROMPTS))
    params = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    outputs = llm.generate([prompt for _, prompt in asked], params, adapter=[name for name, _ in asked])
    effects: dict[str, float] = dict.fromkeys(trained, 0.0)
    for (name, prompt), output in zip(asked, outputs, strict=True):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        assert output.prompt_logprobs is not None
        assert len(completion.token_ids) == NUM_NEW
        entries = [*output.prompt_logprobs[1:], *completion.logprobs]
        token_ids = [*prompt, *completion.token_ids]
        served = torch.tensor(
            [entry[token_id] for token_id, entry in zip(token_ids[1:], entries, strict=True) if entry is not None]
        )
        model = trained[name][1]
        assert float((served - log_probs(model, token_ids)).abs().max()) <= TOLERANCE, name
        with model.disable_adapter():
            effects[name] = max(effects[name], float((served - log_probs(model, token_ids)).abs().max()))
    assert min(effects.values()) > 100 * TOLERANCE, f"training has changed too little to tell: {effects}"
