"""lm-evaluation-harness on the engine says what it says on Transformers' model. Skipped where lm-eval is not installed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from perft.cli import main
from perft.errors import PerftError
from perft_serve import LLM, SamplingParams

lm_eval = pytest.importorskip("lm_eval")
# what lm-eval and its data sets do is their matter
pytestmark = pytest.mark.filterwarnings("default")

TOLERANCE = 1e-4
QUESTIONS = [
    {
        "query": "The router sends each token to",
        "choices": [" two of the experts", " the lazy dog", " nobody"],
        "gold": 0,
    },
    {"query": "hello", "choices": [" world", " there, there"], "gold": 1},
    {"query": "1 2 3 4 5 6 7 ", "choices": ["8 9 10", "fox"], "gold": 0},
    {"query": "the quick brown fox jumps over", "choices": [" the lazy dog.", " one two"], "gold": 0},
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: gold
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{query}}{{choices[0]}}"
metric_list: [{metric: byte_perplexity}]
""",
    "tiny_greedy": """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {folder / 'data.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}validation_split: validation\n{text}")
    return folder


@pytest.fixture(scope="module")
def llm(tiny_base: Path, tiny_adapters: Mapping[str, str]) -> Iterator[LLM]:
    llm = LLM(str(tiny_base), tiny_adapters, dtype="float32", device="cpu", kv_memory=1 << 23, max_num_seqs=8)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def manager(task_folder: Path) -> Any:
    from perft_serve.harness import find_tasks

    return find_tasks(list(TASKS), str(task_folder))


def answers(report: Mapping[str, Any], task: str) -> list[Any]:
    samples = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answer in sample["resps"]]


@pytest.mark.parametrize("adapter", [None, "routed", "embedded"])
def test_answers_are_those_of_the_hf_model(
    adapter: str | None, llm: LLM, tiny_base: Path, tiny_adapters: Mapping[str, str], manager: Any
) -> None:
    from lm_eval.models.huggingface import HFLM

    from perft_serve.harness import EngineLM, run_tasks

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, tiny_adapters[adapter])
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    theirs = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1, device="cpu")
    ours = EngineLM(llm, adapter)
    want, got = (run_tasks(each, list(TASKS), manager, bootstrap_iters=0) for each in (theirs, ours))
    for expected, found in zip(answers(want, "tiny_choice"), answers(got, "tiny_choice"), strict=True):
        assert float(found[0][0]) == pytest.approx(float(expected[0][0]), abs=TOLERANCE)
        assert found[0][1] == expected[0][1]
    for expected, found in zip(answers(want, "tiny_rolling"), answers(got, "tiny_rolling"), strict=True):
        assert float(found[0]) == pytest.approx(float(expected[0]), abs=TOLERANCE)
    assert answers(got, "tiny_greedy") == answers(want, "tiny_greedy")


def instances(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type="loglikelihood", doc={}, arguments=each, idx=0) for each in arguments]


def test_texts_longer_than_the_context_go_in_windows(llm: LLM, tiny_base: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from perft_serve.harness import EngineLM

    ours = EngineLM(llm, None)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=ours.max_length)
    long = "the quick brown fox jumps over the lazy dog " * 40
    assert len(ours.tok_encode(long)) > 2 * ours.max_length
    for name, request in (("loglikelihood_rolling", (long,)), ("loglikelihood", (long, " hello world"))):
        want, got = (getattr(each, name)(instances(request))[0] for each in (theirs, ours))
        assert got == pytest.approx(want, abs=10 * TOLERANCE, rel=1e-6), name


def test_what_is_greedy_is_said(llm: LLM) -> None:
    from perft_serve.harness import EngineLM

    ours = EngineLM(llm, "routed")
    prompt = ours.tok_encode("hello")
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    best = list(llm.generate(prompt, params, adapter="routed")[0].outputs[0].token_ids)
    other = [*best[:-1], best[-1] + 1 if best[-1] == 0 else best[-1] - 1]
    scored = ours._loglikelihood_tokens([(None, prompt, best), (None, prompt, other)])
    assert [greedy for _, greedy in scored] == [True, False]
    assert scored[0][0] > scored[1][0]


def test_what_the_engine_cannot_do_is_refused(llm: LLM, task_folder: Path) -> None:
    from perft_serve.harness import EngineLM, find_tasks

    ours = EngineLM(llm, None)
    with pytest.raises(PerftError, match="a task asks for num_beams, which the engine does not know"):
        ours.generate_until(instances(("hello", {"until": [], "num_beams": 4})))
    with pytest.raises(PerftError, match="no room for"):
        ours.generate_until(instances(("hello", {"until": [], "max_gen_toks": 10_000})))
    with pytest.raises(PerftError, match="no room for"):
        ours.loglikelihood(instances(("hello", " fox" * 3000)))
    with pytest.raises(PerftError, match="lm-eval has no task no_such_task"):
        find_tasks(["no_such_task"], str(task_folder))


def test_the_command(
    tiny_base: Path,
    tiny_adapters: Mapping[str, str],
    task_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["eval", "--model", str(tiny_base), "--adapter", f"a={tiny_adapters['routed']}", "--dtype", "float32"]
    arguments += [
        "--kv-memory",
        "8M",
        "--device",
        "cpu",
        "--tasks",
        "lm_eval:tiny_choice",
        "--include-path",
        str(task_folder),
    ]
    assert main([*arguments, "--limit", "3", "--output", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert [line.split()[3] for line in table.splitlines() if "tiny_choice" in line] == ["acc"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["lm_eval"].keys() == {"base", "a"}
    assert 0 <= results["lm_eval"]["a"]["results"]["tiny_choice"]["acc,none"] <= 1
    samples = [json.loads(line) for line in (tmp_path / "out" / "lm_eval_examples.jsonl").read_text().splitlines()]
    assert [sample["model"] for sample in samples] == ["base"] * 3 + ["a"] * 3
    assert main([*arguments, "--score"]) == 2
    assert "--score: not for tasks of lm-evaluation-harness" in capsys.readouterr().err
