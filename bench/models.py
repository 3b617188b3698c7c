"""The base models and adapters of the benchmarks, made here: no hub, nothing to download.

    S   SmolMixtral, the demo base (`perft.demo_base`): 30 layers, hidden 576, 4 base experts, top-2; real English
    R   a random model of OLMoE's shape: 8 layers, hidden 512, 32 narrow base experts, top-4; the demo base's tokenizer

Both in bf16, made once into `.cache/`. Adapters are random too: throughput does not depend on what they have learned.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import CACHE
from peers import convert_to_gguf
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, OlmoeConfig, OlmoeForCausalLM

import perft
from perft.adapter import LayerTensors, write_adapter
from perft.base import load_skeleton
from perft.config import Variant
from perft.demo_base import build_demo_base
from perft.moe import MoeBlock, find_moe_blocks

DEMO_BASE = CACHE / "smolmixtral"
RANDOM_OLMOE = CACHE / "bench" / "random-olmoe"
NUM_EXPERTS, TOP_K = 4, 2  # of a PERFT-R adapter, as in the demo


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A base model on disk."""

    name: str
    folder: Path

    @property
    def gguf(self) -> Path:
        """Its bf16 GGUF file, made on first use."""
        file = CACHE / "bench" / f"{self.folder.name}.gguf"
        convert_to_gguf(self.portable(), file)
        return file

    def portable(self) -> Path:
        """The same model for tools that look for `rope_theta` where Transformers 4 wrote it: a folder of links."""
        folder = CACHE / "bench" / f"{self.folder.name}-portable"
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.iterdir():
            link = folder / file.name
            if file.name != "config.json" and not link.exists():
                link.symlink_to(file.resolve())
        config = json.loads((self.folder / "config.json").read_text())
        config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return folder


def find_model(name: str) -> Model:
    """S or R, made if it is not there, or a model folder."""
    if name == "S":
        build_demo_base(DEMO_BASE)
        return Model(name=name, folder=DEMO_BASE)
    if name == "R":
        _build_random_olmoe(RANDOM_OLMOE)
        return Model(name=name, folder=RANDOM_OLMOE)
    if not (Path(name) / "config.json").is_file():
        raise SystemExit(f"bench: {name!r} is neither S nor R nor the folder of a model")
    return Model(name=Path(name).name, folder=Path(name))


@torch.inference_mode()
def _build_random_olmoe(folder: Path) -> None:
    if folder.exists():
        return
    build_demo_base(DEMO_BASE)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=50_304,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=4096,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
    )
    model = OlmoeForCausalLM(config).to(torch.bfloat16)
    # Ids that the tokenizer has no text for, and its special tokens, get the logit 0, far below the largest of 50,000
    # random ones: no server has to write or to ignore what others cannot
    model.lm_head.weight[len(tokenizer) :] = 0
    model.lm_head.weight[sorted(tokenizer.all_special_ids)] = 0
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


class AdapterMaker:
    """Writes random adapters for one base.

    Args:
        model: folder of the base.
        seed: what they hold follows from it and the adapter's number.
    """

    def __init__(self, model: Path | str, seed: int = 0) -> None:
        self.blocks: list[MoeBlock] = find_moe_blocks(load_skeleton(str(model)))
        self._names = {block.layer: block.name for block in self.blocks}
        self._rng = torch.Generator().manual_seed(seed)
        self._noise = torch.empty(0)

    def make(
        self, count: int, folder: Path, *, variant: Variant = "R", r: int = 8, prefix: str = ""
    ) -> dict[str, Path]:
        """`count` adapters as sub-folders `PREFIX-0000`, ..., each different, large enough to change log-probabilities by
        some 0.3; bf16. An R adapter has M 4 and k 2.
        """
        prefix = prefix or f"random-{variant.lower()}"
        made = {}
        config = (
            perft.PerftConfig(variant="R", r=r, num_experts=NUM_EXPERTS, top_k=TOP_K, norm_topk=True)
            if variant == "R"
            else perft.PerftConfig(variant=variant, r=r)
        )
        for index in range(count):
            layers = {block.layer: self._layer(config, block, index) for block in self.blocks}
            path = folder / f"{prefix}-{index:04d}"
            write_adapter(path, config, layers, self._names)
            made[path.name] = path
        return made

    def num_bytes(self, *, variant: Variant = "R", r: int = 8) -> int:
        """What one of them takes in an arena of bf16."""
        rows = sum(
            2 * NUM_EXPERTS * r + NUM_EXPERTS
            if variant == "R"
            else 2 * (block.num_experts if variant == "E" else 1) * r
            for block in self.blocks
        )
        return rows * self.blocks[0].hidden_size * 2

    def _layer(self, config: perft.PerftConfig, block: MoeBlock, index: int) -> LayerTensors:
        num_experts = config.num_experts or block.num_experts
        shape = (num_experts, config.r, block.hidden_size)
        return LayerTensors(
            down_MRD=self._draw(shape, index, block.layer, block.hidden_size**-0.5),
            up_MRD=self._draw(shape, index, block.layer + 1000, 0.4),
            gate_MD=self._draw((num_experts, block.hidden_size), index, block.layer + 2000, 0.02)
            if config.variant == "R"
            else None,
        )

    def _draw(self, shape: tuple[int, ...], index: int, place: int, std: float) -> Tensor:
        """Normal noise: a window of one long draw, elsewhere for each adapter and tensor. Thousands take seconds so."""
        count = torch.Size(shape).numel()
        spread = 1 << 20
        if len(self._noise) < count + spread:
            self._noise = torch.randn(count + spread, generator=self._rng)
        start = (index * 7_919 + place * 104_729) % spread
        return (self._noise[start : start + count] * std).to(torch.bfloat16).reshape(shape)


def make_loras(model: Path, count: int, folder: Path, *, r: int = 8) -> dict[str, Path]:
    """`count` random LoRA adapters on all attention projections, for servers that have no routed ones: sub-folders by name."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    made = {}
    for index in range(count):
        torch.manual_seed(index)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        adapted = get_peft_model(
            base,
            LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        path = folder / f"random-lora-{index}"
        adapted.save_pretrained(path)
        made[path.name] = path
        base = adapted.unload()
    return made


def find_adapters(folder: Path) -> dict[str, Path]:
    """The adapters in a folder's sub-folders, by name."""
    found = {file.parent.name: file.parent for file in sorted(folder.glob("*/adapter_config.json"))}
    if not found:
        raise SystemExit(f"bench: no adapters in {folder}")
    return found


def num_bytes_of(adapters: Mapping[str, Path]) -> int:
    """What adapters weigh on disk."""
    return sum(file.stat().st_size for path in adapters.values() for file in path.iterdir())
