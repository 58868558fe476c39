"""Networks inside the arena: nothing is taken from the system in the steady state, and what is returned stays whole."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from arena_kinds import DTYPES, KINDS, accelerated, results, warm
from torch import Tensor, nn

import fastdiff
from fastdiff.models.arena import Arena, shared
from fastdiff.models.rewrites import names


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Without gradients, and with no other network whose end would empty the arena."""
    gc.collect()
    shared().clear()
    with torch.no_grad():
        yield


def in_use() -> int:
    return shared().bytes - shared().idle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_steady_state_takes_nothing_from_the_system(kind: str, dtype: str) -> None:
    network = accelerated(kind, DTYPES[dtype])
    plain = accelerated(kind, DTYPES[dtype], rewrites=set(names()) - {"arena"})
    for call in range(4):
        misses, hits = shared().misses, shared().hits
        out = results(kind, network, DTYPES[dtype])
        assert in_use() == 0, "what is returned or remembered lies in the arena"
        assert shared().misses == misses or call < 2
        assert shared().hits - hits > 15 or call == 0
        before = shared().hits, shared().misses
        assert all(map(torch.equal, out, results(kind, plain, DTYPES[dtype])))
        assert (shared().hits, shared().misses) == before


@pytest.fixture(scope="module")
def page_faults() -> dict[str, dict[str, tuple[int, int]]]:
    program = Path(__file__).parents[1] / "arena_faults.py"
    settings = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program], env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_steady_state_takes_no_pages(
    kind: str, dtype: str, page_faults: dict[str, dict[str, tuple[int, int]]]
) -> None:
    """Counted by the system, without the pages of results. New in each call are inputs and Python's own objects."""
    inside, outside = page_faults[kind][dtype]
    assert inside < outside / 4, f"{inside} page faults with the arena, {outside} without"


@pytest.mark.parametrize("kind", KINDS)
def test_results_that_are_kept_stay_what_they_are(kind: str) -> None:
    network = accelerated(kind)
    kept = [results(kind, network) for _ in range(2)]
    held, misses = shared().bytes, shared().misses
    kept += [results(kind, network) for _ in range(30)]
    assert (shared().bytes, shared().misses) == (held, misses)
    assert all(torch.equal(value, first) for out in kept[1:] for value, first in zip(out, kept[1], strict=True))


def test_a_result_is_an_ordinary_tensor() -> None:
    network = accelerated("decoder")
    (out,), (again,), (other,) = (results("decoder", network) for _ in range(3))
    array, expected = out.numpy(), again.clone()
    assert torch.equal(pickle.loads(pickle.dumps(out)), expected)
    out.add_(1.0)
    results("decoder", network)
    assert torch.equal(torch.from_numpy(array), expected + 1.0)
    again.share_memory_()
    other.resize_(2, *other.shape)[1] = 0.0
    results("decoder", network)
    assert torch.equal(again, expected)
    assert torch.equal(other[0], expected)


@pytest.mark.parametrize("kind", ["UNet2DModel", "decoder"])
def test_shapes_that_take_turns(kind: str) -> None:
    network, seen = accelerated(kind), []
    for _ in range(4):
        for side in (16, 8, 20):
            results(kind, network, side=side)
        seen.append((shared().misses, shared().bytes))
    assert seen[1] == seen[2] == seen[3]


def test_networks_that_take_turns_use_the_same_memory() -> None:
    """What the one has left serves the other: together they hold what the larger holds alone."""
    networks = {kind: accelerated(kind) for kind in ("UNet2DConditionModel", "ControlNetModel", "decoder")}
    alone = []
    for kind, network in networks.items():
        shared().clear()
        results(kind, network)
        results(kind, network)
        alone.append(shared().bytes)
    shared().clear()
    for kind, network in [*networks.items()] * 3:
        results(kind, network)
    assert shared().bytes == max(alone)


def _end_by_restore(networks: list[nn.Module]) -> None:
    fastdiff.restore(networks[0])


def _end_by_deletion(networks: list[nn.Module]) -> None:
    networks.clear()
    gc.collect()


def _end_by_other_rewrites(networks: list[nn.Module]) -> None:
    fastdiff.accelerate(networks[0], rewrites=["qkv"])


@pytest.mark.parametrize("end", [_end_by_restore, _end_by_deletion, _end_by_other_rewrites])
@pytest.mark.parametrize("kind", ["UNet2DModel", "decoder", "DiTTransformer2DModel"])
def test_the_memory_goes_with_the_network(kind: str, end: Callable[[list[nn.Module]], None]) -> None:
    networks = [accelerated(kind)]
    out = results(kind, networks[0])
    assert shared().idle > 0
    end(networks)
    assert shared().bytes == 0
    assert all(value.isfinite().all() for value in out)


