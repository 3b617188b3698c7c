"""One round trip with each Python client; runs in the environment `clients`.

In: the server's URL, a model, a question. Out: a JSON object, client to what it was answered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

URL, MODEL, QUESTION, NUM_TOKENS = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
MESSAGES = [{"role": "user", "content": QUESTION}]
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would be fetched from GitHub


def litellm() -> dict[str, Any]:
    """Whole and streamed."""
    import litellm as module

    common = {
        "model": f"openai/{MODEL}",
        "messages": MESSAGES,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "api_base": f"{URL}/v1",
        "api_key": "none",
    }
    whole = module.completion(**common)
    chunks = list(module.completion(**common, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return {"text": whole.choices[0].message.content, "streamed": streamed, "tokens": whole.usage.completion_tokens}


def langchain_openai() -> dict[str, Any]:
    """Whole and streamed."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", max_tokens=NUM_TOKENS, temperature=0)
    whole = chat.invoke(QUESTION)
    streamed = "".join(chunk.content for chunk in chat.stream(QUESTION))
    return {"text": whole.content, "streamed": streamed, "tokens": whole.usage_metadata["output_tokens"]}


def llm() -> dict[str, Any]:
    """Its command, whole and streamed."""
    with tempfile.TemporaryDirectory() as folder:
        models = f"- model_id: served\n  model_name: {MODEL}\n  api_base: {URL}/v1\n"
        Path(folder, "extra-openai-models.yaml").write_text(models)
        environ = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        command = [
            sys.executable,
            "-m",
            "llm",
            "-m",
            "served",
            "-o",
            "temperature",
            "0",
            "-o",
            "max_tokens",
            str(NUM_TOKENS),
        ]
        command += [QUESTION]
        whole, streamed = (
            subprocess.run(
                [*command, *more], env=environ, capture_output=True, text=True, check=True
            ).stdout.removesuffix("\n")
            for more in (["--no-stream"], [])
        )
    return {"text": whole, "streamed": streamed}


if __name__ == "__main__":
    print(json.dumps({each.__name__: each() for each in (litellm, langchain_openai, llm)}))
