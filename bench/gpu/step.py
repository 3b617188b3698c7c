"""What only a GPU can show, on a random model of OLMoE-1B-7B's shape or Mixtral-8x7B's: that the engine is right, and how fast
a step is. The model is made on the device whenever it is wanted: nothing is read or written but adapters.

    python bench/gpu/step.py [PART ...] [--model mixtral-8x7b] [--tiny]

Parts, each a matter of minutes (README.md beside this file says what each should show):

    oracle      the authors' own logits, through the engine (tests/engine/test_oracle.py)
    tokens      float32: greedy tokens of the engine are those of Transformers, 32 prompts in one batch
    bits        bfloat16: requests alone and among 64, graphs on: which tokens and log-probabilities differ in any bit, as it
                is and with --batch-invariant on (there, none may)
    base        decode step of the base at batch 1 and 64, context 512: against the floor of the memory, and Transformers
    profile     what the device does in such a step, base and adapters: its kernels, how often, how long
    capture     how long capturing every decode step at the start takes, and that all of them can be
    invariant   what --batch-invariant on costs: decode step and prefill against the same without it
    linears     our linear layer (that of --batch-invariant) against torch's, from 1 to 8192 tokens
    adapters    decode step of 64 sequences on 64 adapters, PERFT-R and PERFT-E, against the base in the same engine
    registered  decode step of 64 sequences on 64 adapters, with 64 and with 2,000 of them in memory
    prefill     64 prompts of 512 tokens, each on its own adapter, against the base
    experts     our base experts against Transformers' grouped_mm, from 1 to 8192 tokens

The engine is driven as its server drives it, one `step` after the other, without HTTP. A part that should show something exact
ends the run if it does not. `--tiny` runs the same on a tiny model, on a CPU too; its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from transformers import MixtralConfig, OlmoeConfig, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import CACHE, RESULTS, ROOT, surroundings, write_result
from models import AdapterMaker

from perft.base import build_skeleton, random_base
from perft.config import Variant
from perft.moe import find_moe_blocks
from perft_kernels.linear import stored_linear
from perft_kernels.moe_experts import stored_experts
from perft_kernels.native import library
from perft_serve.adapters.catalog import AdapterCatalog
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.decode_graphs import DecodeGraphs, buckets
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest, TokenEvent
from perft_serve.engine.params import SamplingParams

_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A model, and how much of everything is asked for."""

    name: str
    config: PreTrainedConfig
    batch: int = 64
    context: int = 512
    steps: int = 100
    prompts: int = 32
    registered: int = 2000
    rank: int = 8
    most_tokens: int = 8192
    kv_memory: int = 12 << 30
    copied_bytes: int = 1 << 30


# The defaults of OlmoeConfig and MixtralConfig are the shapes of these two.
OLMOE = Size(name="olmoe-1b-7b", config=OlmoeConfig(**_NO_TOKENS, norm_topk_prob=False))
MIXTRAL = Size(name="mixtral-8x7b", config=MixtralConfig(**_NO_TOKENS), registered=256)
TINY = Size(
    name="olmoe-tiny",
    config=OlmoeConfig(
        **_NO_TOKENS,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    ),
    batch=4,
    context=24,
    steps=3,
    prompts=3,
    registered=6,
    rank=2,
    most_tokens=32,
    kv_memory=1 << 22,
    copied_bytes=1 << 20,
)
SIZES = {size.name: size for size in (OLMOE, MIXTRAL)}


