"""PERFT as a PEFT method: attaches adapters to a base model and adds their routers' loss while training.

Importing this file registers the method, so that `get_peft_model(model, PerftConfig(...))`, `PeftModel.from_pretrained`,
Trainer, TRL and Accelerate treat it as they treat LoRA. Training only: the server reads the same files without PEFT.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import Tensor, nn

from perft.config import PERFT, PerftConfig
from perft.errors import PerftError
from perft.layer import MERGE_REFUSED, PerftLayer, RouterTrace
from perft.losses import RouterHealth, router_load_balancing_loss
from perft.moe import MoeBlock, find_moe_blocks


def resolve_config(config: PerftConfig, blocks: list[MoeBlock]) -> list[MoeBlock]:
    """Settle what depends on the base, in place, and say which blocks get the adapter.

    Raises:
        PerftError: the configuration does not fit this base.
    """
    chosen = blocks
    if config.layers_to_transform is not None:
        by_layer = {block.layer: block for block in blocks}
        missing = [layer for layer in config.layers_to_transform if layer not in by_layer]
        if missing:
            raise PerftError(
                f"layers_to_transform names layers without an MoE block: {missing}; this base has them in {sorted(by_layer)}"
            )
        chosen = [by_layer[layer] for layer in config.layers_to_transform]
    if config.variant == "R":
        if config.combine == "own" and config.norm_topk is None:
            config.norm_topk = chosen[0].norm_topk
        base_top_k = chosen[0].top_k
        assert config.top_k is not None
        if config.combine == "base-rank" and base_top_k is not None and config.top_k > base_top_k:
            raise PerftError(
                f"combine='base-rank' takes the base router's weights by rank, so top_k={config.top_k} must not be more "
                f"than the base's {base_top_k}"
            )
    return chosen


class PerftModel(BaseTuner):
    """A base model with PERFT adapters on the experts module of its MoE blocks.

    Attributes:
        router_aux_loss: load-balancing loss of each adapter's router in the last training step's forward pass, before its
            coefficient (detached scalars; empty when there was none). The weighted sum is part of `output.loss`.
        router_health: what each adapter's router did in training steps.

    The model takes one argument more than the base: `token_mask` [B, T], false where a token is padding, for batches without
    an `attention_mask` (packed ones). It counts for the routers' loss and health only.
    """

    prefix: str = "perft_"
    tuner_layer_cls = PerftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads it on the class; ours are found

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        self._blocks: dict[str, MoeBlock] = {}
        self._trace = RouterTrace()
        self.router_aux_loss: dict[str, Tensor] = {}
        self.router_health: dict[str, RouterHealth] = {}
        self._token_mask: Tensor | None = None
        self._hooks: list[Any] = []
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # set before BaseTuner's constructor, which needs them, has made this an nn.Module
        if name in ("_blocks", "_trace", "router_aux_loss", "router_health", "_token_mask", "_hooks"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _prepare_adapter_config(self, peft_config: PerftConfig, model_config: dict[str, Any]) -> PerftConfig:
        blocks = find_moe_blocks(self.model)
        self._blocks = {block.name: block for block in blocks}
        peft_config.target_modules = [block.name for block in resolve_config(peft_config, blocks)]
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PerftConfig, key: str) -> bool:
        # PEFT shortens twenty or more names to common endings
        return any(key == name or key.endswith(f".{name}") for name in peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: PerftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PerftLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = PerftLayer(target, self._blocks[current_key], self._trace)
        layer.update_layer(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise PerftError(MERGE_REFUSED)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused, with the reason."""
        raise PerftError(MERGE_REFUSED)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies `weight` across, which an experts module does not have; `update_layer` has set the device
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config: PerftConfig, adapter_name: str) -> None:
        # hooks rather than `forward`: a PeftModel without a task type calls the base model past the tuner
        if self._hooks:
            return
        self._hooks = [
            model.register_forward_pre_hook(self._open_trace, with_kwargs=True),
            model.register_forward_hook(self._close_trace, with_kwargs=True, always_call=True),
        ]

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return model

    def _open_trace(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._token_mask = kwargs.pop("token_mask", None)
        if self._token_mask is not None:  # with a cache Transformers does not look for positions that begin anew
            kwargs["use_cache"] = False
        arguments = self._arguments(model, args, kwargs)
        self._trace.start(recording=self.training and arguments.get("labels") is not None)
        return args, kwargs

    def _close_trace(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        logits = self._trace.stop()
        if output is None or not logits:
            return output
        arguments = self._arguments(model, args, kwargs)
        mask = arguments.get("attention_mask") if self._token_mask is None else self._token_mask
        total = self._aux_loss(logits, mask)
        share = share_of_batch(arguments["labels"], arguments.get("num_items_in_batch"))
        output["loss"] = output["loss"] + share * total.to(output["loss"])
        return output

    @staticmethod
    def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of this forward pass by name, the model's own `**kwargs` included."""
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        return {**bound.pop("kwargs", {}), **bound}

    def _aux_loss(self, logits: dict[str, list[Tensor]], real_tokens: Tensor | None) -> Tensor:
        """Weighted sum over the adapters; the unweighted terms are kept in `router_aux_loss`."""
        self.router_aux_loss = {}
        total = torch.zeros(())
        mask_T = None
        if real_tokens is not None and real_tokens.dim() == 2:
            mask_T = real_tokens.reshape(-1) != 0
        for name, layers in logits.items():
            config = self.peft_config[name]
            if torch.is_grad_enabled() and not layers[0].requires_grad and config.router_aux_loss_coef:
                raise PerftError(
                    "the adapter router's load-balancing loss has no gradient: reentrant gradient checkpointing cuts it "
                    'off. Use gradient_checkpointing_kwargs={"use_reentrant": False}, or router_aux_loss_coef=0.'
                )
            mask = mask_T if mask_T is not None and mask_T.numel() == layers[0].shape[0] else None
            loss = router_load_balancing_loss(layers, config.top_k, mask)
            self.router_aux_loss[name] = loss.detach()
            self.router_health.setdefault(name, RouterHealth()).add(layers, config.top_k, mask)
            total = total.to(loss.device) + config.router_aux_loss_coef * loss
        return total


def share_of_batch(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This micro-batch's share of the optimiser's batch: Trainer's losses are sums over it when it counts the items."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / num_items_in_batch


def _register() -> None:
    if PERFT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="perft", config_cls=PerftConfig, model_cls=PerftModel, prefix=PerftModel.prefix)


_register()
