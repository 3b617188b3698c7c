"""Training, side by side: a step of our layer against plain PyTorch and PEFT's LoRA, and many adapters in one run against one
run after the other.

    python bench/training.py                      # the demo base, sized for two CPU cores: some six minutes
    python bench/training.py step --model .cache/bench/random-olmoe-1b-7b --batch 16 --length 256   # on a GPU

Parts:

    step    a training step of PERFT-R (2 of 8, r 16) through our op; the same adapter in plain PyTorch, which goes through the
            adapter experts one after the other, as the authors' code does; PEFT's LoRA on q and v with as many activated
            parameters. Tokens a second, and on a GPU the most memory. Ours and the plain one must have the same losses.
    fleet   `--adapters` recipes, each on data of its own: `train-many` against `train` once for each. Every adapter must end
            with the loss that it has alone.

The base is in bfloat16 on a GPU and in float32 on a CPU; adapters and optimiser are in float32. Ways take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from harness import RESULTS, ROOT, surroundings, write_result
from models import find_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from perft.base import load_base, load_config, random_base
from perft.config import PerftConfig
from perft.fleet import train_many
from perft.lora import LoraRecipe
from perft.provenance import read_record
from perft.recipe import TrainConfig
from perft.train import train

DATA = ROOT / "demo" / "data"
ADAPTER = PerftConfig(variant="R", num_experts=8, top_k=2, r=16)


def plain_units(
    y_TD: Tensor,
    h_TD: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    down_SD: Tensor,
    up_SD: Tensor,
    first_row_E: Tensor,
    up_row_E: Tensor,
    rank_E: Tensor,
    scale_E: Tensor,
    silu_E: Tensor,
    mask_TXR: Tensor | None,
) -> Tensor:
    """`perft_kernels.routed_units` as one writes it without kernels: an adapter expert after the other, with its tokens."""
    assert mask_TXR is None
    for e, (down, up, rank) in enumerate(zip(first_row_E.tolist(), up_row_E.tolist(), rank_E.tolist(), strict=True)):
        tokens_N, slots_N = (ids_TX == e).nonzero(as_tuple=True)
        x_NR = h_TD[tokens_N].to(down_SD.dtype) @ down_SD[down : down + rank].T
        x_NR = F.silu(x_NR) if silu_E[e] else x_NR
        delta_ND = (x_NR @ up_SD[up : up + rank]) * (scale_E[e] * weights_TX[tokens_N, slots_N]).unsqueeze(1)
        y_TD = y_TD.index_add(0, tokens_N, delta_ND.to(y_TD.dtype))
    return y_TD


@dataclass(kw_only=True, slots=True)
class Way:
    """A model in training.

    Args:
        model: with its adapter.
        surrounding: what has to be in force while it runs.
        losses, seconds: of its steps.
        peak_bytes: the most memory on the GPU in one of them; 0 on a CPU.
    """

    model: PeftModel
    optimiser: torch.optim.Optimizer
    surrounding: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    losses: list[float]
    seconds: list[float]
    peak_bytes: int = 0

    def step(self, ids_BT: Tensor) -> None:
        """Forward, backward, optimiser."""
        on_gpu = ids_BT.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        with self.surrounding():
            loss = self.model(input_ids=ids_BT, labels=ids_BT).loss
            loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.losses.append(float(loss))
        self.seconds.append(time.perf_counter() - start)
        if on_gpu:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())


def lora_like(config: PerftConfig, base: PreTrainedModel) -> LoraConfig:
    """LoRA on q and v that activates as many parameters as a PERFT-R adapter, to the nearest rank."""
    text = base.config.get_text_config()
    assert config.num_experts is not None
    assert config.top_k is not None
    activated = text.hidden_size * (2 * config.top_k * config.r + config.num_experts)
    weights = {name: parameter.shape for name, parameter in base.named_parameters()}
    per_rank = sum(
        sum(next(shape for name, shape in weights.items() if name.endswith(f"{projection}.weight")))
        for projection in ("q_proj", "v_proj")
    )
    rank = max(1, round(activated / per_rank))
    return LoraRecipe(r=rank).to_peft(base)


def step(options: argparse.Namespace) -> dict[str, Any]:
    """The first part."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = str(find_model(options.model).folder)

    def way(config: Any, **more: Any) -> Way:
        torch.manual_seed(0)
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        is_dummy = options.load_format == "dummy"
        base = random_base(load_config(folder), dtype, device) if is_dummy else load_base(folder, dtype, device)
        with contextlib.redirect_stdout(io.StringIO()):
            model = get_peft_model(base, config(base) if callable(config) else config)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Way(model=model, optimiser=torch.optim.AdamW(trained, lr=1e-4), losses=[], seconds=[], **more)

    recipes: dict[str, Callable[[], Way]] = {
        "ours": lambda: way(ADAPTER),
        "plain": lambda: way(ADAPTER, surrounding=lambda: mock.patch("perft.layer.routed_units", plain_units)),
        "qv_lora": lambda: way(lambda base: lora_like(ADAPTER, base)),
    }
    found: dict[str, Any] = {}
    ways: dict[str, Way] = {}
    # on a GPU one after the other, so that the memory of each is its own; on a CPU in turn, against noise
    groups = [[name] for name in recipes] if device.type == "cuda" else [list(recipes)]
    for group in groups:
        ways |= {name: recipes[name]() for name in group}
        generator = torch.Generator().manual_seed(1)
        vocab_size = ways[group[0]].model.get_input_embeddings().weight.shape[0]
        for _ in range(options.steps + 1):
            ids_BT = torch.randint(vocab_size, (options.batch, options.length), generator=generator).to(device)
            for name in group:
                ways[name].step(ids_BT)
        for name in group:
            done = ways[name]
            found[f"{name}_tokens_per_s"] = options.batch * options.length / median(done.seconds[1:])
            if done.peak_bytes:
                found[f"{name}_peak_gb"] = done.peak_bytes / 1e9
            del done.model, done.optimiser
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    tolerance = 1e-2 if device.type == "cuda" else 1e-4
    apart = max(abs(one - other) for one, other in zip(ways["ours"].losses, ways["plain"].losses, strict=True))
    if apart > tolerance:
        raise SystemExit(f"bench: ours and the plain layer are {apart:.2g} apart in their losses: nothing was measured")
    found |= {
        f"ours/{name}": found["ours_tokens_per_s"] / found[f"{name}_tokens_per_s"] for name in ("plain", "qv_lora")
    }
    return {**found, "batch": options.batch, "length": options.length, "losses_apart": apart}