class Bench:
    """A random model, which is made on the device whenever it is wanted, and what the parts do with it.

    Args:
        size: of the model and of all that is asked of it.
        scratch: folder for the model's config, which stays there, and for adapters, which do not.
    """

    def __init__(self, size: Size, scratch: Path) -> None:
        self.size, self.scratch, self.config = size, scratch, size.config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = scratch / f"random-{size.name}"
        self.config.save_pretrained(self.folder)

    def model(self, dtype: str = "bfloat16") -> Any:
        """The engine's model, as Transformers has it."""
        return random_base(self.config, dtype, self.device).eval()

    def clean(self) -> None:
        """Give memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        """Random token ids; no two prompts begin alike."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config.vocab_size, (count, length), generator=generator).tolist()

    @contextmanager
    def engine(
        self, adapters: dict[str, Path] | None = None, dtype: str = "bfloat16", **settings: Any
    ) -> Iterator[Engine]:
        """An engine with these adapters in its memory."""
        size = self.size
        adapters = adapters or {}
        weight = sum(file.stat().st_size for path in adapters.values() for file in path.glob("*.safetensors"))
        engine = Engine(
            EngineConfig(
                model=str(self.folder),
                adapters={name: str(path) for name, path in adapters.items()},
                dtype=dtype,
                load_format="dummy",
                kv_memory=size.kv_memory,
                adapter_memory=max(int(weight * 1.1), 1 << 20),
                host_adapter_memory=max(int(weight * 1.1), 1 << 20),
                max_num_seqs=size.batch,
                max_num_batched_tokens=max(size.most_tokens, size.batch),
                prefix_caching="off",
                **settings,
            )
        )
        try:
            yield engine
        finally:
            engine.close()
            del engine
            self.clean()

    def decode_ms(self, engine: Engine, names: Sequence[str | None], seed: int) -> float:
        """Milliseconds of a decode step of so many sequences at a context of `context`, median of three rounds."""
        size, times = self.size, []
        for round_ in range(3):
            self.start(engine, names, seed + round_, size.steps + 8)
            start = time.perf_counter()
            for _ in range(size.steps):
                events = checked(engine.step())
                assert len(events) == len(names)
            times.append((time.perf_counter() - start) / size.steps * 1e3)
            engine.abort_all()
        return median(times)

    def requests(self, names: Sequence[str | None], seed: int, max_tokens: int) -> list[EngineRequest]:
        """One for each name, with random prompts of `context` tokens."""
        prompts = self.prompts(len(names), self.size.context, seed)
        both = zip(prompts, names, strict=True)
        return [make_request(str(i), prompt, name, max_tokens) for i, (prompt, name) in enumerate(both)]

    def start(self, engine: Engine, names: Sequence[str | None], seed: int, max_tokens: int) -> None:
        """Bring sequences so far that every further step decodes, and is compiled and captured."""
        requests = self.requests(names, seed, max_tokens)
        for request in requests:
            engine.submit(request)
        started: set[str] = set()
        while len(started) < len(requests):
            started |= {event.request_id for event in checked(engine.step())}
        for _ in range(2):
            engine.step()
        self.synchronize()

    def prefill_rate(self, engine: Engine, names: Sequence[str | None], seed: int) -> float:
        """Prompt tokens a second until all of them have their first token, median of three rounds after a first."""
        times = []
        for round_ in range(4):
            requests = self.requests(names, seed + round_, 1)
            start = time.perf_counter()
            finish(engine, requests)
            times.append(time.perf_counter() - start)
        return len(names) * self.size.context / median(times[1:])

    @torch.inference_mode()
    def seconds_each(self, run: Callable[[Any], Any], subjects: Sequence[Any]) -> float:
        """Of `run` for one of the subjects, all of them in turn; the best of three rounds after a first."""
        samples = []
        for _ in range(4):
            self.synchronize()
            start = time.perf_counter()
            for subject in subjects:
                run(subject)
            self.synchronize()
            samples.append((time.perf_counter() - start) / len(subjects))
        return min(samples[1:])

    @property
    def can_be_invariant(self) -> bool:
        """Whether `--batch-invariant on` is there: on a GPU, or on a CPU with compiled kernels."""
        return self.device.type == "cuda" or library() is not None

    def adapters(self, count: int, folder: str, variant: Variant, rank: int | None = None) -> dict[str, Path]:
        """Random adapters."""
        return AdapterMaker(self.folder).make(count, Path(folder), variant=variant, r=rank or self.size.rank)


@contextmanager
def overlapping() -> Iterator[None]:
    """Kernels may begin while the ones before them end: `perft_kernels.gpu.launch`."""
    os.environ["PERFT_PDL"] = "1"
    try:
        yield
    finally:
        del os.environ["PERFT_PDL"]


def make_request(
    request_id: str, prompt: Sequence[int], name: str | None, max_tokens: int, logprobs: int | None = None
) -> EngineRequest:
    """A greedy request."""
    return EngineRequest(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        adapter=None if name is None else AdapterCatalog({name: "given at the start"}).resolve(name),
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs),
    )


