"""lm-evaluation-harness on our engine: a base with or without an adapter as one of its models.

In: an `LLM`, the name of one of its adapters. Out: log-likelihoods and texts as lm-eval asks for them, the same as those of its
own `hf` model; and what lm-eval makes of them. Needs lm-eval (extra `lm-eval`); only `perft eval` imports this, when a task's
name begins with `lm_eval:`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM, TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from perft.errors import PerftError
from perft_serve.engine.params import RequestError, SamplingParams
from perft_serve.llm import LLM
from perft_serve.outputs import RequestOutput

DEFAULT_MAX_TOKENS = 256
"""lm-eval's own, where a task does not say how long a text may be."""

_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})


class EngineLM(TemplateLM):
    """One of the models of an `LLM`.

    Args:
        llm: the base, its adapters loaded.
        adapter: which of them; `None`: the base alone.
        seed: of texts that are sampled.

    Raises:
        PerftError: the base has no tokenizer.
    """

    def __init__(self, llm: LLM, adapter: str | None, seed: int = 0) -> None:
        super().__init__()
        if llm.tokenizer is None:
            raise PerftError(f"the base {llm.config.model!r} has no tokenizer, which evaluation needs")
        self.llm = llm
        self.adapter = adapter
        self.seed = seed
        self.tokenizer = AutoTokenizer.from_pretrained(llm.config.model)
        # a window of lm-eval's is what goes in; the last token of what is scored comes on top
        self.max_length = llm.engine.limits.max_model_len - 1

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds unless the text has them already."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos is not None and string.startswith(bos):
            add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **settings)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        prompts = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise PerftError(
                    f"a text of {len(continuation)} tokens is to be scored, which the context of "
                    f"{self.llm.engine.limits.max_model_len} has no room for"
                )
            prompts.append([*context, *continuation][-self.max_length - 1 :])
        # the contexts of a question's choices, and what examples stand before questions, are computed once
        params = [
            SamplingParams(
                max_tokens=0,
                prompt_logprobs=1,
                prompt_logprobs_start=len(prompt) - max(1, len(continuation)),
                temperature=0.0,
            )
            for prompt, (_, _, continuation) in zip(prompts, requests, strict=True)
        ]
        outputs = self._generate(prompts, params)
        found = []
        for (text, _, continuation), output in zip(requests, outputs, strict=True):
            assert output.prompt_logprobs is not None
            first = len(output.prompt_token_ids) - len(continuation)
            total, greedy = 0.0, True
            for token_id, entry in zip(output.prompt_token_ids[first:], output.prompt_logprobs[first:], strict=True):
                assert entry is not None
                total += entry[token_id]
                greedy = greedy and entry[token_id] >= max(entry.values())
            found.append((total, greedy))
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, longer ones in windows that do not overlap."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            own = [
                (None, *make_disjoint_window(pair))
                for pair in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, the end of text, or a number of tokens."""
        prompts, params = [], []
        for number, request in enumerate(requests):
            context, settings = request.args
            params.append(self._sampling(settings, number))
            room = self.llm.engine.limits.max_model_len - (params[-1].max_tokens or 0)
            if room < 1:
                raise PerftError(
                    f"texts of {params[-1].max_tokens} tokens are asked for, which the context of "
                    f"{self.llm.engine.limits.max_model_len} has no room for"
                )
            prompts.append(self.tok_encode(context)[-room:])
        texts = [output.outputs[0].text for output in self._generate(prompts, params)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sampling(self, settings: dict[str, Any], number: int) -> SamplingParams:
        known = dict(normalize_gen_kwargs(settings, DEFAULT_MAX_TOKENS))
        sampled = known.pop("do_sample")
        stop = tuple(text for text in known.pop("until") if text)
        max_tokens = known.pop("max_gen_toks")
        unknown = sorted(name for name in known if name not in _SAMPLING)
        if unknown:
            raise PerftError(f"a task asks for {', '.join(unknown)}, which the engine does not know")
        if not sampled:
            known = {name: value for name, value in known.items() if name == "repetition_penalty"} | {
                "temperature": 0.0
            }
        try:
            return SamplingParams(max_tokens=max_tokens, stop=stop, seed=self.seed + number, **known)
        except RequestError as error:
            raise PerftError(f"a task's generation settings cannot be used: {error}") from error

    def _generate(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """In batches, which only bound the memory for what is told."""
        outputs: list[RequestOutput] = []
        size = 4 * self.llm.config.max_num_seqs
        for start in range(0, len(prompts), size):
            chunk = slice(start, start + size)
            outputs += self.llm.generate(list(prompts[chunk]), list(params[chunk]), adapter=self.adapter)
        for output in outputs:
            if output.outputs[0].error is not None:
                raise PerftError(f"the engine could not answer for {self.adapter or 'base'}: {output.outputs[0].error}")
        return outputs


def find_tasks(names: Sequence[str], include_path: str | None = None) -> TaskManager:
    """lm-eval's index of tasks, once it is known to hold these.

    Args:
        names: lm-eval's.
        include_path: a folder with tasks of one's own, as YAML.

    Raises:
        PerftError: there is no such task.
    """
    manager = TaskManager(include_path=include_path)
    unknown = sorted(set(names) - set(manager.match_tasks(list(names))))
    if unknown:
        raise PerftError(f"lm-eval has no task {', '.join(unknown)}; --include-path adds a folder of your own")
    return manager


def run_tasks(
    model: LM,
    names: Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    bootstrap_iters: int = 100_000,
) -> dict[str, Any]:
    """What lm-eval says of a model.

    Args:
        names: of tasks that `manager` knows.
        num_fewshot: examples before each question (default: the task's own).
        limit: of each task, the first so many questions.
        seed: of lm-eval's draws.
        bootstrap_iters: for standard errors that have no formula; lm-eval's default.

    Returns:
        lm-eval's results: `results`, `versions`, `n-shot`, `samples`, ...

    Raises:
        PerftError: a task's data cannot be had, or it asks for what the engine does not know.
    """
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=bootstrap_iters,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except PerftError:
        raise
    except (OSError, ValueError) as error:
        raise PerftError(f"lm-eval could not run {', '.join(names)}: {' '.join(str(error).split())[:500]}") from error
    assert found is not None
    return dict(found)
