"""The base's tokenizer, as Transformers loads it. `text.py` makes ids and text with it; in the engine only grammars want it,
for the bytes of each token. In: a model's name. Out: a tokenizer, or `None`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def load_vocabulary(model: str) -> Any | None:
    """The tokenizer in a model's folder or Hub repository; `None` for a folder without one.

    Raises:
        OSError: the folder does not exist; a Hub repository has no tokenizer, or cannot be reached.
    """
    folder = Path(model)
    # AutoTokenizer makes an empty tokenizer of the right class for a folder that holds none.
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    if folder.is_absolute() and not folder.exists():
        raise FileNotFoundError(f"there is no model at {model}")
    return AutoTokenizer.from_pretrained(model)
