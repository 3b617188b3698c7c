"""What tells one base model from another: a digest over its config and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
from operator import itemgetter

import torch
from transformers import PreTrainedModel

SAMPLES_PER_TENSOR = 1024
# where a model was found and which library wrote it do not change what it computes
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


@torch.inference_mode()
def base_digest(model: PreTrainedModel) -> str:
    """sha256, in hexadecimal, over the config and, of every tensor of the model, name, shape, dtype and
    `SAMPLES_PER_TENSOR` evenly strided values at the most: a few milliseconds whatever the model's size.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=itemgetter(0)):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        stride = max(1, -(-tensor.numel() // SAMPLES_PER_TENSOR))
        sample = tensor.reshape(-1)[::stride].contiguous()
        digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
