"""Evaluation on the engine: beam search finds what Transformers' finds, choices are scored as the model scores them, and the
command's results say what the examples say. Small data of our own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from perft.cli import main
from perft.errors import PerftError
from perft.scores import read_examples
from perft.tasks import TASKS, load_task, prompt, record, write_jsonl
from perft_serve import LLM
from perft_serve.beam import beam_search
from perft_serve.engine.params import RequestError
from perft_serve.eval_command import harness_table
from perft_serve.evaluation import EvalSettings, draw, evaluate

NUM_PIQA = 7


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The tiny base with a context that holds the paper's prompts, and one more end-of-sequence token that beams meet."""
    path = tmp_path_factory.mktemp("wide") / "base"
    path.mkdir()
    for file in tiny_base.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    second = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False, pad_token_id=0)[0, -1].item()
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [0, second]}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    piqa = [
        record(TASKS["piqa"], f"Make tea number {n}.", ["Boil water.", f"Boil {n}."], n % 2) for n in range(NUM_PIQA)
    ]
    write_jsonl(path / "piqa/validation.jsonl", piqa)
    write_jsonl(path / "boolq/test.jsonl", [record(TASKS["boolq"], f"is {n} odd?", (), n % 2) for n in range(3)])
    write_jsonl(path / "gsm8k/test.jsonl", [{"instruction": f"1 + {n}?", "answer": str(1 + n)} for n in range(2)])
    return path


@pytest.fixture(scope="module")
def llm(wide_base: Path, tiny_adapters: Mapping[str, str]) -> Iterator[LLM]:
    llm = LLM(str(wide_base), tiny_adapters, dtype="float32", device="cpu", kv_memory=1 << 24, max_num_seqs=16)
    yield llm
    llm.close()


@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_beam_search_is_that_of_transformers(
    llm: LLM, wide_base: Path, tiny_adapters: Mapping[str, str], length_penalty: float
) -> None:
    prompts = [[5, 6, 7], [40, 41, 42, 43, 44], [100, 101]]
    jobs = [(ids, name) for ids in prompts for name in (None, "routed", "embedded")]
    lengths = [4 + 3 * (number % 2) for number in range(len(jobs))]
    found = beam_search(
        llm,
        [ids for ids, _ in jobs],
        adapters=[name for _, name in jobs],
        num_beams=4,
        max_new_tokens=lengths,
        length_penalty=length_penalty,
    )
    num_ended = 0
    for name in (None, "routed", "embedded"):
        model = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
        if name is not None:
            model = PeftModel.from_pretrained(model, tiny_adapters[name])
        for (ids, adapter), length, beam in zip(jobs, lengths, found, strict=True):
            if adapter != name:
                continue
            made = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                num_beams=4,
                do_sample=False,
                max_new_tokens=length,
                length_penalty=length_penalty,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )
            assert tuple(made.sequences[0, len(ids) :].tolist()[: len(beam.token_ids)]) == beam.token_ids
            assert beam.score == pytest.approx(made.sequences_scores[0].item(), abs=1e-4)
            num_ended += len(beam.token_ids) < length
    assert num_ended or length_penalty, "no beam met an end-of-sequence token, so ending was not tested"


def test_more_beams_than_log_probabilities(llm: LLM) -> None:
    with pytest.raises(RequestError, match="at most 6 with this base"):
        beam_search(llm, [[5]], adapters=[None], num_beams=7, max_new_tokens=[2])


def test_choices_are_scored_as_the_model_scores_them(llm: LLM, wide_base: Path, data: Path) -> None:
    task_data = load_task(TASKS["piqa"], data)
    found = evaluate(llm, ["base"], [task_data], EvalSettings(mode="score", limit=2))
    model = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(wide_base)
    for example in found:
        assert example.scores is not None
        text = prompt(task_data.task, task_data.items[example.index])
        for word, score in example.scores.items():
            before, ids = tokenizer(text)["input_ids"], tokenizer(f"{text} {word}")["input_ids"]
            assert ids[: len(before)] == before
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(logprobs[place - 1, ids[place]].item() for place in range(len(before), len(ids)))
            assert score == pytest.approx(expected, abs=1e-3)
        assert example.predicted == max(example.scores, key=example.scores.__getitem__)
        assert example.correct == (example.predicted == example.answer)


