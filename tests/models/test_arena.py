"""The arena: what a network's calls hand on to each other, and that nothing of it is lost or used twice."""

from __future__ import annotations

import copy
import gc
import resource

import pytest
import torch
from arena_network import Network, network

import fastdiff
from fastdiff.errors import InputError
from fastdiff.models.arena import Arena, outside
from fastdiff.ops import native

__all__ = ["network"]

MEGABYTE = 2**20


def held() -> int:
    """Bytes of all arenas there are."""
    gc.collect()
    return fastdiff.report().arenas.bytes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_second_call_takes_nothing_from_the_system(
    network: Network, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    network = network.to(dtype=dtype, memory_format=layout)
    x = torch.randn(2, 4, 32, 32, dtype=dtype).contiguous(memory_format=layout)
    expected = network(x)
    arena = Arena()
    for call in range(4):
        before = arena.misses, arena.bytes, arena.hits
        with arena:
            out = network(x)
        assert torch.equal(out, expected)
        del out
        if call:
            assert (arena.misses, arena.bytes) == before[:2]
            assert arena.hits - before[2] > 10
            assert arena.idle == arena.bytes


def test_a_second_shape_adds_its_own_blocks_once(network: Network) -> None:
    arena, shapes, seen = Arena(), [(2, 4, 32, 32), (1, 4, 48, 40)], []
    for _ in range(3):
        with arena:
            for shape in shapes:
                network(torch.ones(shape))
        seen.append(arena.misses)
    assert seen[0] == seen[1] == seen[2]


def test_large_outputs_come_without_new_pages() -> None:
    """Counted by the kernel of the system, and not by us."""
    x = torch.ones(16 * MEGABYTE)
    with Arena():
        x + x
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            x + x
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 4096, f"{faults} faults; new memory would take 65536 pages of 4 KB"


@pytest.mark.parametrize("size", [1, 3, 64, 65, 1000, 4097, MEGABYTE + 5])
def test_blocks_are_aligned_and_no_larger_than_asked_for(size: int) -> None:
    arena = Arena()
    with arena:
        value = torch.full((size,), 7, dtype=torch.uint8)
        assert value.data_ptr() % 64 == 0
        assert size <= arena.bytes < size + 64 + 64
    assert (value == 7).all()


def test_every_size_fits_its_block() -> None:
    """Neighbours written to the brim leave each other as they are."""
    arena = Arena()
    with arena:
        for _ in range(2):
            values = [torch.full((size,), size % 251, dtype=torch.uint8) for size in range(1, 3000, 7)]
            assert all((value == len(value) % 251).all() for value in values)
            del values
    assert arena.idle == arena.bytes


def test_gaps_are_joined_and_filled() -> None:
    """Two neighbours that are free make room for one of their size, and the first gap is taken."""
    arena = Arena()
    with arena:
        values = [torch.empty(MEGABYTE, dtype=torch.uint8) for _ in range(4)]
        places, most = [value.data_ptr() for value in values], arena.bytes
        for gone in ((1, 2), (2, 1)):
            for index in gone:
                values[index] = None
            large = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
            assert large.data_ptr() == places[1]
            del large
            for index in sorted(gone):
                values[index] = torch.empty(MEGABYTE, dtype=torch.uint8)
            assert [value.data_ptr() for value in values] == places
        assert (arena.bytes, arena.misses) == (most, 4)


def test_blocks_never_overlap() -> None:
    """Tensors of random sizes come and go; each still holds its own number when it goes."""
    arena, held = Arena(), {}
    draw = torch.Generator().manual_seed(3)
    with arena:
        for turn in range(3000):
            slot, size = (int(torch.randint(limit, (), generator=draw)) for limit in (40, 5000))
            if (old := held.pop(slot, None)) is not None:
                assert (old[0] == old[1]).all()
            held[slot] = torch.full((size,), turn % 251, dtype=torch.uint8), turn % 251
    assert all((value == number).all() for value, number in held.values())
    del old, held
    assert arena.idle == arena.bytes < 40 * 5000 + 40 * 128


def test_tensors_outlive_the_scope_and_the_arena() -> None:
    before, arena = held(), Arena()
    with arena:
        value = torch.arange(MEGABYTE)
    view = value[5:9]
    del value
    assert held() - before >= 8 * MEGABYTE
    del arena
    assert held() - before >= 8 * MEGABYTE
    assert view.tolist() == [5, 6, 7, 8]
    del view
    assert held() == before


def test_idle_blocks_go_with_the_arena() -> None:
    before, arena = held(), Arena()
    with arena:
        torch.empty(MEGABYTE)
    assert arena.idle == arena.bytes == held() - before > 0
    del arena
    assert held() == before


def test_outside_the_scope_nothing_comes_from_the_arena() -> None:
    arena = Arena()
    torch.empty(100)
    with arena:
        pass
    torch.empty(100)
    assert arena.misses == arena.hits == 0


def test_scopes_nest_and_end_with_an_error() -> None:
    outer, inner = Arena(), Arena()
    with outer:
        torch.empty(10)
        with pytest.raises(RuntimeError, match="negative dimension"), inner:
            torch.empty(-1)
        torch.empty(10)
        with inner, outer:
            torch.empty(10)
        with inner:
            torch.empty(10)
    torch.empty(10)
    assert (outer.misses, outer.hits, inner.misses, inner.hits) == (1, 2, 1, 0)


def test_leaving_what_was_not_entered() -> None:
    outer, inner = Arena(), Arena()
    with pytest.raises(RuntimeError, match="leave the inner one first"):
        outer.__exit__(None, None, None)
    with outer, inner, pytest.raises(RuntimeError, match="leave the inner one first"):
        outer.__exit__(None, None, None)


def test_outside_within_a_scope() -> None:
    arena = Arena()
    with arena:
        with outside():
            torch.empty(100)
            with arena:
                torch.empty(100)
        assert (arena.misses, arena.hits) == (1, 0)
        with pytest.raises(RuntimeError, match="negative dimension"), outside():
            torch.empty(-1)
        torch.empty(100)
    assert (arena.misses, arena.hits) == (1, 1)


def test_more_than_there_are_addresses_for_comes_from_elsewhere() -> None:
    """What the machine has not got is refused as it is without an arena."""
    arena = Arena()
    with arena:
        with pytest.raises(RuntimeError, match="allocate"):
            torch.empty(2**60, dtype=torch.uint8)
        torch.empty(10)
    assert (arena.misses, arena.hits) == (2, 0)


def test_a_copy_is_an_arena_of_its_own() -> None:
    arena = Arena(limit=0)
    with arena:
        torch.empty(10)
    other = copy.deepcopy(arena)
    with other:
        torch.empty(10)
    assert (arena.misses, other.misses, other.idle) == (1, 1, 0)


def test_a_report_counts_all_arenas() -> None:
    fastdiff.report(reset=True)
    assert "arenas" not in str(fastdiff.report())
    first, second = Arena(), Arena()
    for arena in (first, second, second):
        with arena:
            torch.empty(MEGABYTE)
    use = fastdiff.report().arenas
    assert (use.misses, use.hits) == (2, 1)
    assert use.bytes >= first.bytes + second.bytes
    assert f"arenas: {use.bytes} bytes held, 2 blocks from the system, 1 handed out again" in str(fastdiff.report())


def test_a_negative_limit() -> None:
    with pytest.raises(InputError, match="Arena: limit is -1; expected bytes"):
        Arena(-1)


def test_without_the_extension_a_scope_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: "it is not there")
    arena = Arena()
    with arena, outside():
        torch.empty(10)
    arena.clear()
    assert (arena.bytes, arena.idle, arena.hits, arena.misses) == (0, 0, 0, 0)