def fleet(options: argparse.Namespace) -> dict[str, Any]:
    """The second part."""
    folder = str(find_model(options.model).folder)
    on_gpu = torch.cuda.is_available()

    def recipes(output: Path) -> Iterator[tuple[str, TrainConfig, PerftConfig]]:
        for i in range(options.adapters):
            config = TrainConfig(
                model=folder,
                data=(str(DATA / f"{('sql', 'tickets', 'dates')[i % 3]}.train.jsonl"),),
                output=str(output / str(i)),
                loss_on="answer",
                learning_rate=1e-4 * (1 + i),
                max_steps=options.steps,
                batch_size=options.fleet_batch,
                max_length=256,
                log_steps=options.steps,
                seed=i,
                dtype="bfloat16" if on_gpu else "float32",
            )
            yield f"adapter {i}", config, PerftConfig(variant="R", num_experts=4, top_k=2, r=8)

    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    losses: dict[str, list[float]] = {}
    for round_ in range(options.rounds):
        for name in ("alone", "together") if round_ % 2 else ("together", "alone"):
            with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
                start = time.perf_counter()
                if name == "together":
                    members = train_many([*recipes(Path(output))])
                    if reasons := [member.reason for member in members if member.state != "done"]:
                        raise SystemExit(f"bench: {reasons[0]}")
                else:
                    for _, config, adapter in recipes(Path(output)):
                        train(config, adapter)
                seconds[name].append(time.perf_counter() - start)
                losses[name] = [_last_loss(Path(output) / str(i)) for i in range(options.adapters)]
            gc.collect()
    apart = max(abs(one - other) for one, other in zip(losses["alone"], losses["together"], strict=True))
    if apart > (0.05 if on_gpu else 1e-3):
        raise SystemExit(f"bench: adapters end {apart:.2g} away from the loss they have alone: nothing was measured")
    return {
        "adapters": options.adapters,
        "steps": options.steps,
        "batch": options.fleet_batch,
        **{f"{name}_s": median(values) for name, values in seconds.items()},
        "together/alone": median(one / other for one, other in zip(seconds["alone"], seconds["together"], strict=True)),
        "losses_apart": apart,
    }


def _last_loss(folder: Path) -> float:
    record = read_record(folder)
    assert record is not None
    return float(record["outcome"]["metrics"]["loss"])


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"step": step, "fleet": fleet}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: both)")
    parser.add_argument("--model", default="S", help="S (the demo base), R, or a folder (default S)")
    parser.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="step: dummy: random weights for the folder's config",
    )
    parser.add_argument("--batch", type=int, default=4, help="step: rows (default 4)")
    parser.add_argument("--length", type=int, default=64, help="step: tokens in a row (default 64)")
    parser.add_argument(
        "--steps", type=int, default=6, help="steps that are timed, or that an adapter takes (default 6)"
    )
    parser.add_argument("--adapters", type=int, default=4, help="fleet: how many (default 4)")
    parser.add_argument("--fleet-batch", type=int, default=2, help="fleet: rows of each adapter in a step (default 2)")
    parser.add_argument("--rounds", type=int, default=1, help="fleet: how often both are done (default 1)")
    parser.add_argument("--results", type=Path, default=RESULTS / "training.jsonl", help="file to append the result to")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}")
    load = os.getloadavg()[0]
    found: dict[str, Any] = {}
    for part in options.parts or PARTS:
        found[part] = PARTS[part](options)
        for name, value in found[part].items():
            print(f"{part:<8}{name:<28}{value:>12.4g}")
    write_result(options.results, {"bench": "training", "model": options.model, **surroundings(load), "parts": found})


if __name__ == "__main__":
    main()
