"""The arena: what a network's calls hand on to each other, and that nothing of it is lost or used twice."""

from __future__ import annotations

import copy
import gc
import resource
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.models.arena import Arena
from fastdiff.ops import native

MEGABYTE = 2**20


class Network(nn.Module):
    """Convolutions, norms, an upsampling and attention, with temporaries of many sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.project, self.last = nn.Linear(32, 96), nn.Conv2d(32, 4, 3, padding=1)
        self.register_buffer("folded", ops.fold_upsample(torch.randn(32, 32, 3, 3) / 17))

    def forward(self, x: Tensor) -> Tensor:
        h = ops.group_norm_silu(self.first(x), 8)
        inside = ops.group_norm_silu(self.second(h), 8)
        n, c, height, width = inside.shape
        q, k, v = self.project(inside.flatten(2).transpose(1, 2)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        attended = ops.attention(q, k, v).transpose(1, 2).flatten(2).transpose(1, 2).reshape(n, c, height, width)
        return self.last(h + ops.upsample_conv(inside + attended, self.folded))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().requires_grad_(False)


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
def test_blocks_are_aligned_and_a_little_larger_than_asked_for(size: int) -> None:
    arena = Arena()
    with arena:
        value = torch.full((size,), 7, dtype=torch.uint8)
        assert value.data_ptr() % 64 == 0
        assert size <= arena.bytes <= size + size // 8 + 64 + 64
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


def test_clearing_leaves_what_is_in_use() -> None:
    arena = Arena()
    with arena:
        kept = torch.full((MEGABYTE,), 3.0)
        torch.empty(2 * MEGABYTE)
        assert arena.idle > 0
        arena.clear()
        assert arena.idle == 0
        assert arena.bytes >= 4 * MEGABYTE
    assert (kept == 3.0).all()


def test_the_limit_gives_back_what_lay_idle_for_longest() -> None:
    arena = Arena(limit=5 * MEGABYTE)
    sizes = [MEGABYTE, 2 * MEGABYTE, 3 * MEGABYTE]
    with arena:
        for size in sizes:
            torch.empty(size, dtype=torch.uint8)
        assert arena.idle <= 5 * MEGABYTE
        assert arena.misses == 3
        torch.empty(sizes[1], dtype=torch.uint8)
        assert arena.misses == 4, "3 MB and 2 MB do not fit with their headers; the older of them went"
        torch.empty(sizes[1], dtype=torch.uint8)
        assert arena.misses == 4
        torch.empty(6 * MEGABYTE, dtype=torch.uint8)
        assert arena.idle <= 5 * MEGABYTE


def test_without_room_for_idle_blocks_nothing_is_kept() -> None:
    arena = Arena(limit=0)
    with arena:
        for _ in range(3):
            torch.empty(100)
    assert (arena.misses, arena.hits, arena.bytes) == (3, 0, 0)


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


def test_another_thread_is_outside_and_may_free() -> None:
    arena, values = Arena(), []
    with arena:
        values.append(torch.empty(1000))
        thread = threading.Thread(target=lambda: (values.append(torch.empty(1000)), values.clear()))
        thread.start()
        thread.join()
        assert (arena.misses, arena.idle) == (1, arena.bytes)


def test_threads_share_an_arena(network: Network) -> None:
    """Each thread's results stay what they are while the others run, and are freed by all of them."""
    arena, failures, kept = Arena(), [], []
    inputs = [torch.randn(1 + index % 2, 4, 16, 16 + 4 * index) for index in range(4)]
    expected = [network(x) for x in inputs]

    def work(index: int) -> None:
        for turn in range(25):
            with arena:
                out = network(inputs[index])
            kept.append((index, out))
            if turn % 3 == 0:
                other, value = kept.pop(0)
                if not torch.equal(value, expected[other]):
                    failures.append(other)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(torch.equal(value, expected[index]) for index, value in kept)
    kept.clear()
    assert arena.idle == arena.bytes


def test_memory_of_onednn_from_before_is_given_back_where_it_came_from() -> None:
    """oneDNN returns its memory by address alone; some of it is older than the first arena."""
    program = """
import torch
from fastdiff.models.arena import Arena
x = torch.randn(2, 8, 9, 9)
old = x.to_mkldnn()
arena = Arena()
with arena:
    new = x.to_mkldnn()
    assert arena.misses > 0
    assert torch.equal((old + new).to_dense(), 2 * x)
    del old
later = x.to_mkldnn()
del arena, new, later
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_that_pytorch_counts(network: Network) -> None:
    with Arena(), torch.profiler.profile(profile_memory=True) as profile:
        torch.empty(MEGABYTE)
    assert max(event.cpu_memory_usage for event in profile.events()) >= 4 * MEGABYTE


def test_a_copy_is_an_arena_of_its_own() -> None:
    arena = Arena(limit=123)
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
    with arena:
        torch.empty(10)
    arena.clear()
    assert (arena.bytes, arena.idle, arena.hits, arena.misses) == (0, 0, 0, 0)
