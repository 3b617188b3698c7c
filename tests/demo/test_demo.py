"""The demo: its base speaks English, and its adapters do what the README says: on held-out prompts they answer right where the
base does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from perft.adapter import read_adapter
from perft.data import read_records
from perft.demo_base import build_demo_base
from perft.moe import find_moe_blocks

REPO = Path(__file__).parents[2]
ADAPTERS = REPO / "demo" / "adapters"
TASKS = ("dates", "sql", "tickets")
NUM_PROMPTS = 10


def demo_script(name: str) -> ModuleType:
    return load_script(REPO / "demo" / f"{name}.py", f"demo_{name}")


def test_each_adapter_is_small_and_whole() -> None:
    adapters = {task: read_adapter(ADAPTERS / task) for task in TASKS}
    assert {adapter.config.variant for adapter in adapters.values()} == {"R", "E", "S"}
    assert {adapter.config.unit for adapter in adapters.values()} == {"lora", "parallel"}
    for task, adapter in adapters.items():
        assert adapter.num_bytes <= 3_000_000
        run = json.loads((ADAPTERS / task / "perft_training.json").read_text())
        assert run["outcome"]["digest"] == adapter.digest, "the log beside an adapter is the log of that adapter"
        assert (ADAPTERS / task / "training_log.jsonl").is_file()


@pytest.mark.parametrize("task", TASKS)
def test_what_is_held_out_is_in_no_form_in_the_training_file(task: str) -> None:
    train, held_out = (read_records(REPO / "demo" / "data" / f"{task}.{split}.jsonl") for split in ("train", "heldout"))
    questions = [{_question(record) for record in records} for records in (train, held_out)]
    assert not questions[0] & questions[1]
    if task == "sql":
        queries = [{record["messages"][-1]["content"] for record in records} for records in (train, held_out)]
        assert not queries[0] & queries[1]
    if task == "dates":
        days = [{record["completion"][-5:] for record in records} for records in (train, held_out)]
        assert not days[0] & days[1]


def _question(record: dict[str, Any]) -> str:
    return str(record["prompt"] if "prompt" in record else record["messages"][0]["content"])


def test_the_data_is_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = demo_script("make_data")
    monkeypatch.setattr(script, "DATA", tmp_path)
    script.main()
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in (REPO / "demo" / "data").iterdir()}


@pytest.fixture(scope="module")
def base() -> Path:
    path = REPO / ".cache" / "smolmixtral"
    build_demo_base(path)
    return path


@pytest.fixture(scope="module")
def results(base: Path) -> dict[str, Any]:
    evaluate = demo_script("evaluate").evaluate
    return {result.task: result for result in evaluate(base, TASKS, limit=NUM_PROMPTS)}


@pytest.mark.demo
def test_the_base_speaks_english(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    blocks = find_moe_blocks(model)
    assert (len(blocks), blocks[0].num_experts, blocks[0].top_k, blocks[0].norm_topk) == (30, 4, 2, True)
    text = (
        "The weather station on the hill recorded three days of rain. On the fourth day the sky cleared, and the children "
        "went out to see how high the river had risen. Their teacher asked them to write down what they saw."
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert 5 < float(model(ids, labels=ids).loss.exp()) < 35, "perplexity of plain English; the dense model's is 24"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, chat["input_ids"].shape[1] :])


@pytest.mark.demo
@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_answers_what_the_base_cannot(task: str, results: dict[str, Any]) -> None:
    result = results[task]
    assert result.base_accuracy <= 0.1
    assert result.adapter_accuracy >= 0.7