def checked(events: list[TokenEvent]) -> list[TokenEvent]:
    """The events, none of which is an error."""
    for event in events:
        if event.error is not None:
            raise SystemExit(f"step: request {event.request_id}: {event.error}")
    return events


def finish(engine: Engine, requests: Sequence[EngineRequest]) -> dict[str, list[tuple[int, float]]]:
    """Tokens and log-probabilities of each request."""
    for request in requests:
        engine.submit(request)
    found: dict[str, list[tuple[int, float]]] = {request.request_id: [] for request in requests}
    left = len(requests)
    while left:
        if not engine.has_work():
            engine.wait(60)
        for event in checked(engine.step()):
            assert event.token_id is not None
            logprob = event.logprobs.logprob if event.logprobs is not None else 0.0
            found[event.request_id].append((event.token_id, logprob))
            left -= event.finish_reason is not None
    return found


def oracle(_bench: Bench) -> dict[str, Any]:
    """The test says it all."""
    test = ROOT / "tests" / "engine" / "test_oracle.py"
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", str(test)], cwd=ROOT, check=False)
    if run.returncode:
        raise SystemExit("step: the authors' logits are not met")
    return {"cases": 18}


def tokens(bench: Bench) -> dict[str, Any]:
    """The engine's greedy tokens against those of Transformers' `generate`."""
    count, num_tokens = bench.size.prompts, 16
    prompts = bench.prompts(count, bench.size.context // 4, seed=1)
    with bench.engine(dtype="float32") as engine:
        ours = finish(engine, [make_request(str(i), prompt, None, num_tokens) for i, prompt in enumerate(prompts)])
    model = bench.model("float32")
    settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
    different = []
    for i, prompt in enumerate(prompts):  # one at a time: nothing padded, nothing that depends on the others
        ids = torch.tensor([prompt], device=bench.device)
        with torch.inference_mode():
            theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
        if theirs != [token for token, _ in ours[str(i)]]:
            different.append(i)
    del model
    bench.clean()
    if different:
        raise SystemExit(f"step: prompts {different} get other tokens than from Transformers")
    return {"prompts": count, "tokens_each": num_tokens}


def bits(bench: Bench) -> dict[str, Any]:
    """How many requests differ in any bit of their tokens' log-probabilities between alone and among others.

    Our kernels do not let a row depend on the others; a GEMM of torch's may choose another kernel for another batch size.
    """
    size = bench.size
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        adapters = bench.adapters(size.batch // 2, folder, "R")
        names: list[str | None] = [*adapters, *[None] * (size.batch - len(adapters))]
        prompts = bench.prompts(size.batch, size.context // 4, seed=2)
        both = zip(prompts, names, strict=True)
        requests = [make_request(str(i), prompt, name, 16, logprobs=0) for i, (prompt, name) in enumerate(both)]
        found: dict[str, Any] = {}
        for invariant in ("off", "on") if bench.can_be_invariant else ("off",):
            with bench.engine(adapters, batch_invariant=invariant) as engine:
                together = finish(engine, requests)
                again = finish(engine, requests)
                alone: dict[str, list[tuple[int, float]]] = {}
                for request in requests[:: max(1, size.batch // 16)]:
                    alone |= finish(engine, [request])
            if together != again:
                raise SystemExit("step: the same batch has given two different results")
            if bench.device.type == "cuda":
                with overlapping(), bench.engine(adapters, batch_invariant=invariant) as engine:
                    if finish(engine, requests) != together:
                        raise SystemExit("step: with PERFT_PDL=1 the same batch gives another result")
            mode = "_invariant" if invariant == "on" else ""
            found[f"requests_alone{mode}"] = len(alone)
            found[f"other_tokens{mode}"] = sum([t for t, _ in alone[i]] != [t for t, _ in together[i]] for i in alone)
            found[f"other_bits{mode}"] = sum(alone[i] != together[i] for i in alone)
    if found.get("other_bits_invariant"):
        raise SystemExit(f"step: with --batch-invariant on, requests depend on their neighbours: {found}")
    return found


def copy_bandwidth(bench: Bench) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(bench.size.copied_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        bench.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        bench.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def step_bytes(bench: Bench, batch: int) -> float:
    """Bytes that a decode step of the base must read: weights once, of the base experts those that are chosen (as many as
    independent choices make of them), keys and values of the context.
    """
    c: Any = bench.config
    num_experts = find_moe_blocks(build_skeleton(c))[0].num_experts
    head = c.hidden_size // c.num_attention_heads
    attention = c.hidden_size * head * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    chosen = num_experts * (1 - (1 - c.num_experts_per_tok / num_experts) ** batch)
    experts = chosen * 3 * c.hidden_size * c.intermediate_size
    kv = batch * bench.size.context * 2 * c.num_key_value_heads * head
    layer = attention + experts + c.hidden_size * num_experts + kv
    return 2.0 * (c.num_hidden_layers * layer + c.vocab_size * c.hidden_size)


def transformers_ms(bench: Bench, model: Any, batch: int, **settings: Any) -> float | str:
    """Milliseconds of a decode step of `generate`; or why there is no number."""
    ids = torch.tensor(bench.prompts(batch, bench.size.context, seed=3), device=bench.device)
    seconds = {}
    try:
        for _ in range(2):  # the first round compiles
            for num_tokens in (1, bench.size.steps + 1):
                bench.synchronize()
                start = time.perf_counter()
                with torch.inference_mode():
                    model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=False,
                        min_new_tokens=num_tokens,
                        max_new_tokens=num_tokens,
                        **settings,
                    )
                bench.synchronize()
                seconds[num_tokens] = time.perf_counter() - start
    except Exception as error:  # of a peer: reported, and no reason to lose our own numbers
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return (seconds[bench.size.steps + 1] - seconds[1]) / bench.size.steps * 1e3


def base(bench: Bench) -> dict[str, Any]:
    """The base alone."""
    bandwidth = copy_bandwidth(bench)
    found: dict[str, Any] = {"copy_gb_per_s": bandwidth / 1e9}
    batches = (1, bench.size.batch)
    ways: dict[str, dict[str, Any]] = {
        "_eager": {"cuda_graphs": "off"},
        "_one_step_at_a_time": {"async_scheduling": "off"},
    }
    if bench.device.type == "cuda":
        ways = {"": {}, "_pdl": {}, "_not_fused": {}, **ways}
    for label, settings in ways.items():
        with overlapping() if label == "_pdl" else nullcontext(), bench.engine(**settings) as engine:
            if label == "_not_fused":
                programs = engine._runner._programs
                assert isinstance(programs, DecodeGraphs)
                programs._fuse = lambda step: step
            for batch in batches:
                found[f"ours_ms_{batch}{label}"] = bench.decode_ms(engine, [None] * batch, seed=10)
    model = bench.model()
    for batch in batches:
        floor = step_bytes(bench, batch) / bandwidth * 1e3
        ours = found.get(f"ours_ms_{batch}", found[f"ours_ms_{batch}_eager"])
        found |= {f"floor_ms_{batch}": floor, f"of_floor_{batch}": floor / ours}
        found[f"transformers_eager_ms_{batch}"] = transformers_ms(bench, model, batch)
        if bench.device.type == "cuda":  # where `generate` compiles with a static cache
            found[f"transformers_static_ms_{batch}"] = transformers_ms(
                bench, model, batch, cache_implementation="static"
            )
    return found


def adapters(bench: Bench) -> dict[str, Any]:
    """Every sequence on an adapter of its own."""
    found: dict[str, Any] = {}
    for variant in ("R", "E"):
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            made = bench.adapters(bench.size.batch, folder, variant)
            for label, overlap in (("", nullcontext), ("_pdl", overlapping)):
                if label and bench.device.type != "cuda":
                    continue
                with overlap(), bench.engine(made) as engine:
                    alone = bench.decode_ms(engine, [None] * bench.size.batch, seed=20)
                    mixed = bench.decode_ms(engine, list(made), seed=30)
                times = {"base_ms": alone, "mixed_ms": mixed, "kept": alone / mixed}
                found |= {f"{variant}_{name}{label}": value for name, value in times.items()}
    return found


def profile(bench: Bench) -> dict[str, Any]:
    """Microseconds and launches of each kernel in a decode step, the longest first."""
    size = bench.size
    found: dict[str, Any] = {}
    activity = ProfilerActivity.CUDA if bench.device.type == "cuda" else ProfilerActivity.CPU
    of_time = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    steps = min(10, size.steps)
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        made = bench.adapters(size.batch, folder, "R")
        with bench.engine(made) as engine:
            cases: dict[str, list[str | None]] = {"1": [None], f"{size.batch}": [None] * size.batch, "R": [*made]}
            for label, names in cases.items():
                bench.start(engine, names, seed=60, max_tokens=steps + 8)
                with torch_profile(activities=[activity]) as profiler:
                    for _ in range(steps):
                        checked(engine.step())
                    bench.synchronize()
                engine.abort_all()
                rows = kernel_rows(profiler, of_time, steps)
                found |= {f"{label}: {row}": value for row, value in rows.items()}
    return found


def kernel_rows(profiler: Any, of_time: str, steps: int) -> dict[str, str]:
    """A line for each of the 16 kernels that take longest, and one for all of them. What takes no such time, as the host's
    calls on a GPU, is none.
    """
    events = [(getattr(event, of_time), event) for event in profiler.key_averages()]
    rows = sorted(((us / steps, event.count / steps, event.key) for us, event in events if us), reverse=True)
    total, launches = (sum(row[i] for row in rows) for i in (0, 1))
    found = {"all kernels": f"{total:.1f} us in {launches:.0f}"}
    for microseconds, count, name in rows[:16]:
        found[name[:60]] = f"{microseconds:.1f} us in {count:.0f}"
    return found


def invariant(bench: Bench) -> dict[str, Any]:
    """Times with `--batch-invariant on` over those without."""
    if not bench.can_be_invariant:
        return {"skipped": "it takes a GPU, or a CPU with compiled kernels"}
    size = bench.size
    found: dict[str, Any] = {}
    for mode in ("off", "on"):
        with bench.engine(batch_invariant=mode) as engine:
            for batch in (1, size.batch):
                found[f"decode_ms_{batch}_{mode}"] = bench.decode_ms(engine, [None] * batch, seed=70)
            found[f"prefill_tokens_per_s_{mode}"] = bench.prefill_rate(engine, [None] * size.batch, seed=80)
    for batch in (1, size.batch):
        found[f"decode_cost_{batch}"] = found[f"decode_ms_{batch}_on"] / found[f"decode_ms_{batch}_off"]
    found["prefill_cost"] = found["prefill_tokens_per_s_off"] / found["prefill_tokens_per_s_on"]
    return found


def capture(bench: Bench) -> dict[str, Any]:
    """Seconds until a server with `--cuda-graphs start` has captured every step it may need."""
    if bench.device.type != "cuda":
        return {"skipped": "there is no GPU"}
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        made = bench.adapters(1, folder, "R")
        start = time.perf_counter()
        with bench.engine(made, cuda_graphs="off"):
            without = time.perf_counter() - start
        start = time.perf_counter()
        with bench.engine(made, cuda_graphs="start") as engine:
            seconds = time.perf_counter() - start
            programs = engine._runner._programs
            assert isinstance(programs, DecodeGraphs)
            captured, wanted = programs.num_captured, 2 * len(buckets(bench.size.batch))
            bench.decode_ms(engine, list(made), seed=90)
            bench.decode_ms(engine, [None], seed=90)
            if captured != wanted or programs.num_captured != wanted:
                raise SystemExit(
                    f"step: {captured} steps captured at the start and {programs.num_captured} in all, not {wanted}"
                )
    return {"captured": captured, "seconds": seconds - without, "start_without_seconds": without}


def registered(bench: Bench) -> dict[str, Any]:
    """Few adapters in memory, and many."""
    found: dict[str, Any] = {}
    size = bench.size
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        made = bench.adapters(size.registered, folder, "R", rank=max(1, size.rank // 2))
        used = list(made)[:: max(1, size.registered // size.batch)][: size.batch]
        for count, those in ((size.batch, {name: made[name] for name in used}), (size.registered, made)):
            with bench.engine(those) as engine:
                found[f"ms_{count}"] = bench.decode_ms(engine, used, seed=40)
    found["flat"] = found[f"ms_{size.batch}"] / found[f"ms_{size.registered}"]
    return found


def prefill(bench: Bench) -> dict[str, Any]:
    """Prompts, each on an adapter of its own; tokens a second until all have their first token."""
    size, found = bench.size, {}
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        made = bench.adapters(size.batch, folder, "R")
        with bench.engine(made) as engine:
            for label, names in (("base", [None] * size.batch), ("mixed", list(made))):
                found[f"{label}_tokens_per_s"] = bench.prefill_rate(engine, names, seed=50)
    found["kept"] = found["mixed_tokens_per_s"] / found["base_tokens_per_s"]
    return found


def experts(bench: Bench) -> dict[str, Any]:
    """One MoE block's base experts; layers take turns, so that weights come from memory and not from a cache."""
    model = bench.model()
    blocks = [model.get_submodule(block.name) for block in find_moe_blocks(model)]
    c: Any = bench.config
    theirs = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def ours(block: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        stored = (block.gate_up_proj, block.down_proj, None, None, False, False, 1.0, 0.0)
        return stored_experts(hidden_states, top_k_index, top_k_weights, *stored)

    found: dict[str, Any] = {}
    num_tokens = 1
    while num_tokens <= bench.size.most_tokens:
        h = torch.randn(num_tokens, c.hidden_size, device=bench.device, dtype=torch.bfloat16)
        scores = torch.rand(num_tokens, blocks[0].num_experts, device=bench.device)
        weights, ids = scores.topk(c.num_experts_per_tok)
        given = {"hidden_states": h, "top_k_index": ids, "top_k_weights": weights.to(h.dtype)}
        times = {
            label: bench.seconds_each(partial(run, **given), blocks)
            for label, run in (("ours", ours), ("grouped_mm", theirs))
        }
        found[f"ours_us_{num_tokens}"] = times["ours"] * 1e6
        found[f"speedup_{num_tokens}"] = times["grouped_mm"] / times["ours"]
        num_tokens *= 4
    return found


def linears(bench: Bench) -> dict[str, Any]:
    """Linear layers of the base's shapes; weights take turns, so that they come from memory and not from a cache."""
    c: Any = bench.config
    found: dict[str, Any] = {}
    shapes = {"qkv": (3 * c.hidden_size, 16), "o": (c.hidden_size, 16), "head": (c.vocab_size, 2)}
    for label, (num_rows, count) in shapes.items():
        shape = (count, num_rows, c.hidden_size)
        weights = list(torch.randn(shape, device=bench.device, dtype=torch.bfloat16))
        num_tokens = 1
        while num_tokens <= bench.size.most_tokens:
            x = torch.randn(num_tokens, c.hidden_size, device=bench.device, dtype=torch.bfloat16)
            ours = bench.seconds_each(partial(stored_linear, x, bias_N=None), weights)
            torchs = bench.seconds_each(partial(F.linear, x), weights)
            found[f"{label}_us_{num_tokens}"] = ours * 1e6
            found[f"{label}_speedup_{num_tokens}"] = torchs / ours
            num_tokens *= 4
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    part.__name__: part
    for part in (
        oracle,
        tokens,
        bits,
        base,
        profile,
        capture,
        adapters,
        registered,
        prefill,
        invariant,
        experts,
        linears,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--model", choices=SIZES, default=OLMOE.name, help=f"its shape (default {OLMOE.name})")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too: that the bench itself works")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_step.jsonl", help="file to append the result to")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here (--tiny runs on a CPU)")
    load = os.getloadavg()[0]
    size, scratch = (TINY, Path(tempfile.mkdtemp())) if options.tiny else (SIZES[options.model], CACHE / "bench")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(Bench(size, scratch), options.parts or list(PARTS))
    finally:
        if options.tiny:
            shutil.rmtree(scratch)
    write_result(options.results, {"bench": "gpu-step", **surroundings(load), "model": size.name, "parts": found})


def measure(bench: Bench, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the parts found, printed as they find it."""
    found = {}
    for part in parts:
        start = time.perf_counter()
        found[part] = PARTS[part](bench)
        print(f"\n{part} ({time.perf_counter() - start:.0f} s)")
        for name, value in found[part].items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            print(f"  {name:<28}{shown:>12}", flush=True)
    return found


if __name__ == "__main__":
    main()
