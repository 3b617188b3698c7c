"""Pages and what they are known by: no torch, no model, milliseconds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from planning import World

from perft_serve.engine.pages import WATCHED_OF, PagePool, page_hash, root_hash


def known(pool: PagePool, hashes: list[bytes]) -> list[int]:
    """Pages that somebody took, filled and gave back."""
    pages = pool.take(len(hashes))
    assert pages is not None
    for page, one in zip(pages, hashes, strict=True):
        pool.publish(page, one)
    pool.give(pages)
    return pages


def test_pages_are_taken_and_given() -> None:
    pool = PagePool(3, 4)
    assert [pool.pages_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    taken = pool.take(2)
    assert taken is not None
    assert 0 not in taken
    assert (pool.take(2), pool.num_free) == (None, 1)
    pool.give(taken)
    assert (pool.num_free, pool.usage) == (3, 0)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give(taken)


def test_hashes_are_of_all_that_keys_and_values_depend_on() -> None:
    """Scope, base, adapter and every token before: nothing can be shifted from one into the other."""
    roots = [
        root_hash(scope=scope, base_digest=base, adapter_digest=adapter)
        for scope, base, adapter in itertools.product(("", "a", '"', '", "'), ("", "a"), ("", "a", "aa"))
    ]
    assert len(set(roots)) == len(roots)
    first = [page_hash(root, tokens) for root in roots for tokens in ((1, 2), (2, 1), (1, 258), (513, 0))]
    assert len(set(first)) == len(first)
    second = [page_hash(before, (1, 2)) for before in first]
    assert len({*first, *second}) == 2 * len(first), "the same tokens after other tokens are another page"


def test_a_page_is_found_until_it_is_handed_out_anew() -> None:
    pool = PagePool(4, 4)
    pages = known(pool, [b"1", b"2"])
    assert pool.find([b"1", b"2", b"3"]) == pages
    assert pool.find([b"0", b"1"]) == []
    assert pool.usage == 0, "what is only remembered is free"
    assert pool.take(2, found=[]) is not None
    assert pool.find([b"1", b"2"]) == pages, "pages of no use to anybody go first"
    assert pool.take(1) == [pages[1]]
    assert pool.find([b"1", b"2"]) == pages[:1], "of a chain the end goes first"


def test_the_least_recently_used_page_goes_first() -> None:
    pool = PagePool(3, 4)
    one, two, three = (known(pool, [name])[0] for name in (b"1", b"2", b"3"))
    assert pool.take(0, [one]) == []
    pool.give([one])
    assert [pool.take(1), pool.take(1), pool.take(1)] == [[two], [three], [one]]


def test_a_shared_page_is_free_when_all_have_let_go_of_it() -> None:
    pool = PagePool(2, 4)
    (page,) = known(pool, [b"1"])
    assert pool.take(0, [page]) == []
    assert pool.take(1, [page]) is not None
    assert (pool.num_free, pool.take(1)) == (0, None)
    pool.give([page])
    assert (pool.num_free, pool.find([b"1"])) == (0, [page])
    pool.give([page])
    assert pool.num_free == 1


def test_found_pages_are_not_counted_as_room() -> None:
    """To hold a remembered page takes it out of the free ones, so there may be none left for the rest."""
    pool = PagePool(2, 4)
    pages = known(pool, [b"1", b"2"])
    assert pool.take(1, pages) is None
    assert (pool.num_free, pool.find([b"1", b"2"])) == (2, pages), "nothing was taken"
    assert pool.take(1, pages[:1]) == pages[1:]


def test_of_two_equal_pages_one_is_known() -> None:
    pool = PagePool(2, 4)
    one, two = pool.take(2) or []
    pool.publish(one, b"1")
    pool.publish(two, b"1")
    assert pool.find([b"1"]) == [one]
    pool.forget(two)
    assert pool.find([b"1"]) == [one]
    pool.forget(one)
    assert pool.find([b"1"]) == []
    pool.give([one, two])
    assert pool.num_free == 2


def cached_tokens(world: World, *args: Any, **kwargs: Any) -> int:
    """How many of its tokens a request found, run by itself."""
    world.add("probe", *args, **kwargs)
    cached = []
    while world.scheduler.has_work() or world.adapters.copying:
        cached += [event.num_cached_tokens for event in world.step()[1] if event.num_cached_tokens is not None]
    (number,) = cached
    return number


def test_the_same_beginning_is_found_under_the_same_adapter_in_the_same_scope() -> None:
    world = World(prefix_caching=True)
    world.adapters.host |= {"x", "y"}
    assert cached_tokens(world, 14, adapter="x", scope="s") == 0
    assert cached_tokens(world, 14, adapter="x", scope="s") == 12
    assert cached_tokens(world, 14, adapter="y", scope="s") == 0
    assert cached_tokens(world, 14, adapter="x", scope="t") == 0
    assert cached_tokens(world, 14, adapter="x", version=2, scope="s") == 0, "another content under the same name"
    assert cached_tokens(world, 14, scope="s") == 0
    assert cached_tokens(world, 14, scope="s") == 12
    assert cached_tokens(world, (*range(10), 77, *range(11, 14)), scope="s") == 8
    assert cached_tokens(world, (77, *range(1, 14)), scope="s") == 0
    assert (world.scheduler.prefix_queries, world.scheduler.prefix_hits) == (9 * 14, 12 + 12 + 8)
    world.assert_empty()


def test_one_token_at_least_is_computed() -> None:
    world = World(prefix_caching=True)
    assert cached_tokens(world, 8, max_tokens=1) == 0
    assert cached_tokens(world, 8, max_tokens=1) == 4
    assert cached_tokens(world, 9, max_tokens=1) == 8


def test_what_was_generated_is_found_too() -> None:
    """The next turn of a conversation: its prompt begins with the last one and the answer."""
    world = World(prefix_caching=True)
    assert cached_tokens(world, 6, max_tokens=8) == 0
    assert cached_tokens(world, 20) == 12, "the 13 tokens whose keys and values were computed fill three pages"


def test_a_prompt_to_be_scored_is_computed_whole() -> None:
    """It looks nothing up, and what it computes is there for others."""
    world = World(prefix_caching=True)
    world.add("scored", 9, prompt_logprobs=0)
    assert world.shape() == {"scored": 9}
    world.add("again", 9, prompt_logprobs=0)
    world.add("other", 9)
    assert world.shape() == {"scored": 1, "again": 9, "other": 1}
    assert world.scheduler.prefix_queries == 9


def test_a_prompt_to_be_scored_from_somewhere_is_computed_from_there() -> None:
    """The token before it too, whose logits score it; a page is found whole or not at all."""
    world = World(prefix_caching=True)
    world.add("first", 9, prompt_logprobs=0, prompt_logprobs_start=5)
    assert world.shape() == {"first": 9}
    for start, num_computed in ((1, 9), (4, 9), (5, 5), (8, 5)):
        world.add(str(start), 9, prompt_logprobs=0, prompt_logprobs_start=start)
        assert world.shape()[str(start)] == num_computed


def test_requests_of_one_step_share_what_it_computes() -> None:
    """n completions of one prompt: each page is computed once, held by all, and cleared once."""
    world = World(prefix_caching=True)
    for i in range(3):
        world.add(f"n{i}", 11)
    plan, events = world.step()
    assert [chunk.num_tokens for chunk in plan.chunks] == [11, 3, 2]
    assert plan.chunks[0].seq.pages[:2] == plan.chunks[1].seq.pages[:2]
    assert plan.chunks[0].seq.pages[2] != plan.chunks[1].seq.pages[2]
    assert [event.num_cached_tokens for event in events] == [0, 8]
    world.finish()
    world.assert_empty()


def test_chunks_are_known_as_far_as_they_have_come() -> None:
    world = World(prefix_caching=True, budget=10)
    world.add("long", 30)
    assert world.shape() == {"long": 10}
    assert world.shape() == {"long": 10}
    world.add("twin", 30)
    assert world.shape() == {"long": 10}
    assert world.shape() == {"long": 1, "twin": 2}, "seven full pages of thirty tokens are there"


def test_a_preempted_request_finds_its_pages_again() -> None:
    world = World(num_pages=5, prefix_caching=True)
    world.add("old", (7, *range(1, 7)), max_tokens=9)
    young = world.add("young", 7, max_tokens=9)
    computed = {"old": 0, "young": 0}
    for _ in range(40):
        plan, _ = world.step()
        for chunk in plan.chunks:
            computed[chunk.seq.request.request_id] += chunk.num_tokens
    assert world.scheduler.num_preemptions == 1
    assert computed["old"] == 7 + 8
    assert 7 + 8 < computed["young"] < 7 + 8 + 8, "less than all of it once more"
    assert len(young.token_ids) == 16
    world.assert_empty()


def test_off_means_off() -> None:
    world = World(prefix_caching=False)
    assert cached_tokens(world, 14) == 0
    assert cached_tokens(world, 14) == 0
    assert world.scheduler.prefix_queries == 0


def test_the_ages_of_pages_are_told_of_some() -> None:
    told: dict[str, list[float]] = {"page_lifetime": [], "page_idle": [], "page_reuse_gap": []}
    pool = PagePool(WATCHED_OF, 4, observe=lambda name, seconds: told[name].append(seconds))
    pages = pool.take(WATCHED_OF)
    assert pages is not None
    for page in pages:
        pool.publish(page, bytes([page]))
    pool.give(pages)
    found = pool.find([bytes([WATCHED_OF]), bytes([1])])
    assert found == [WATCHED_OF, 1]
    assert pool.take(0, found) == []
    assert [len(ages) for ages in told.values()] == [0, 0, 1], "one of the two is watched"
    pool.give(found)
    assert pool.take(WATCHED_OF) is not None
    assert [len(ages) for ages in told.values()] == [1, 1, 1]
    (lifetime,), (idle,), (gap,) = told.values()
    assert lifetime >= idle + gap >= idle >= 0
