"""A tiny base with every kind of adapter, served by the engine, and the same in PEFT, which says what is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tiny import random_adapters, save_tiny_model, tiny_model

from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A tiny base on disk, its adapters, and the PEFT model that says what is right."""

    family: str
    path: Path
    adapters: Mapping[str, str]
    oracle: PeftModel

    def engine(self, **settings: object) -> Engine:
        """A new engine with all the adapters, in float32."""
        defaults = {"dtype": "float32", "kv_memory": 1 << 23, "adapter_memory": 1 << 20, "max_num_seqs": 32}
        return Engine(
            EngineConfig(model=str(self.path), adapters=dict(self.adapters), **{**defaults, **settings})  # type: ignore[arg-type]
        )

    def logits(self, adapter: str | None, token_ids: list[int]) -> torch.Tensor:
        """Logits `[T, V]` of the PEFT model."""
        with torch.inference_mode():
            if adapter is None:
                with self.oracle.disable_adapter():
                    return self.oracle(torch.tensor([token_ids])).logits[0]
            self.oracle.set_adapter(adapter)
            return self.oracle(torch.tensor([token_ids])).logits[0]

    def generate(self, adapter: str | None, token_ids: list[int], num_tokens: int) -> list[int]:
        """Greedy tokens of `transformers`' `generate` on the PEFT model."""
        settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        prompt = torch.tensor([token_ids])
        if adapter is None:
            with self.oracle.disable_adapter():
                output = self.oracle.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        else:
            self.oracle.set_adapter(adapter)
            output = self.oracle.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        return output[0, len(token_ids) :].tolist()


def make_served(family: str, folder: Path) -> Served:
    """A tiny base of `family` with all the adapters of `tiny.variant_configs`."""
    path = save_tiny_model(family, folder / "base")
    adapters = random_adapters(folder / "adapters", tiny_model(family))
    names = list(adapters)
    oracle = PeftModel.from_pretrained(tiny_model(family), adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        oracle.load_adapter(adapters[name], adapter_name=name)
    return Served(family=family, path=path, adapters=adapters, oracle=oracle.eval())
