"""llama.cpp's server on a GGUF file, run by `peers.py` in llama.cpp's own environment.

Arguments: GGUF file, port, threads, slots (requests at once; each has the context length below), then GGUF files of LoRA
adapters, which a request names by their number (`"lora": [{"id": 0, "scale": 1.0}]`). It serves until it is stopped.
"""

import sys
import threading

import xllamacpp  # type: ignore[import-not-found]

CONTEXT = 1024  # tokens a slot

gguf, port, threads, slots = sys.argv[1], *map(int, sys.argv[2:5])
params = xllamacpp.CommonParams()
params.model.path = gguf
params.port = port
params.n_parallel = slots
params.n_ctx = CONTEXT * slots
params.cache_ram_mib = 0  # no prompt is asked twice: nothing to keep
params.cpuparams.n_threads = threads
params.cpuparams_batch.n_threads = threads
adapters = []
for path in sys.argv[5:]:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = path, 0.0
    adapters.append(adapter)
params.lora_adapters = adapters
params.lora_init_without_apply = True
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
threading.Event().wait()
