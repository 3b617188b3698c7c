"""Serving of PERFT adapters. `LLM` is the engine for scripts; `perft-serve serve` is the engine behind the OpenAI API."""

from perft_serve.engine.params import RequestError as RequestError
from perft_serve.engine.params import SamplingParams as SamplingParams
from perft_serve.engine.params import StructuredOutputsParams as StructuredOutputsParams
from perft_serve.llm import LLM as LLM
from perft_serve.outputs import CompletionOutput as CompletionOutput
from perft_serve.outputs import RequestOutput as RequestOutput

__version__ = "0.1.0"
