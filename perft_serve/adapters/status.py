"""What can be said of an adapter and of the memory of adapters: plain data that the engine reports to the front.

Nothing here holds a path of the server or any tensor; a status is true for the moment in which it was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from perft_serve.adapters.catalog import AdapterRef

AdapterState = Literal["registered", "loading", "host", "resident", "failed", "removed"]
"""`registered`: known, in no memory. `loading`: being read from its source. `host`: in host memory, perhaps being copied into
the arena. `resident`: in the arena. `failed`: its last load failed; a request that comes a second later or more tries again.
`removed`: gone."""


class Hold(Enum):
    """Why an adapter cannot be run on yet."""

    LOADING = "loading"  # it is being read from its source, or copied into the arena
    NO_ROOM = "no room"  # it is in host memory, but adapters in use hold the room that it needs


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A sequence's hold on a resident adapter: until it is released, the adapter stays where it is.

    Args:
        ref: what was asked for.
        slot: the adapter's number in the arena.
        width: the most adapter experts that one token of this adapter takes.
        digest: sha256 over what it computes; its identity.
        is_lora: it is a LoRA on attention projections, and has no adapter experts (`width` is 0).
    """

    ref: AdapterRef
    slot: int
    width: int
    digest: str
    is_lora: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStatus:
    """One version of a named adapter.

    Args:
        name, version: whose status this is.
        state: see `AdapterState`.
        error: why it failed; or why it could not be pinned, if it is not `failed`.
        pinned: it is never evicted.
        num_in_flight: requests on it that are not over.
        last_used: when a request for it last came or went, in seconds since the epoch.
        variant, unit, num_experts, top_k, r: what its file says, once that was read. A LoRA's variant is `LoRA`, and it has no
            `num_experts`.
        targets: the projections that a LoRA is on.
        num_parameters: how many numbers it holds.
        num_bytes: what it takes in the arena.
        digest: sha256 over what it computes; its identity.
    """

    name: str
    version: int
    state: AdapterState = "registered"
    error: str | None = None
    pinned: bool = False
    num_in_flight: int = 0
    last_used: float | None = None
    variant: str | None = None
    unit: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    r: int | None = None
    targets: tuple[str, ...] | None = None
    num_parameters: int | None = None
    num_bytes: int | None = None
    digest: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterMemory:
    """The memory of adapters as a whole; the counters only ever grow.

    Args:
        arena_bytes, arena_used_bytes: size of the arena, and what adapters take of it.
        host_bytes, host_used_bytes: the same of the host tier; loads under way can exceed it for a moment.
        num_resident: adapters in the arena.
        num_loads: counter of loads from a source that succeeded.
        num_load_failures: counter of those that did not.
        num_evictions: counter of adapters that lost their place in the arena to another.
        load_seconds: sum over all loads, from the start of reading to the end of it.
    """

    arena_bytes: int = 0
    arena_used_bytes: int = 0
    host_bytes: int = 0
    host_used_bytes: int = 0
    num_resident: int = 0
    num_loads: int = 0
    num_load_failures: int = 0
    num_evictions: int = 0
    load_seconds: float = 0.0


def load_failure(name: str, reason: str) -> str:
    """What requests for an adapter are told whose load has failed."""
    return f"adapter {name!r} could not be loaded: {reason}"
