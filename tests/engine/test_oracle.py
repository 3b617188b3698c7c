"""The 18 cases that the PERFT authors' own code gave: through the engine, and through the PEFT model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from driving import request, run
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from perft.importer import import_checkpoint
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine

ORACLE = Path(__file__).parents[1] / "oracle"
CASES = {family: sorted(p.name for p in (ORACLE / family).glob("*-*")) for family in ("mixtral", "olmoe")}
TOLERANCE = 1e-4


def expected(family: str, case: str | None) -> tuple[list[list[int]], Tensor]:
    """(token ids [3, 17], log-probabilities [3, 17, V]) of the authors' code."""
    file = ORACLE / family / ("base_io.safetensors" if case is None else f"{case}/io.safetensors")
    tensors = load_file(file)
    return tensors["input_ids"].tolist(), tensors["logits"].log_softmax(-1)


@pytest.fixture(scope="module", params=list(CASES))
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Mapping[str, str]]:
    """(family, its cases imported as adapters)."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    for case in CASES[family]:
        import_checkpoint(ORACLE / family / case, folder / case, base=str(ORACLE / family / "base"))
    return family, {case: str(folder / case) for case in CASES[family]}


def test_there_are_eighteen() -> None:
    assert sum(len(cases) for cases in CASES.values()) == 18


def test_engine(imported: tuple[str, Mapping[str, str]]) -> None:
    """All cases and the base in one mixed batch, by the prompt log-probabilities of served requests."""
    family, adapters = imported
    engine = Engine(
        EngineConfig(
            model=str(ORACLE / family / "base"),
            adapters=dict(adapters),
            dtype="float32",
            kv_memory=1 << 24,
            adapter_memory=1 << 20,
        )
    )
    cases: list[str | None] = [None, *adapters]
    wanted = {case: expected(family, case) for case in cases}
    outputs = run(
        engine,
        [
            request(f"{case}/{b}", ids, case, max_tokens=1, prompt_logprobs=20)
            for case, (prompts, _) in wanted.items()
            for b, ids in enumerate(prompts)
        ],
    )
    for case, (prompts, logprobs) in wanted.items():
        for b, ids in enumerate(prompts):
            output = outputs[f"{case}/{b}"]
            assert output.token_ids == [int(logprobs[b, -1].argmax())]
            assert output.prompt_logprobs is not None
            for i, entry in enumerate(output.prompt_logprobs[1:]):
                assert entry is not None
                assert abs(entry.logprob - logprobs[b, i, ids[i + 1]]) < TOLERANCE
                assert len(entry.top) == 20
                assert all(abs(value - logprobs[b, i, token]) < TOLERANCE for token, value in entry.top)


def test_peft_model(imported: tuple[str, Mapping[str, str]]) -> None:
    """Every logit of every case."""
    family, adapters = imported
    base = AutoModelForCausalLM.from_pretrained(ORACLE / family / "base", dtype=torch.float32)
    first, *others = adapters
    model = PeftModel.from_pretrained(base, adapters[first], adapter_name=first)
    for case in others:
        model.load_adapter(adapters[case], adapter_name=case)
    model.eval()
    for case in adapters:
        model.set_adapter(case)
        tensors = load_file(ORACLE / family / case / "io.safetensors")
        with torch.inference_mode():
            logits = model(tensors["input_ids"]).logits
        torch.testing.assert_close(logits, tensors["logits"], atol=TOLERANCE, rtol=0)
