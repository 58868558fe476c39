"""What an arena gives back to the system, and when; pages are counted by the system itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastdiff.models.arena import Arena

MEGABYTE = 2**20


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def touch(megabytes: int) -> None:
    torch.zeros(megabytes * MEGABYTE, dtype=torch.uint8)


def test_what_eight_scopes_have_not_reached_goes_back() -> None:
    arena, before = Arena(), resident()
    with arena:
        touch(200)
    assert resident() - before > 190 * MEGABYTE
    for _ in range(7):
        with arena:
            touch(20)
    assert arena.misses == 1
    assert resident() - before > 190 * MEGABYTE
    for _ in range(2):
        with arena:
            touch(20)
    assert arena.idle == arena.bytes < 23 * MEGABYTE
    assert resident() - before < 40 * MEGABYTE
    assert arena.misses == 1


def test_shapes_that_take_turns_keep_their_memory() -> None:
    arena = Arena()
    for _ in range(3):
        for size in (64, 8, 32, 1):
            with arena:
                touch(size)
    assert arena.misses == 1


def test_what_is_kept_pins_no_more_than_its_pages() -> None:
    """A small tensor lies behind a large one that is gone."""
    arena, before = Arena(), resident()
    with arena:
        large = torch.zeros(200 * MEGABYTE, dtype=torch.uint8)
        kept = torch.full((1000,), 3.0)
        del large
    arena.clear()
    assert arena.bytes < 4 * 4096
    assert resident() - before < 20 * MEGABYTE
    assert (kept == 3.0).all()
    with arena:
        touch(100)
    assert (kept == 3.0).all()


def test_the_limit_bounds_what_lies_idle() -> None:
    arena, before = Arena(limit=5 * MEGABYTE), resident()
    for turn in range(3):
        with arena:
            touch(3)
            touch(100)
            assert arena.misses == 2 * turn + 2 - (turn > 0) * turn
        assert 0 < arena.idle <= 5 * MEGABYTE
        assert resident() - before < 20 * MEGABYTE


def test_without_room_for_idle_memory_nothing_is_kept() -> None:
    arena = Arena(limit=0)
    with arena:
        for _ in range(3):
            torch.empty(100)
    assert (arena.misses, arena.hits, arena.bytes) == (1, 2, 0)


@pytest.mark.parametrize("where", ["inside", "after"])
def test_a_tensor_that_goes_after_the_arena_takes_all_with_it(where: str) -> None:
    arena, before = Arena(), resident()
    with arena:
        kept = [torch.zeros(50 * MEGABYTE, dtype=torch.uint8) for _ in range(2)]
        if where == "inside":
            kept.pop(0)
    del arena
    kept.clear()
    assert resident() - before < 20 * MEGABYTE
