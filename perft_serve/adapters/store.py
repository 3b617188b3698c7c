"""The adapters a server has, by name: found in folders, validated, copied into the arena, let go.

In: names and folders. Out: `AdapterInfo` for people, and for the engine the slot that a name stands for now. It knows no
requests: the engine asks it not to unload what is in use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perft.adapter import CONFIG_FILE, Adapter, read_adapter
from perft.errors import AdapterError
from perft_serve.adapters.arena import AdapterArena

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """What can be said of a resident adapter; holds no path of the server."""

    name: str
    variant: str
    unit: str
    num_experts: int
    top_k: int | None
    r: int
    num_parameters: int
    num_bytes: int
    digest: str


class AdapterStore:
    """Named adapters in one arena.

    Args:
        arena: where they are kept.
    """

    def __init__(self, arena: AdapterArena) -> None:
        self._arena = arena
        self._slots: dict[str, int] = {}
        self._infos: dict[str, AdapterInfo] = {}
        self._widths: dict[str, int] = {}

    def load(self, name: str, path: str | Path) -> AdapterInfo:
        """Read, check and copy in the adapter in folder `path`; it can be used under `name` from then on.

        Raises:
            AdapterError: the name is taken or not a name, or the adapter is broken, does not fit the base, or does not fit
                into the arena. Nothing is left behind.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise AdapterError(
                f"{name!r} cannot be an adapter's name: use letters, digits and . _ : / @ + -, 256 characters at most, "
                "with a letter or digit first"
            )
        if name in self._slots:
            raise AdapterError(f"there is an adapter {name!r} already; unload it first")
        try:
            adapter = read_adapter(path, self._arena.blocks)
            slot = self._arena.load(adapter)
        except AdapterError as error:
            raise type(error)(f"adapter {name!r}: {error}") from error
        self._slots[name] = slot
        self._infos[name] = self._describe(name, adapter)
        # where nobody knows the base's top-k, a token could at the most take all
        width = adapter.config.experts_per_token(adapter.num_experts, self._arena.blocks[0].top_k)
        self._widths[name] = width or adapter.num_experts
        return self._infos[name]

    def unload(self, name: str) -> None:
        """Let an adapter go.

        Raises:
            AdapterError: there is none of that name.
        """
        if name not in self._slots:
            raise AdapterError(f"there is no adapter {name!r}")
        del self._infos[name], self._widths[name]
        self._arena.unload(self._slots.pop(name))

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def slot(self, name: str) -> int:
        """The arena's slot of a resident adapter."""
        return self._slots[name]

    def width(self, name: str) -> int:
        """The most adapter experts that one token of this adapter takes."""
        return self._widths[name]

    def list(self) -> list[AdapterInfo]:
        """All resident adapters, in the order in which they came."""
        return [*self._infos.values()]

    def _describe(self, name: str, adapter: Adapter) -> AdapterInfo:
        return AdapterInfo(
            name=name,
            variant=adapter.config.variant,
            unit=adapter.config.unit,
            num_experts=adapter.num_experts,
            top_k=adapter.config.top_k,
            r=adapter.config.r,
            num_parameters=adapter.num_parameters,
            num_bytes=self._arena.num_bytes_of(adapter),
            digest=adapter.digest,
        )


def find_adapters(folder: str | Path) -> Mapping[str, Path]:
    """The adapters in a folder of adapters: each sub-folder with an `adapter_config.json`, under its own name.

    Raises:
        AdapterError: the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise AdapterError(f"no folder of adapters at {str(folder)!r}")
    return {entry.name: entry for entry in sorted(root.iterdir()) if (entry / CONFIG_FILE).is_file()}
