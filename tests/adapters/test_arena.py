"""The arena: true sizes, no cliff by fragmentation, pieces of bounded size, tables only when all rows are there."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from staging import BLOCKS, CONFIGS, HIDDEN, assert_is_in, assert_zero_outside, make_adapter, make_arena, num_rows, read
from tiny import random_adapter

from perft import PerftConfig
from perft.attention import ATTENTION, AttentionBlock
from perft.errors import AdapterError
from perft.lora import LoraAdapter, LoraPair
from perft_serve.adapters.arena import AdapterArena, RangeAllocator

TABLES = ("rule_A6", "gate_row_LA", "down_row_LE", "up_row_LE", "rank_LE", "scale_E", "silu_E")


@given(
    st.lists(st.tuples(st.sampled_from(["take", "pieces", "give"]), st.integers(1, 9), st.integers(1, 6)), max_size=60)
)
def test_ranges_never_overlap_and_come_back_whole(ops: list[tuple[str, int, int]]) -> None:
    ranges = RangeAllocator(40)
    taken: list[tuple[int, int]] = []
    for op, length, count in ops:
        free = set(range(40)) - {i for start, run in taken for i in range(start, start + run)}
        if op == "give" and taken:
            ranges.give(*taken.pop(length % len(taken)))
        elif op == "take":
            start = ranges.take(length)
            fits = any(set(range(i, i + length)) <= free for i in range(40))
            assert (start is not None) == fits
            if start is not None:
                assert set(range(start, start + length)) <= free
                taken.append((start, length))
        elif op == "pieces":
            starts = ranges.take_pieces([(length, count), (2, 1)])
            if starts is not None:
                assert [len(each) for each in starts] == [count, 1]
                new = [(start, length) for start in starts[0]] + [(starts[1][0], 2)]
                for start, run in new:
                    assert set(range(start, start + run)) <= free
                    free -= set(range(start, start + run))
                taken += new
        assert ranges.num_free == 40 - sum(run for _, run in taken)
    for start, length in taken:
        ranges.give(start, length)
    assert ranges.take(40) == 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_takes_its_true_size(tmp_path: Path, kind: str) -> None:
    """At most 5 % more than its tensors, tables included (for a hidden size that models have)."""
    adapter = read(make_adapter(tmp_path / "a", kind))
    arena = make_arena(1000)
    slot = arena.load(arena.stage(adapter))
    assert slot is not None
    assert arena.num_bytes - arena.num_free_bytes == adapter.num_bytes == num_rows(kind) * HIDDEN * 4
    assert_is_in(arena, slot, adapter)

    wide = AdapterArena([replace(b, hidden_size=1024) for b in BLOCKS], 64 << 20, torch.bfloat16, torch.device("cpu"))
    tables = sum(getattr(wide, name).nbytes for name in TABLES)
    assert tables <= 0.05 * wide.num_bytes


def test_every_kind_beside_every_other_and_gone_again(tmp_path: Path) -> None:
    adapters = {kind: read(make_adapter(tmp_path / kind, kind, seed=i)) for i, kind in enumerate(CONFIGS)}
    arena = make_arena(sum(num_rows(kind) for kind in CONFIGS))
    for order in itertools.islice(itertools.permutations(adapters), 0, 720, 90):
        slots = {}
        for kind in order:
            slot = arena.load(arena.stage(adapters[kind]))
            assert slot is not None
            slots[kind] = slot
        assert arena.num_free_rows == 0
        for kind, slot in slots.items():
            assert_is_in(arena, slot, adapters[kind])
        assert sorted(slots.values()) == list(range(len(CONFIGS))), "slots are used again"
        for slot in slots.values():
            arena.evict(slot)
        arena.wipe()
        assert arena.num_free_rows == arena.num_rows
        assert not arena.rows_SD.any()
        assert not arena.rank_LE.any()
        assert not arena.rule_A6.any()
        assert bool((arena.gate_row_LA == -1).all())


def test_scattered_room_is_room(tmp_path: Path) -> None:
    """Every second of many small adapters leaves: one that is as large as all the holes fits into them, piece by piece."""
    small = [read(make_adapter(tmp_path / f"small{i}", "s-last", seed=i)) for i in range(30)]
    arena = make_arena(30 * num_rows("s-last"))
    slots = [arena.load(arena.stage(adapter)) for adapter in small]
    assert arena.num_free_rows == 0
    for slot in slots[::2]:
        assert slot is not None
        arena.evict(slot)
    arena.wipe()
    config = PerftConfig(variant="R", r=4, num_experts=4, top_k=1)  # 3 * (32 + 4) rows, in holes of 12
    large = read(str(random_adapter(tmp_path / "large", config, BLOCKS, seed=9)))
    slot = arena.load(arena.stage(large))
    assert slot is not None
    assert len(arena.runs_of(slot)) > 1
    assert_is_in(arena, slot, large)
    kept = [slot for slot in slots[1::2] if slot is not None]
    for adapter, at in zip(small[1::2], kept, strict=True):
        assert_is_in(arena, at, adapter)
    assert_zero_outside(arena, [*kept, slot])
    arena.evict(slot)
    arena.wipe()
    assert_zero_outside(arena, kept)


def test_no_room_takes_nothing(tmp_path: Path) -> None:
    adapter = read(make_adapter(tmp_path / "a", "r"))
    arena = make_arena(num_rows("r") + 5)
    assert arena.load(arena.stage(adapter)) is not None
    assert arena.place(arena.stage(adapter)) is None
    assert arena.num_free_rows == 5


def test_the_tables_name_an_adapter_only_when_it_is_all_there(tmp_path: Path) -> None:
    adapter = read(make_adapter(tmp_path / "a", "r"))
    arena = make_arena(200)
    staged = arena.stage(adapter)
    placement = arena.place(staged)
    assert placement is not None
    before = [getattr(arena, name).clone() for name in TABLES]
    copied = []
    while not arena.is_copied(staged, placement):
        assert all(torch.equal(getattr(arena, name), was) for name, was in zip(TABLES, before, strict=True))
        copied.append(arena.copy(staged, placement, max_bytes=10 * arena.row_bytes + 3))
    assert max(copied) == 10 * arena.row_bytes
    assert sum(copied) == staged.num_bytes
    assert arena.copy(staged, placement, 1 << 30) == 0
    slot = arena.publish(staged, placement)
    assert_is_in(arena, slot, adapter)
    arena.evict(slot)
    assert arena.num_free_rows == 200 - staged.num_rows
    assert arena.num_free_bytes == arena.num_bytes, "evicted is free, though it has to be wiped first"
    wiped = []
    while arena.num_wiping_rows:
        wiped.append(arena.wipe(max_bytes=10 * arena.row_bytes))
    assert max(wiped) == 10 * arena.row_bytes
    assert sum(wiped) == staged.num_bytes
    assert arena.num_free_rows == 200
    assert not arena.rows_SD.any()


def test_half_copied_and_given_up(tmp_path: Path) -> None:
    arena = make_arena(200)
    staged = arena.stage(read(make_adapter(tmp_path / "a", "r")))
    placement = arena.place(staged)
    assert placement is not None
    arena.copy(staged, placement, staged.num_bytes // 2)
    arena.abandon(placement)
    arena.wipe()
    assert arena.num_free_rows == 200
    assert not arena.rows_SD.any()


def test_tables_grow_when_adapters_adapt_few_layers(tmp_path: Path) -> None:
    """Many adapter experts in one layer are more than the tables were made for; all stay right."""
    config = PerftConfig(variant="R", r=1, num_experts=20, top_k=2, layers_to_transform=[2])
    adapters = [read(str(random_adapter(tmp_path / f"a{i}", config, BLOCKS, seed=i))) for i in range(8)]
    arena = make_arena(8 * 60)
    slots = [arena.load(arena.stage(adapter)) for adapter in adapters]
    assert arena.rank_LE.shape[1] > 480 // 6
    for slot, adapter in zip(slots, adapters, strict=True):
        assert slot is not None
        assert_is_in(arena, slot, adapter)


def test_slots_grow_too(tmp_path: Path) -> None:
    config = PerftConfig(variant="S", r=1, layers_to_transform=[2])
    adapter = read(str(random_adapter(tmp_path / "a", config, BLOCKS)))
    arena = make_arena(40)
    assert arena.rule_A6.shape[0] < 20
    for _ in range(20):
        slot = arena.load(arena.stage(adapter))
        assert slot is not None
        assert_is_in(arena, slot, adapter)


def test_tables_can_be_written_in_and_out_of_inference_mode(tmp_path: Path) -> None:
    adapters = [read(make_adapter(tmp_path / f"a{i}", "r-one", seed=i)) for i in range(12)]
    with torch.inference_mode():
        arena = make_arena(12 * num_rows("r-one"))
    slots = []
    for i, adapter in enumerate(adapters):
        with torch.inference_mode(i % 2 == 0):
            staged = arena.stage(adapter)
        with torch.inference_mode(i % 3 == 0):
            slots.append(arena.load(staged))
    assert not any(getattr(arena, name).is_inference() for name in (*TABLES, "rows_SD"))
    for i, slot in enumerate(slots):
        assert slot is not None
        with torch.inference_mode(i % 2 == 1):
            arena.evict(slot)
            arena.wipe()
    assert not arena.rows_SD.any()


def test_values_that_overflow_the_served_dtype(tmp_path: Path) -> None:
    """An adapter whose values do not fit the served dtype is refused instead of served as infinity."""
    adapter = read(make_adapter(tmp_path / "a"))
    next(iter(adapter.layers.values())).up_MRD.mul_(1e6)
    arena = make_arena(100, torch.float16)
    with pytest.raises(AdapterError, match=r"do not fit into torch\.float16"):
        arena.stage(adapter)
    assert arena.stage(read(make_adapter(tmp_path / "b"))).rows_SD.dtype == torch.float16


def test_an_arena_without_a_row_is_refused() -> None:
    with pytest.raises(AdapterError, match="does not hold one row of width 16"):
        make_arena(0)


# widths that neither are D nor divide it: cells of 8
ATTENTION_BLOCKS = tuple(
    AttentionBlock(
        layer=2 * l,
        name=f"model.layers.{2 * l}.self_attn",
        widths={"q_proj": (HIDDEN, 24), "v_proj": (HIDDEN, 8), "o_proj": (24, HIDDEN)},
    )
    for l in range(3)
)


def make_lora(ranks: dict[tuple[int, str], int], seed: int = 0) -> LoraAdapter:
    """A LoRA with these ranks, by place in `ATTENTION_BLOCKS` and projection."""
    g = torch.Generator().manual_seed(seed)
    pairs = []
    for (l, target), rank in ranks.items():
        block = ATTENTION_BLOCKS[l]
        width, out = block.widths[target]
        pairs.append(
            LoraPair(
                path=f"{block.name}.{target}",
                target=target,
                layer=block.layer,
                down_RI=torch.randn(rank, width, generator=g),
                up_OR=torch.randn(out, rank, generator=g),
                scale=0.5 + rank,
            )
        )
    return LoraAdapter(config=LoraConfig(r=max(ranks.values())), pairs=tuple(pairs), digest=f"lora {seed}")


def make_lora_arena(num_rows: int) -> AdapterArena:
    arena = AdapterArena(BLOCKS, num_rows * HIDDEN * 4, torch.float32, torch.device("cpu"), ATTENTION_BLOCKS)
    arena.rows_SD.zero_()
    return arena


def assert_lora_is_in(arena: AdapterArena, slot: int, adapter: LoraAdapter) -> None:
    """The tables lead to its own numbers, and the router gives its tokens no adapter experts."""
    tables = arena.lora
    assert tables is not None
    assert not arena.rule_A6[slot].any()
    pairs = {pair.path: pair for pair in adapter.pairs}
    numbers = arena.rows_SD.view(-1)
    for l, block in enumerate(ATTENTION_BLOCKS):
        for j, target in enumerate(ATTENTION):
            pair = pairs.get(f"{block.name}.{target}")
            rank = int(tables.rank_LJA[l, j, slot])
            assert rank == (0 if pair is None else pair.down_RI.shape[0])
            if pair is not None:
                assert float(tables.scale_LJA[l, j, slot]) == pair.scale
                for cell_LJA, rows in ((tables.down_cell_LJA, pair.down_RI), (tables.up_cell_LJA, pair.up_OR.mT)):
                    at = int(cell_LJA[l, j, slot]) * arena.cells_SV.shape[1]
                    assert torch.equal(numbers[at : at + rows.numel()].view(rows.shape), rows)


def test_loras_lie_among_perft_adapters_and_go_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows of other widths, in holes that others have left, and with tables that grow."""
    monkeypatch.setattr("perft_serve.adapters.arena._MIN_LORA_SLOTS", 1)
    small = [read(make_adapter(tmp_path / f"small{i}", "s-last", seed=i)) for i in range(12)]
    loras = [
        make_lora({(0, "q_proj"): 2, (0, "v_proj"): 3, (0, "o_proj"): 1, (2, "v_proj"): 7}, seed=1),
        make_lora({(1, "o_proj"): 4}, seed=2),
        make_lora({(l, "q_proj"): 3 for l in range(3)}, seed=3),  # 3 layers of 7.5 rows: 24 in all
    ]
    arena = make_lora_arena(12 * num_rows("s-last"))
    assert (arena.cells_SV.shape[1], arena.lora) == (8, None)
    slots = [arena.load(arena.stage(adapter)) for adapter in small]
    for slot in slots[::2]:
        assert slot is not None
        arena.evict(slot)
    arena.wipe()
    staged = [arena.stage(lora) for lora in loras]
    assert [each.num_rows for each in staged] == [(80 + 72 + 40 + 15) // 16 + (7 * 24 + 15) // 16, 10, 24]
    placed = [arena.load(each) for each in (staged[2], staged[0], staged[1])]
    assert len(arena.runs_of(placed[0] or 0)) > 1
    for slot, lora in zip(placed, (loras[2], loras[0], loras[1]), strict=True):
        assert slot is not None
        assert_lora_is_in(arena, slot, lora)
    for slot, adapter in zip(slots[1::2], small[1::2], strict=True):
        assert slot is not None
        assert_is_in(arena, slot, adapter)
    kept = [slot for slot in slots[1::2] if slot is not None]
    assert_zero_outside(arena, [*kept, *(slot for slot in placed if slot is not None)])
    for slot in placed:
        assert slot is not None
        arena.evict(slot)
    arena.wipe()
    assert_zero_outside(arena, kept)
    assert arena.lora is not None
    assert not arena.lora.rank_LJA.any()


def test_a_lora_takes_its_true_size_where_widths_divide() -> None:
    """Rank 8 on q and v of a base with a quarter as many key and value heads."""
    attention = [
        AttentionBlock(layer=l, name=f"model.layers.{l}.self_attn", widths={"q_proj": (512, 512), "v_proj": (512, 128)})
        for l in range(2)
    ]
    blocks = [replace(BLOCKS[0], hidden_size=512)]
    arena = AdapterArena(blocks, 1 << 20, torch.bfloat16, torch.device("cpu"), attention)
    pairs = tuple(
        LoraPair(
            path=f"{block.name}.{target}",
            target=target,
            layer=block.layer,
            down_RI=torch.ones(8, width),
            up_OR=torch.ones(out, 8),
            scale=1.0,
        )
        for block in attention
        for target, (width, out) in block.widths.items()
    )
    lora = LoraAdapter(config=LoraConfig(), pairs=pairs, digest="d")
    assert arena.stage(lora).num_bytes == 2 * lora.num_parameters
