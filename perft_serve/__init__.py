"""Serving of PERFT adapters. `LLM` is the engine for scripts; `perft-serve serve` is the engine behind the OpenAI API.

`LLM` and what it returns are imported when they are named: the server's process needs no torch.
"""

from typing import TYPE_CHECKING

from perft_serve.engine.params import RequestError as RequestError
from perft_serve.engine.params import SamplingParams as SamplingParams

if TYPE_CHECKING:
    from perft_serve.llm import LLM as LLM
    from perft_serve.outputs import CompletionOutput as CompletionOutput
    from perft_serve.outputs import RequestOutput as RequestOutput
else:

    def __getattr__(name: str) -> object:
        if name not in ("LLM", "CompletionOutput", "RequestOutput"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from perft_serve.llm import LLM
        from perft_serve.outputs import CompletionOutput, RequestOutput

        globals().update(LLM=LLM, CompletionOutput=CompletionOutput, RequestOutput=RequestOutput)
        return globals()[name]


__version__ = "0.1.0"
