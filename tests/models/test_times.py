"""Embeddings of the time and their projections: made once for a run, and made anew where they were made of changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unet_layouts import LAYOUTS, TIMES

from fastdiff.models import UNet
from fastdiff.models.times import MOST_ROWS, locate


@contextmanager
def counted(layer: nn.Module) -> Iterator[list[int]]:
    """The rows of each product that a layer's weight enters, without making the layer anything but plain."""
    rows: list[int] = []
    product = nn.functional.linear

    def record(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is layer.weight:
            rows.append(len(x))
        return product(x, weight, bias)

    nn.functional.linear = record
    try:
        yield rows
    finally:
        nn.functional.linear = product


def fresh(name: str) -> tuple[UNet, dict[str, Any], nn.Module]:
    network, arguments = LAYOUTS[name].network(), LAYOUTS[name].arguments()
    return network, arguments, network.mid_block.resnets[0].time_emb_proj


@torch.no_grad()
@pytest.mark.parametrize("layout", ["straddling", "scale-shift", "resampling-scale-shift", "added-and-controlled"])
@pytest.mark.parametrize("expanded", [False, True], ids=["element", "expanded"])
def test_a_run_projects_its_times_once(layout, expanded):
    network, arguments, layer = fresh(layout)
    samples, times = len(arguments["sample"]), torch.linspace(990, 0, 6).round().long()
    with counted(layer) as rows:
        for t in times:
            network(timestep=t.expand(samples) if expanded else t, **arguments)
    assert rows == [samples, samples * len(times)]


@torch.no_grad()
@pytest.mark.parametrize(
    "timestep",
    [lambda: 17, lambda: torch.tensor(17), lambda: torch.tensor([17, 17]), lambda: TIMES.view(3, 1)[2].repeat(2)],
    ids=["number", "alone", "vector", "copied"],
)
def test_a_time_that_is_in_no_vector_is_projected_at_each_call(timestep):
    network, arguments, layer = fresh("scale-shift")
    with counted(layer) as rows:
        for _ in range(3):
            network(timestep=timestep(), **arguments)
    assert rows == [2, 2, 2]


@torch.no_grad()
def test_a_table_is_made_anew_for_what_it_was_made_of():
    network, arguments, layer = fresh("scale-shift")

    def check(t: Tensor, **more: Any) -> None:
        actual = network(timestep=t, **{**arguments, **more})
        expected = network(timestep=int(t), **{**arguments, **more})
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)

    times = torch.tensor([900, 500, 100])
    for t in times:
        check(t)
    before = network(timestep=times[1], **arguments)
    for change in (
        lambda: layer.weight.mul_(2.0),
        lambda: network.time_embedding.linear_1.bias.add_(1.0),
        lambda: network.class_embedding.weight.add_(0.5),
        lambda: arguments["class_labels"].fill_(4),
        lambda: times.add_(7),
        lambda: network.mid_block.resnets[0].conv1.bias.add_(1.0),
    ):
        change()
        for t in times:
            check(t)
        after = network(timestep=times[1], **arguments)
        assert not torch.equal(before, after)
        before = after
    for t in times:
        check(t, class_labels=torch.tensor([1, 3]))


@torch.no_grad()
def test_a_layer_of_other_code_is_called_for_each_time():
    network, arguments, layer = fresh("scale-shift")

    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.scale = base_layer, 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.scale * x.mean()

    network.mid_block.resnets[0].time_emb_proj = adapter = Adapter(layer)
    network.mid_block.resnets[0].conv1 = Adapter(network.mid_block.resnets[0].conv1)
    for t in TIMES:
        expected = network(timestep=int(t), **arguments)
        torch.testing.assert_close(network(timestep=t, **arguments), expected, rtol=1e-9, atol=1e-10)
    adapter.scale = 3.0
    assert not torch.equal(network(timestep=TIMES[2], **arguments), expected)


def test_in_inference_mode_nothing_is_remembered_of_its_tensors():
    network, arguments, layer = fresh("straddling")
    with torch.inference_mode(), counted(layer) as rows:
        times = TIMES + 0
        for t in times:
            network(timestep=t, **arguments)
    assert rows == [1, 1, 1]


def test_a_place_in_a_vector_is_found_without_a_look():
    times = torch.arange(12)
    assert locate(times[5])[0] is times
    assert locate(times[5])[1] == 5
    assert locate(times[5:6])[1] == 5
    assert locate(times[2:][3].expand(4))[1] == 5
    assert locate(times[::2][3])[1] == 6
    assert locate(times[2:5]) is None
    assert locate(times.view(3, 4)[1, 2])[1] == 6
    assert locate(torch.arange(12).view(3, 4).clone()[1, 2]) is None
    assert locate(torch.tensor(5)) is None
    assert locate(5) is None
    assert locate(torch.empty(12, device="meta")[7])[1] == 7


@torch.no_grad()
def test_a_table_has_a_largest_size():
    network, arguments, layer = fresh("straddling")
    times = torch.arange(MOST_ROWS + 1)
    with counted(layer) as rows:
        for t in times[:3]:
            network(timestep=t, **arguments)
    assert rows == [1, 1, 1]
