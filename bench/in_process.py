"""Serving without a server: our engine in this process, and Transformers + PEFT, against which its tokens are checked.

In: a base model, adapters, jobs (`harness.Job`). Out: runs without latencies, and what the check found. Only public faces are
used: `LLM` of ours, `generate` and `set_adapter` of theirs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from harness import Job, Run
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from perft_serve import LLM, SamplingParams

# How far the engine may be from the PEFT model in one dtype, as log-probability: bf16 rounds a logit of 20 to 0.06.
MAX_GAP = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
MAX_MEAN_ERROR = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


class Peft:
    """Transformers + PEFT, one adapter at a time; also what our tokens are checked against."""

    def __init__(self, model: str, adapters: Mapping[str, Path], dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # as the engine chooses
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map={"": self.device})
        first, *others = adapters
        self.model = PeftModel.from_pretrained(base, adapters[first], adapter_name=first).eval()
        for name in others:
            self.model.load_adapter(adapters[name], adapter_name=name)

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job], max_tokens: int) -> Run:
        groups: dict[str, list[str]] = {}
        for job in jobs:
            assert job.adapter is not None
            groups.setdefault(job.adapter, []).append(job.prompt)
        tokens, start = 0, time.perf_counter()
        for adapter, prompts in groups.items():
            self.model.set_adapter(adapter)
            inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
            inputs = inputs.to(self.device)
            output = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=max_tokens, min_new_tokens=max_tokens
            )
            tokens += len(prompts) * (output.shape[1] - inputs["input_ids"].shape[1])
        return Run(tokens=tokens, seconds=time.perf_counter() - start)

    @torch.inference_mode()
    def logprobs(self, prompt_ids: Sequence[int], output_ids: Sequence[int], adapter: str | None) -> Tensor:
        """Log-probabilities at each generated position, `[len(output_ids), V]`, float32."""
        if adapter is not None:
            self.model.set_adapter(adapter)
        with contextlib.nullcontext() if adapter is not None else self.model.disable_adapter():
            logits = self.model(input_ids=torch.tensor([[*prompt_ids, *output_ids]], device=self.device)).logits
        return logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1).cpu()


class Offline:
    """Our engine in this process, through `LLM`. No latencies: it gives the finished texts."""

    def __init__(self, model: str, adapters: Mapping[str, Path], dtype: str) -> None:
        self.llm = LLM(model, adapters={name: str(path) for name, path in adapters.items()}, dtype=dtype)

    def run(self, jobs: Sequence[Job], max_tokens: int) -> Run:
        start = time.perf_counter()
        results = self._generate(jobs, max_tokens)
        return Run(tokens=sum(len(ids) for _, ids, _ in results), seconds=time.perf_counter() - start)

    def close(self) -> None:
        """Gives the engine's memory back."""
        self.llm.close()

    def _generate(self, jobs: Sequence[Job], max_tokens: int) -> list[tuple[list[int], list[int], list[float]]]:
        """Per job: prompt ids, generated ids, and the log-probability of each generated token."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
        found = []
        for result in self.llm.generate([job.prompt for job in jobs], params, adapter=[job.adapter for job in jobs]):
            output = result.outputs[0]
            assert output.logprobs is not None
            chosen = [at[token] for at, token in zip(output.logprobs, output.token_ids, strict=True)]
            found.append((list(result.prompt_token_ids), list(output.token_ids), chosen))
        return found

    def check(self, jobs: Sequence[Job], max_tokens: int, peft: Peft, dtype: str) -> dict[str, float]:
        """Holds what the engine generates, all jobs in one batch, against the PEFT model.

        Raises:
            SystemExit: the tokens are not the PEFT model's.
        """
        gaps, errors, effects, agreed = [], [], [], []
        for job, (prompt_ids, output_ids, ours) in zip(jobs, self._generate(jobs, max_tokens), strict=True):
            chosen = torch.tensor(output_ids)[:, None]
            theirs_LV = peft.logprobs(prompt_ids, output_ids, job.adapter)
            theirs, without = (
                logprobs_LV.gather(1, chosen)[:, 0]
                for logprobs_LV in (theirs_LV, peft.logprobs(prompt_ids, output_ids, None))
            )
            gaps += (theirs_LV.amax(-1) - theirs).tolist()
            agreed += (theirs_LV.argmax(-1) == chosen[:, 0]).tolist()
            errors += (torch.tensor(ours) - theirs).abs().tolist()
            effects += (without - theirs).abs().tolist()
        found = {
            "argmax_agreement": round(mean(agreed), 4),
            "max_logprob_gap": round(max(gaps), 4),
            "mean_logprob_error": round(mean(errors), 5),
            "mean_logprob_effect_of_adapter": round(mean(effects), 5),
        }
        wrong = max(gaps) > MAX_GAP[dtype] or mean(errors) > MAX_MEAN_ERROR[dtype]
        if wrong or mean(errors) * 2 > mean(effects):
            raise SystemExit(
                f"bench: the engine's tokens are not those of the PEFT model, nothing was measured: {found}"
            )
        return found