def test_clozes_are_scored_as_the_harness_scores_them(
    llm: LLM, wide_base: Path, tiny_adapters: Mapping[str, str], data: Path
) -> None:
    """lm-eval's definition, computed by Transformers and PEFT: the context is encoded, then context and continuation, and what
    comes beyond the context's tokens is summed; `acc_norm` divides by the choice's characters."""
    task_data = load_task(TASKS["piqa"], data)
    found = evaluate(llm, ["base", "routed"], [task_data], EvalSettings(mode="cloze"))
    assert len(found) == 2 * NUM_PIQA
    tokenizer = AutoTokenizer.from_pretrained(wide_base)
    for name in ("base", "routed"):
        model = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
        if name != "base":
            model = PeftModel.from_pretrained(model, tiny_adapters[name])
        for example in [each for each in found if each.model == name][:2]:
            n = example.index
            choices = {"solution1": "Boil water.", "solution2": f"Boil {n}."}
            assert example.choice_lengths == {word: len(choice) for word, choice in choices.items()}
            assert example.scores is not None
            context = f"Question: Make tea number {n}.\nAnswer:"
            first = len(tokenizer(context)["input_ids"])
            for word, choice in choices.items():
                ids = tokenizer(f"{context} {choice}")["input_ids"]
                with torch.no_grad():
                    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                expected = sum(logprobs[place - 1, ids[place]].item() for place in range(first, len(ids)))
                assert example.scores[word] == pytest.approx(expected, abs=1e-3)
            assert example.predicted == max(example.scores, key=example.scores.__getitem__)
            assert example.correct == (example.predicted == example.answer)
    with pytest.raises(PerftError, match="boolq cannot be asked as a cloze"):
        evaluate(llm, ["base"], [load_task(TASKS["boolq"], data)], EvalSettings(mode="cloze"))