def test_the_memory_goes_when_calls_no_longer_need_it() -> None:
    """As those of a network that was moved to another device."""
    network = accelerated("UNet2DModel")
    results("UNet2DModel", network, side=128)
    assert shared().bytes > 3 * 2**20
    for _ in range(10):
        results("UNet2DModel", network, side=2)
    assert shared().bytes <= 2**21, "memory is kept in steps of 2 MB"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_run_inside_too(copied: Callable[[nn.Module], nn.Module]) -> None:
    network = warm("UNet2DConditionModel")
    (expected,) = results("UNet2DConditionModel", network)
    other = copied(network)
    del network
    gc.collect()
    for _ in range(3):
        hits = shared().hits
        (out,) = results("UNet2DConditionModel", other)
    assert torch.equal(out, expected)
    assert shared().hits - hits > 15


class Failing(nn.Conv2d):
    """A layer that fails when it is told to, and keeps what it gave last."""

    fails = False
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ValueError("told to")
        self.last = super().forward(x)
        return self.last


def test_an_error_inside_leaves_the_arena() -> None:
    network = warm("UNet2DModel")
    layer = network.mid_block.resnets[0].conv1
    failing = Failing(layer.in_channels, layer.out_channels, 3, padding=1)
    failing.load_state_dict(layer.state_dict())
    network.mid_block.resnets[0].conv1 = failing
    expected = [results("UNet2DModel", network) for _ in range(3)][-1]
    failing.fails, failing.last = True, None
    with pytest.raises(ValueError, match="told to"):
        results("UNet2DModel", network)
    gc.collect()
    hits, misses = shared().hits, shared().misses
    torch.empty(1000)
    assert (shared().hits, shared().misses, in_use()) == (hits, misses, 0)
    failing.fails = False
    assert torch.equal(results("UNet2DModel", network)[0], expected[0])


def test_a_layer_may_keep_what_it_gave() -> None:
    network = warm("UNet2DModel")
    layer = network.mid_block.resnets[0].conv1
    keeping = Failing(layer.in_channels, layer.out_channels, 3, padding=1)
    network.mid_block.resnets[0].conv1 = keeping
    results("UNet2DModel", network)
    kept, expected = keeping.last, keeping.last.clone()
    for _ in range(3):
        results("UNet2DModel", network, side=12)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "decoder"])
def test_threads_call_one_network(kind: str) -> None:
    network, sides, failures = warm(kind), (8, 12, 16), []
    expected = [results(kind, network, side=side)[0] for side in sides]

    def work(index: int) -> None:
        with torch.no_grad():
            kept = [results(kind, network, side=sides[index])[0] for _ in range(8)]
        failures.extend(index for out in kept if not torch.equal(out, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert in_use() == 0


def test_inside_another_arena_results_are_its() -> None:
    arena, network = Arena(), warm("UNet2DModel")
    with arena:
        (out,) = results("UNet2DModel", network)
        again = results("UNet2DModel", network)
        assert in_use() == 0
        assert arena.bytes - arena.idle >= 2 * out.nbytes
    assert torch.equal(out, again[0])


def test_inside_the_shared_arena_results_stay_there() -> None:
    """A network inside a network need not move what the outer one reads."""
    network = warm("UNet2DModel")
    with shared():
        (out,) = results("UNet2DModel", network)
        assert in_use() >= out.nbytes
    del out
    assert in_use() == 0


def test_in_inference_mode() -> None:
    network = warm("UNet2DConditionModel")
    expected = results("UNet2DConditionModel", network)
    with torch.inference_mode():
        for call in range(3):
            misses = shared().misses
            (out,) = results("UNet2DConditionModel", network)
            assert shared().misses == misses or call == 0
    assert out.is_inference()
    assert in_use() == 0
    assert torch.equal(out, expected[0])


def test_networks_of_ours_run_inside_and_training_does_not() -> None:
    model = fastdiff.load_model("fashion")
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([10, 20])
    labels = torch.tensor([1, 2])
    for _ in range(3):
        misses = shared().misses
        model.network(x, t, class_labels=labels)
    assert shared().misses == misses
    assert in_use() == 0
    before = shared().hits, shared().misses
    with torch.enable_grad(), fastdiff.use_backend("reference"):
        trained = copy.deepcopy(model.network).requires_grad_(True)
        trained(x, t, class_labels=labels).sum().backward()
    assert (shared().hits, shared().misses) == before


def test_a_saved_network_comes_back() -> None:
    network, file = warm("UNet2DModel"), io.BytesIO()
    expected = results("UNet2DModel", network)
    torch.save(network, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    for _ in range(3):
        (out,) = results("UNet2DModel", other)
    assert torch.equal(out, expected[0])
    assert "_lease" not in "".join(network.state_dict())
