"""`LLM`: results in order, adapters per prompt, stop strings, log-probabilities, and nothing left behind by a bad prompt."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from perft.errors import AdapterError
from perft_serve import LLM, RequestError, SamplingParams, StructuredOutputsParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_base: Path, tiny_adapters: Mapping[str, str]) -> LLM:
    return LLM(str(tiny_base), tiny_adapters, dtype="float32", device="cpu", kv_memory=1 << 22)


@pytest.fixture(autouse=True)
def _nothing_is_left(llm: LLM) -> object:
    yield
    stats = llm.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts: list[str | list[int]] = ["hello world", [5, 6, 7], "the quick brown fox jumps over the lazy dog"]
    lengths = [9, 1, 4]
    results = llm.generate(prompts, [replace(GREEDY, max_tokens=length) for length in lengths])
    assert [result.prompt for result in results] == [prompts[0], None, prompts[2]]
    assert results[1].prompt_token_ids == [5, 6, 7]
    assert [len(result.outputs[0].token_ids) for result in results] == lengths
    assert {result.outputs[0].finish_reason for result in results} == {"length"}
    assert len({result.request_id for result in results}) == 3


def test_text_is_the_decoding_of_the_tokens(llm: LLM) -> None:
    assert llm.tokenizer is not None
    for result in llm.generate(["hello", "fox", "1 2 3"], replace(GREEDY, max_tokens=40, skip_special_tokens=False)):
        output = result.outputs[0]
        prompt = llm.tokenizer.decode(result.prompt_token_ids)
        assert output.text == llm.tokenizer.decode([*result.prompt_token_ids, *output.token_ids])[len(prompt) :]


def test_one_prompt_may_stand_alone(llm: LLM) -> None:
    (as_text,) = llm.generate("hello world", GREEDY)
    (as_ids,) = llm.generate(as_text.prompt_token_ids, GREEDY)
    assert as_text.outputs == as_ids.outputs
    assert llm.generate([], GREEDY) == []


def test_each_prompt_has_its_own_adapter(llm: LLM, tiny_adapters: Mapping[str, str]) -> None:
    names = [None, *tiny_adapters]
    mixed = llm.generate(["hello world"] * len(names), GREEDY, adapter=names)
    assert [result.adapter for result in mixed] == names
    assert len({tuple(result.outputs[0].token_ids) for result in mixed}) == len(names), "adapters make no difference"
    for name, result in zip(names, mixed, strict=True):
        (alone,) = llm.generate("hello world", GREEDY, adapter=name)
        assert alone.outputs == result.outputs


def test_log_probabilities_are_the_models_own(llm: LLM, tiny_base: Path) -> None:
    (result,) = llm.generate("hello world", replace(GREEDY, logprobs=3, prompt_logprobs=0))
    output = result.outputs[0]
    assert result.prompt_logprobs is not None
    assert output.logprobs is not None
    ids = [*result.prompt_token_ids, *output.token_ids]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert result.prompt_logprobs[0] is None
    given = [*result.prompt_logprobs[1:], *output.logprobs]
    for position, entry in enumerate(given):
        assert entry is not None
        assert entry[ids[position + 1]] == pytest.approx(expected[position, ids[position + 1]].item(), abs=1e-4)
    assert all(len(entry) == 3 for entry in output.logprobs), "a greedy token is among the likeliest"
    assert output.cumulative_logprob == pytest.approx(
        math.fsum(entry[token] for entry, token in zip(output.logprobs, output.token_ids, strict=True))
    )


def test_a_prompt_can_be_scored_only(llm: LLM) -> None:
    (result,) = llm.generate("hello world", SamplingParams(max_tokens=0, prompt_logprobs=2))
    assert result.outputs[0].token_ids == []
    assert result.outputs[0].text == ""
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (free,) = llm.generate("hello world", replace(GREEDY, max_tokens=30))
    text = free.outputs[0].text
    stop = text[7:10]
    (stopped,) = llm.generate("hello world", replace(GREEDY, max_tokens=30, stop=(stop,)))
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    assert len(stopped.outputs[0].token_ids) < 30
    (kept,) = llm.generate("hello world", replace(GREEDY, max_tokens=30, stop=(stop,), include_stop_str_in_output=True))
    assert kept.outputs[0].text == text[: text.index(stop) + len(stop)]


def test_a_stop_token_is_counted_but_not_shown(llm: LLM) -> None:
    (free,) = llm.generate("hello world", GREEDY)
    ids = free.outputs[0].token_ids
    (stopped,) = llm.generate("hello world", replace(GREEDY, stop_token_ids=(ids[4],)))
    end = ids.index(ids[4]) + 1
    assert stopped.outputs[0].token_ids == ids[:end]
    assert stopped.outputs[0].stop_reason == ids[4]
    assert free.outputs[0].text.startswith(stopped.outputs[0].text)


def test_n_completions_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=16, ignore_eos=True, prompt_logprobs=0)
    first, second = (llm.generate("hello world", params)[0] for _ in range(2))
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in first.outputs}) == 3
    assert first.outputs == second.outputs
    assert first.prompt_logprobs is not None
    (other,) = llm.generate("hello world", replace(params, seed=8))
    assert other.outputs[0].token_ids != first.outputs[0].token_ids


def test_structured_outputs(llm: LLM) -> None:
    date = StructuredOutputsParams(regex="[0-9]{4}-[0-9]{2}")
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1, n=2, structured_outputs=date)
    (result,) = llm.generate("hello", params, adapter="routed")
    for output in result.outputs:
        assert re.fullmatch("[0-9]{4}-[0-9]{2}", output.text)
        assert (output.finish_reason, output.stop_reason) == ("stop", None)
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(grammar="start: nowhere"))
    with pytest.raises(RequestError, match="unknown name") as caught:
        llm.generate(["hello", "there"], [params, bad])
    assert caught.value.param == "structured_outputs"


def test_chat_uses_the_template(llm: LLM) -> None:
    (result,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    assert result.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    two = llm.chat([[{"role": "user", "content": text}] for text in ("hi", "ho")], GREEDY, adapter=[None, "routed"])
    assert two[0].outputs == result.outputs
    assert two[1].adapter == "routed"
    asked = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (result,) = llm.chat(asked, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert result.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho"
    with pytest.raises(RequestError, match="set one of them to False"):
        llm.chat(asked, GREEDY, continue_final_message=True)
    with pytest.raises(RequestError, match="no place for tools"):
        llm.chat(asked, GREEDY, tools=[{"type": "function", "function": {"name": "go"}}])


def test_chat_with_tools(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}<tool>{{ tool.function.name }}</tool>{% endfor %}"
        "{% for message in messages %}{{ message.role }}: {{ message.content }}"
        "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}; {% endfor %}"
        "{% if mood %}({{ mood }}) {% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    llm = LLM(str(folder), dtype="float32", device="cpu", kv_memory=1 << 22)
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("go", "stop")
    ]
    call = {"id": "1", "type": "function", "function": {"name": "go", "arguments": {}}}
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done"},
    ]
    results = llm.chat([talk, talk[:1]], GREEDY, tools=tools, chat_template_kwargs={"mood": "calm"})
    llm.close()
    assert [result.prompt for result in results] == [
        "<tool>go</tool><tool>stop</tool>user: hi; assistant: <call>go</call>; tool: done; (calm) assistant: ",
        "<tool>go</tool><tool>stop</tool>user: hi; (calm) assistant: ",
    ]
    assert all(len(result.outputs[0].token_ids) == 12 for result in results)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([[]], "prompt is empty"),
        ([3, 10**6], "token id 1000000 at position 1 .* not in the vocabulary"),
        ([-1], "token id -1 at position 0"),
        ([[True]], "token ids must be integers"),
        ([1] * 300, "the prompt has 300 tokens, but the context is 256"),
        ([None], "a prompt must be a string or a list"),
        ("a\ud800", "lone surrogate"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(llm: LLM, prompt: object, message: str) -> None:
    steps = llm.engine.stats().num_steps
    with pytest.raises(RequestError, match=message):
        llm.generate(["good", prompt] if isinstance(prompt, str) else prompt, GREEDY)  # type: ignore[arg-type]
    assert llm.engine.stats().num_steps == steps


def test_bad_parameters_are_refused_before_anything_runs(llm: LLM) -> None:
    steps = llm.engine.stats().num_steps
    with pytest.raises(RequestError, match=r"max_tokens is 1000, .*256 tokens has room for 255"):
        llm.generate("hello", SamplingParams(max_tokens=1000))
    with pytest.raises(RequestError, match="there is no adapter 'nobody'"):
        llm.generate(["hello", "hello"], GREEDY, adapter=["routed", "nobody"])
    with pytest.raises(RequestError, match="adapter has 1 entries for 2 prompts"):
        llm.generate(["hello", "hello"], GREEDY, adapter=["routed"])
    with pytest.raises(RequestError, match="params must hold SamplingParams"):
        llm.generate(["hello"], [{"max_tokens": 3}])  # type: ignore[list-item]
    assert llm.engine.stats().num_steps == steps


def test_an_interrupted_batch_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step = llm.engine.step
    calls: list[None] = []

    def interrupted() -> object:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello", "world"], GREEDY)


def test_adapters_are_loaded_replaced_and_forgotten(tiny_base: Path, tiny_adapters: Mapping[str, str]) -> None:
    llm = LLM(str(tiny_base), dtype="float32", device="cpu", kv_memory=1 << 22)
    expected = {}
    for name, source in tiny_adapters.items():
        status = llm.load_adapter(name, source)
        assert (status.name, status.version, status.error) == (name, 1, None)
        (result,) = llm.generate("hello world", GREEDY, adapter=name)
        expected[name] = result.outputs[0].token_ids
    assert llm.load_adapter("routed", tiny_adapters["single"]).version == 2
    (replaced,) = llm.generate("hello world", GREEDY, adapter="routed")
    assert replaced.outputs[0].token_ids == expected["single"]
    with pytest.raises(AdapterError, match="does not exist"):
        llm.load_adapter("routed", "/nowhere")
    (kept,) = llm.generate("hello world", GREEDY, adapter="routed")
    assert kept.outputs == replaced.outputs
    for name in tiny_adapters:
        llm.unload_adapter(name)
        with pytest.raises(RequestError, match=f"there is no adapter '{name}'"):
            llm.generate("hello world", GREEDY, adapter=name)
    with pytest.raises(AdapterError, match="there is no adapter 'routed'"):
        llm.unload_adapter("routed")
    llm.engine.step()
    assert llm.engine.stats().adapters.host_used_bytes == 0
    llm.close()


def test_a_folder_of_adapters_is_loaded_from_when_asked(
    tiny_base: Path, tiny_adapters: Mapping[str, str], llm: LLM, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    other = LLM(str(tiny_base), adapter_dir=str(folder), dtype="float32", device="cpu", kv_memory=1 << 22)
    with pytest.raises(RequestError, match="there is no adapter 'dense'"):
        other.generate("hello world", GREEDY, adapter="dense")
    for name, source in tiny_adapters.items():
        shutil.copytree(source, folder / name)
    names = [*tiny_adapters]
    got = other.generate(["hello world"] * len(names), GREEDY, adapter=names)
    want = llm.generate(["hello world"] * len(names), GREEDY, adapter=names)
    assert [result.outputs for result in got] == [result.outputs for result in want]
    other.close()


def test_an_adapter_that_cannot_be_loaded_fails_its_own_prompts(llm: LLM) -> None:
    llm.catalog.register("gone", "/nowhere")
    good, bad = llm.generate(["hello world"] * 2, GREEDY, adapter=[None, "gone"])
    assert good.outputs[0].finish_reason == "length"
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].error == "adapter 'gone' could not be loaded: its folder does not exist"
    llm.catalog.remove("gone")


def test_the_beginning_that_prompts_share_is_computed_once(llm: LLM) -> None:
    prompt = list(range(5, 55))
    (first,) = llm.generate(prompt, GREEDY, adapter="dense")
    (again,) = llm.generate(prompt, GREEDY, adapter="dense")
    (other,) = llm.generate(prompt, GREEDY, adapter="single")
    assert [result.num_cached_tokens for result in (first, again, other)] == [0, 48, 0]
    assert first.outputs == again.outputs
    (several,) = llm.generate(prompt, replace(GREEDY, n=3), adapter="dense")
    assert several.num_cached_tokens == 48


def test_an_unknown_setting_is_refused(tiny_base: Path) -> None:
    with pytest.raises(TypeError, match="max_model_length"):
        LLM(str(tiny_base), max_model_length=3)


def test_a_base_without_tokenizer_serves_token_ids(tiny_base_without_tokenizer: Path) -> None:
    llm = LLM(str(tiny_base_without_tokenizer), dtype="float32", device="cpu", kv_memory=1 << 22)
    (result,) = llm.generate([5, 6, 7], GREEDY)
    assert len(result.outputs[0].token_ids) == 12
    assert result.outputs[0].text == ""
    with pytest.raises(RequestError, match="no tokenizer: send the prompt as token ids"):
        llm.generate("hello", GREEDY)
    with pytest.raises(RequestError, match="stop_token_ids"):
        llm.generate([5], replace(GREEDY, stop=("x",)))
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY)


def test_what_the_sampler_is_asked_for(llm: LLM) -> None:
    """The offline class passes it on; what comes of it, tests/engine/test_logits.py and tests/server/test_sampling.py say."""
    (free,) = llm.generate("hello world", GREEDY)
    assert llm.tokenizer is not None
    first = free.outputs[0].token_ids[0]
    (biased,) = llm.generate("hello world", replace(GREEDY, logit_bias={first: -100.0}, repetition_penalty=1.2))
    assert first not in biased.outputs[0].token_ids
    word = free.outputs[0].text[:4]
    (other,) = llm.generate("hello world", replace(GREEDY, bad_words=(word,)))
    assert not other.outputs[0].text.startswith(word)
    (cut,) = llm.generate("hello world", replace(GREEDY, truncate_prompt_tokens=2))
    assert cut.prompt_token_ids == free.prompt_token_ids[-2:]
    with pytest.raises(RequestError, match="start it with --scheduling-policy priority"):
        llm.generate("hello world", GREEDY, priority=3)


def test_routing_of_the_first_completion_has_the_prompts(llm: LLM) -> None:
    (result,) = llm.generate("hello world", replace(GREEDY, n=2, return_routing=True), adapter="routed")
    num_prompt = len(result.prompt_token_ids)
    for output, start in zip(result.outputs, (0, num_prompt), strict=True):
        assert output.routing is not None
        assert output.routing.start == start
        assert len(output.routing.ids) == num_prompt + len(output.token_ids) - 1 - start
    (silent,) = llm.generate("hello world", GREEDY, adapter="routed")
    assert silent.outputs[0].routing is None
    with pytest.raises(RequestError, match="the base has no adapter experts"):
        llm.generate("hello world", replace(GREEDY, return_routing=True))
