"""The base on a GPU: the same model with operations of ours where it has many small ones.

In: a model on a GPU. Out: the same model, whose norms and routers are one or two operations and whose rotary embeddings are
looked up (`fewer_ops.py`), whose experts are ours (`base_experts.py`), and whose weights of queries, keys and values, and of
gate and up in gated MLPs, lie one behind the other in memory, so that a captured step reads them as one
(`perft_kernels.fusion`). Where results must not depend on the batch to the last bit, linear layers are ours too. It knows no
family of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perft.moe import MoeBlock
from perft_kernels import gpu
from perft_kernels.linear import stored_linear
from perft_serve.engine.base_experts import use_kernels
from perft_serve.engine.fewer_ops import fewer_ops

# Children of one module that are given the same input.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class StoredLinear(nn.Module):
    """An `nn.Linear` whose result for a token has the same bits whatever else is in the batch, and however much."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        y = stored_linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


@torch.no_grad()
def use_gpu_ops(model: PreTrainedModel, blocks: Sequence[MoeBlock], *, batch_invariant: bool) -> None:
    """Replace what our GPU kernels can compute, in place; does nothing to a model that they are not for.

    Args:
        batch_invariant: let no token's bits depend on the others in a batch, nor on how many they are.
    """
    if not gpu.takes(model.get_input_embeddings().weight):
        return
    for name, module in list(model.named_modules()):
        for names in _TOGETHER:
            _lie_together([getattr(module, child, None) for child in names])
        if batch_invariant and type(module) is nn.Linear:
            model.set_submodule(name, StoredLinear(module))
        elif (other := fewer_ops(module, model, batch_invariant=batch_invariant)) is not None:
            model.set_submodule(name, other)
    use_kernels(model, blocks, batch_invariant=batch_invariant)


def _lie_together(layers: Sequence[nn.Module | None]) -> None:
    """Linear layers of one input get weights, and biases, that are parts of one tensor; others stay as they are."""
    linears = [layer for layer in layers if type(layer) is nn.Linear]
    kinds = {(layer.in_features, layer.weight.dtype, layer.bias is None) for layer in linears}
    if len(linears) < len(layers) or len(kinds) > 1:
        return
    sizes = [layer.out_features for layer in linears]
    for name in ("weight",) if linears[0].bias is None else ("weight", "bias"):
        parameters = [getattr(layer, name) for layer in linears]
        together = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, together.split(sizes), strict=True):
            parameter.data = part
