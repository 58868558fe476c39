"""The time as residual blocks read it: projected once for all steps of a run, and found there by where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.models.ada import AdaNorm
from fastdiff.models.arena import outside
from fastdiff.models.attention import is_plain_norm
from fastdiff.models.blocks import ResnetBlock
from fastdiff.models.caches import Cache
from fastdiff.models.conditions import ImageTime, Pooling, TextImageTime, TextTime
from fastdiff.models.context import Context, Time
from fastdiff.models.embeddings import EmbeddingMLP, FourierFeatures, LearnedTimes, Sinusoids
from fastdiff.models.leaf import is_plain
from fastdiff.models.maps import settled
from fastdiff.models.prepacked import products, takes

MOST_ROWS = 2048
"""Rows (steps times samples) of the largest table that is made: about 80 MB for Stable Diffusion in half precision."""
RUNS = 4
"""Runs that may take turns on one network, each with a table of its own."""
_EMBEDDERS = (
    *(EmbeddingMLP, FourierFeatures, LearnedTimes, Sinusoids, nn.Embedding, nn.Identity),
    *(ImageTime, Pooling, TextImageTime, TextTime),
)

Projected = Mapping[nn.Module, Tensor]
Embed = Callable[[Tensor, Sequence[Tensor | None]], Time]


@dataclass
class _Run:
    """One run: its times, conditions and weights stay the same objects. steps: the table, from the second call on."""

    begun: bool = False
    steps: list[Projected] | None = None


class TimeTables:
    """For each run what the blocks' `project` gives for every time of the run's vector of times, (N, channels) each.

    network: a module whose blocks are all there.
    """

    def __init__(self, network: nn.Module) -> None:
        self._blocks = [block for block in network.modules() if isinstance(block, ResnetBlock | AdaNorm)]
        self.runs = Cache(RUNS)

    def find(
        self,
        timestep: object,
        samples: int,
        conditions: Sequence[Tensor | None],
        embedders: Iterable[nn.Module | None],
        embed: Embed,
        context: Context,
    ) -> Projected | None:
        """The row of this call, or None where there is no table: it is made when a run is seen to go on.

        timestep: what the network was called with. conditions: (N, ...) or None, all that the embedding depends on
        besides the time. embedders: the modules that `embed` calls. embed(times (k N,), conditions (N, ...)): the
        embedding (k N, time_channels), in which the conditions come again for each N times.
        """
        place = locate(timestep)
        given = [value for value in conditions if value is not None]
        if place is None or any(value.dim() == 0 or len(value) != samples for value in given):
            return None
        (times, index), weights = place, self._weights(embedders, context)
        if weights is None or not settled(*weights, *given) or len(times) * samples > MOST_ROWS:
            return None
        tensors = [times, *given, *weights]
        if any(tensor.is_inference() for tensor in tensors):
            return None
        key = (samples, *(value is None for value in conditions))
        run: _Run = self.runs.get(key, tensors, _Run)
        if not run.begun:
            # Whoever makes the conditions anew for each step would have a whole table made for each.
            run.begun = True
            return None
        if run.steps is None:
            with outside():
                run.steps = self._table(times.to(weights[0].device), samples, conditions, embed, context)
        return run.steps[index]

    def project(self, context: Context) -> Projected | None:
        """What the blocks' `project` gives for context.time, as one product where the layers allow it."""
        packs, time = context.packs, context.time
        if packs is None or time is None:
            return None
        layers = (*(layer for block in self._blocks if (layer := block.time_layer()) is not None),)
        inputs = {id(x): x for x in (block.time_input(time) for block in self._blocks)}
        addends = [addend for block in self._blocks if (addend := block.time_addend(context)) is not None]
        if len(inputs) != 1 or len(layers) != len(self._blocks) or len(addends) not in (0, len(layers)):
            return None
        if addends and not settled(*addends):
            return None
        x = next(iter(inputs.values()))[None]
        if not takes(layers, x, packs) or len({layer.bias is None for layer in layers}) != 1:
            return None
        joined = products(layers, x, packs)[0]
        if addends:
            joined = joined + packs.get("addends", addends, lambda: torch.cat(addends).detach())
        rows = joined.split([len(layer.weight) for layer in layers], dim=1)  # type: ignore[arg-type]
        return dict(zip(self._blocks, rows, strict=True))

    def _table(
        self, times: Tensor, samples: int, conditions: Sequence[Tensor | None], embed: Embed, context: Context
    ) -> list[Projected]:
        steps = len(times)
        time = embed(times.repeat_interleave(samples), conditions)
        columns = []
        for block in self._blocks:
            projected = block.project(time, context)
            assert projected is not None
            columns.append(projected.unflatten(0, (steps, samples)).unbind())
        return [dict(zip(self._blocks, row, strict=True)) for row in zip(*columns, strict=True)]

    def _weights(self, embedders: Iterable[nn.Module | None], context: Context) -> list[Tensor] | None:
        """All parameters that the table is made of; None if some layer is not ours or PyTorch's own."""
        modules = [inner for module in embedders if module is not None for inner in module.modules()]
        modules += [layer for block in self._blocks if (layer := block.time_layer()) is not None]
        found: list[Tensor] = []
        for module in modules:
            known = is_plain(module) or is_plain_norm(module)
            if not known and (type(module) not in _EMBEDDERS or _is_hooked(module)):
                return None
            found += [value for value in module._parameters.values() if value is not None]
        residual = (block for block in self._blocks if isinstance(block, ResnetBlock))
        biases = (block.conv1.bias for block in residual if block.folds_bias(context))
        return [*found, *(bias for bias in biases if bias is not None)]


def locate(timestep: object) -> tuple[Tensor, int] | None:
    """(times, index) where a timestep is times[index] of a vector, whether or not expanded to several samples.

    It is found by where it lies in memory; nothing is read from the device.
    """
    if not isinstance(timestep, Tensor) or timestep._base is None:
        return None
    times = timestep._base
    one = timestep.numel() == 1 or (timestep.dim() == 1 and timestep.stride(0) == 0)
    if not one or times.dim() != 1 or times.dtype != timestep.dtype or times.stride(0) == 0:
        return None
    index, rest = divmod(int(timestep.storage_offset() - times.storage_offset()), times.stride(0))
    return (times, index) if rest == 0 and 0 <= index < len(times) else None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