def test_the_command_asks_clozes(
    wide_base: Path, tiny_adapters: Mapping[str, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["eval", "--model", str(wide_base), "--adapter", f"one={tiny_adapters['routed']}", "--data", str(data)]
    command += ["--tasks", "piqa", "--dtype", "float32", "--kv-memory", "16M", "--output", out]
    assert main([*command, "--score", "--cloze"]) == 2
    assert "give one" in capsys.readouterr().err
    assert main([*command, "--cloze"]) == 0
    assert "bits per character" in capsys.readouterr().out
    models = json.loads((tmp_path / "out/results.json").read_text())["models"]
    for name, entry in models.items():
        its = read_examples(f"{out}:{name}")
        assert entry["tasks"]["piqa"]["accuracy"] == sum(example.correct for example in its) / NUM_PIQA
        right = 0
        for example in its:
            assert example.scores is not None
            assert example.choice_lengths is not None
            by_length = {word: score / example.choice_lengths[word] for word, score in example.scores.items()}
            right += max(by_length, key=by_length.__getitem__) == example.answer
        assert entry["tasks_norm"]["piqa"]["accuracy"] == right / NUM_PIQA
        assert entry["answer_bits"]["piqa"]["low"] < entry["answer_bits"]["piqa"]["value"]
    assert models["base"]["answer_bits"] != models["one"]["answer_bits"]


@pytest.mark.parametrize("settings", [EvalSettings(num_beams=1), EvalSettings(num_beams=3), EvalSettings(mode="score")])
def test_models_side_by_side_answer_as_they_do_alone(llm: LLM, data: Path, settings: EvalSettings) -> None:
    tasks = [load_task(TASKS[name], data) for name in ("piqa", "boolq")]
    counted: list[int] = []
    together = evaluate(llm, ["base", "routed", "single"], tasks, settings, counted.append)
    assert sum(counted) == len(together) == 3 * (NUM_PIQA + 3)
    for name in ("single", "base"):
        alone = evaluate(llm, [name], tasks, settings)
        theirs = [example for example in together if example.model == name]
        assert [(e.task, e.index, e.reply, e.predicted) for e in alone] == [
            (e.task, e.index, e.reply, e.predicted) for e in theirs
        ]
    if settings.mode == "generate":
        replies = [{e.reply for e in together if e.model == name} for name in ("base", "routed")]
        assert replies[0] != replies[1], "adapters make no difference"


def test_a_prompt_longer_than_the_context_loses_its_beginning(llm: LLM, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "gsm8k/test.jsonl", [{"instruction": "one two three " * 200, "answer": "1"}])
    tasks = [load_task(TASKS["gsm8k"], tmp_path)]
    (example,) = evaluate(llm, ["base"], tasks, EvalSettings(num_beams=1, max_new_tokens=8))
    assert (example.truncated, example.num_prompt_tokens) == (True, 1024 - 8)
    with pytest.raises(PerftError, match="no room for a prompt"):
        evaluate(llm, ["base"], tasks, EvalSettings(num_beams=1, max_new_tokens=1024))
    with pytest.raises(PerftError, match="only tasks of choices can be scored, which gsm8k is not"):
        evaluate(llm, ["base"], tasks, EvalSettings(mode="score"))


def test_the_draw_depends_on_seed_and_task_only(data: Path) -> None:
    piqa = load_task(TASKS["piqa"], data)
    drawn = draw(piqa, 4, 0)
    assert drawn == sorted(set(drawn)) == draw(piqa, 4, 0)
    assert any(draw(piqa, 4, seed) != drawn for seed in range(1, 5))
    assert draw(piqa, None, 0) == draw(piqa, 99, 0) == list(range(NUM_PIQA))
    with pytest.raises(PerftError, match="limit must be at least 1"):
        EvalSettings(limit=0)


def test_the_command(
    wide_base: Path, tiny_adapters: Mapping[str, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["eval", "--model", str(wide_base), "--data", str(data), "--tasks", "piqa", "boolq", "gsm8k"]
    command += ["--adapter", f"one={tiny_adapters['routed']}", "--adapter", f"two={tiny_adapters['single']}"]
    command += ["--limit", "2", "--max-new-tokens", "3", "--num-beams", "2", "--dtype", "float32", "--kv-memory", "16M"]
    assert main([*command, "--compare", "one", "two", "--output", out, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out/results.json").read_text())
    assert list(printed["models"]) == ["base", "one", "two"]
    for name, model in printed["models"].items():
        its = read_examples(f"{out}:{name}")
        assert len(its) == 6
        for task, score in model["tasks"].items():
            right = [example.correct for example in its if example.task == task]
            assert score["accuracy"] == sum(right) / len(right)
    assert printed["models"]["one"]["adapter"]["variant"] == "R"
    assert printed["models"]["base"]["adapter"] is None
    assert printed["tasks"]["piqa"]["split"] == "validation"
    assert main(["eval", "--compare", f"{out}:one", f"{out}:two", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"] == printed["comparison"]
    assert main(["eval", "--compare", f"{out}:one", f"{out}:two"]) == 0
    assert "one against two" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model"),
        (["--compare", "a", "b"], "no output folder"),
        (["--compare", "a", "b", "--score", "--limit", "3"], "--limit, --score need --model"),
        (["--model", "m"], "give --data"),
        (["--model", "m", "--no-base"], "nothing to evaluate"),
        (["--model", "m", "--adapter", "x"], "NAME=PATH"),
        (["--model", "m", "--adapter", "base=x"], "the base's own name"),
        (["--model", "m", "--adapter", "a=x", "--adapter", "a=y"], "twice"),
        (["--model", "m", "--data", "d", "--compare", "base", "b"], "'b' is not evaluated here"),
        (["--model", "m", "--data", "d", "--tasks", "nli"], "no task 'nli'"),
        (["--model", "m", "--data", "d", "--num-beams", "0"], "num_beams must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_harness_table_has_metrics_only() -> None:
    """Of what lm-evaluation-harness says of a task: each metric with its filter and error, and nothing else it says."""
    found = {
        name: {
            "results": {
                "t": {
                    "name": "t",
                    "alias": " - t",
                    "sample_len": 8,
                    "acc,none": accuracy,
                    "acc_stderr,none": 0.125,
                    "em,strict": 1,
                    "em_stderr,strict": "N/A",
                }
            }
        }
        for name, accuracy in (("base", 0.25), ("mine", 0.75))
    }
    table = harness_table(found)
    assert [list(column.cells) for column in table.columns] == [
        ["t", "t"],
        ["acc", "em (strict)"],
        ["0.2500 +-0.1250", "1.0000"],
        ["0.7500 +-0.1250", "1.0000"],
    ]
