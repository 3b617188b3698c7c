"""What an engine is told at its start. The command line of `perft-serve serve` is made from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of one engine; `metadata["help"]` of each field is its help text on the command line.

    Raises:
        ValueError: a value is out of its range.
    """

    model: str = field(metadata={"help": "Base model: a local folder or a Hugging Face Hub id."})
    adapters: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Adapters to load at the start: name to folder, hub id or URL."}
    )
    adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder whose sub-folders are adapters, each served under its own name, loaded on first use."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "auto (as the checkpoint), float32, bfloat16 or float16.",
            "choices": ("auto", "float32", "bfloat16", "float16"),
        },
    )
    load_format: str = field(
        default="auto",
        metadata={
            "help": "auto (the checkpoint's weights) or dummy (random ones: to measure a base of which only the config, and "
            "for the server the tokenizer, is there).",
            "choices": ("auto", "dummy"),
        },
    )
    device: str = field(default="auto", metadata={"help": "auto (a GPU if there is one), cpu, cuda or cuda:N."})
    max_num_seqs: int = field(default=64, metadata={"help": "The most requests that run in one step."})
    max_num_batched_tokens: int = field(
        default=512, metadata={"help": "The most tokens in one step; longer prompts are prefilled in chunks."}
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "The longest prompt plus completion, in tokens (default: the model's context)."}
    )
    kv_memory: int = field(
        default=1 << 30, metadata={"help": "Memory for the KV cache (bytes, or 512M, 4G, ...).", "unit": "bytes"}
    )
    adapter_memory: int = field(
        default=1 << 30, metadata={"help": "Memory for resident adapters (bytes, or 512M, 4G, ...).", "unit": "bytes"}
    )
    host_adapter_memory: int = field(
        default=4 << 30,
        metadata={
            "help": "Host memory for adapters, resident or not, that need not be read again (bytes, or 512M, 4G, ...).",
            "unit": "bytes",
        },
    )
    page_size: int = field(default=16, metadata={"help": "Tokens in a page of the KV cache."})
    prefix_caching: str = field(
        default="on",
        metadata={
            "help": "on or off: reuse the keys and values of prompts that begin alike.",
            "choices": ("on", "off"),
        },
    )
    decode_programs: str = field(
        default="on",
        metadata={
            "help": "on or off: on a CPU, record decode steps and replay them without Python.",
            "choices": ("on", "off"),
        },
    )
    cuda_graphs: str = field(
        default="lazy",
        metadata={
            "help": "off, lazy or start: on a GPU, capture decode steps and replay them: each size when it first comes, or all "
            "of them at the start.",
            "choices": ("off", "lazy", "start"),
        },
    )
    async_scheduling: str = field(
        default="auto",
        metadata={
            "help": "auto (on a GPU), on or off: start a decode step before the tokens of the one before are read back.",
            "choices": ("auto", "on", "off"),
        },
    )
    batch_invariant: str = field(
        default="off",
        metadata={
            "help": "on or off: let no bit of a request's result depend on what else is in its batch, on how its prompt is cut "
            "into chunks, or on what is cached; slower on a GPU. Refused where a base cannot be computed so.",
            "choices": ("on", "off"),
        },
    )
    scheduling_policy: str = field(
        default="fcfs",
        metadata={
            "help": "fcfs (first come, first served) or priority: requests may have a priority, and lower ones start first.",
            "choices": ("fcfs", "priority"),
        },
    )

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_memory", "adapter_memory", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.host_adapter_memory < 0:
            raise ValueError(f"host_adapter_memory must be at least 0, got {self.host_adapter_memory}")
        for name in ("prefix_caching", "decode_programs", "batch_invariant"):
            if getattr(self, name) not in ("on", "off"):
                raise ValueError(f"{name} must be 'on' or 'off', got {getattr(self, name)!r}")
        if self.load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format must be 'auto' or 'dummy', got {self.load_format!r}")
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise ValueError(f"scheduling_policy must be 'fcfs' or 'priority', got {self.scheduling_policy!r}")
        if self.cuda_graphs not in ("off", "lazy", "start"):
            raise ValueError(f"cuda_graphs must be 'off', 'lazy' or 'start', got {self.cuda_graphs!r}")
        if self.async_scheduling not in ("auto", "on", "off"):
            raise ValueError(f"async_scheduling must be 'auto', 'on' or 'off', got {self.async_scheduling!r}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"max_model_len must be at least 2, got {self.max_model_len}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running request needs one token a step"
            )
