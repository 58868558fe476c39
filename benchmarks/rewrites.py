"""What each exact rewrite saves in one forward, counted: `python -m benchmarks.rewrites [--write]`.

It prints the CSV, or writes it and the table in fastdiff/models/README.md. The rewrites are turned on one after
another, a row standing for its rewrite and all above it; and each is turned off alone while all others are on. What is
remembered from an earlier call is there already.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.count import Cost, count
from benchmarks.record import RESULTS, ROOT
from fastdiff.files import write_atomic
from fastdiff.models import AutoencoderKL, UNet
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.dit import DiT
from fastdiff.models.rewrites import Rewrites, names, needed

CSV = RESULTS / "rewrites.csv"
README = ROOT / "fastdiff" / "models" / "README.md"
COUNTS = ("launches", "flops", "bytes")
COLUMNS = ("network", "rewrite", *COUNTS, *(f"{name}_without" for name in COUNTS))
OUTSIDE = ("sampler_step",)
"""Rewrites of what happens between two forwards."""
FILTERED = "winograd"
"""The rewrite of the CPU's alone that changes a number: its own row and those after it have it, no other does."""

_START = {"diffusers": "diffusers", "none": "fastdiff, no rewrite"}

HEAD = "| | launches | GFLOP | GB | alone: launches | GFLOP | GB |"
ABOUT = """\
# Networks

Made by `python -m benchmarks.rewrites --write`; do not edit it.

Each network computes the function of diffusers' own, with its parameters, in less work. That is a set of
rewrites; each leaves the function as it is and can be turned off:

{what}

What one forward costs in float16, counted on fake tensors, not timed. Each row has its rewrite and those
above it. Launches are calls of operators that compute something, a convolution's bias being one more;
FLOP are those of convolutions, products and attention; bytes are what the operators read and write.

The columns under "alone" are what a forward costs more when this one rewrite is turned off and all others
stay. They do not add up to the whole, since a rewrite that others need stands for their share too.
`fastdiff bench --filter rewrite/` times the same comparison.

`winograd` is for the CPU: its row, and none before it, counts 3x3 convolutions as a network of float32 makes
them there, by the multiplications that are left, without those that take maps to tiles and back. The other
rows' "alone" is without it.

{tables}
"""

_STAGES = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
_AUTOENCODER = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, **_STAGES}


@dataclass(frozen=True)
class Layout:
    """A network of the library's, ours for its configuration, and the arguments of a call: shapes, or what makes them.

    part: what of both is called, "" for the whole.
    """

    title: str
    library: Callable[..., nn.Module]
    ours: Callable[..., nn.Module]
    config: Mapping[str, Any]
    arguments: Mapping[str, Any]
    part: str = ""

    def call(self, network: nn.Module) -> Callable[[], Any]:
        part = network.eval().requires_grad_(False).get_submodule(self.part)
        arguments = _made(self.arguments)
        return lambda: part(**arguments)


def _time() -> Tensor:
    """An element of its run's times, as in a pipeline."""
    return torch.arange(50)[7]


LAYOUTS = (
    Layout(
        "Stable Diffusion 1.5: U-Net, 2 x 64 x 64",
        diffusers.UNet2DConditionModel,
        UNet,
        {"cross_attention_dim": 768},
        {"sample": (2, 4, 64, 64), "timestep": _time, "encoder_hidden_states": (2, 77, 768)},
    ),
    Layout(
        "Stable Diffusion XL: U-Net, 2 x 128 x 128",
        diffusers.UNet2DConditionModel,
        UNet,
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            "sample": (2, 4, 128, 128),
            "timestep": _time,
            "encoder_hidden_states": (2, 77, 2048),
            "added_cond_kwargs": {"text_embeds": (2, 1280), "time_ids": (2, 6)},
        },
    ),
    Layout(
        "ControlNet of Stable Diffusion 1.5, 2 x 64 x 64",
        diffusers.ControlNetModel,
        ControlNet,
        {"cross_attention_dim": 768},
        {
            "sample": (2, 4, 64, 64),
            "timestep": _time,
            "encoder_hidden_states": (2, 77, 768),
            "controlnet_cond": (2, 3, 512, 512),
        },
    ),
    Layout(
        "DiT-XL/2, 2 x 32 x 32",
        diffusers.DiTTransformer2DModel,
        DiT,
        {"out_channels": 8},
        {
            "hidden_states": (2, 4, 32, 32),
            "timestep": lambda: _time().expand(2),
            "class_labels": lambda: torch.zeros(2, dtype=torch.int64),
        },
    ),
    Layout(
        "Autoencoder of both: encoder, 1 x 1024 x 1024",
        diffusers.AutoencoderKL,
        AutoencoderKL,
        _AUTOENCODER,
        {"sample": (1, 3, 1024, 1024)},
        "encoder",
    ),
    Layout(
        "Autoencoder of both: decoder, 1 x 1024 x 1024",
        diffusers.AutoencoderKL,
        AutoencoderKL,
        _AUTOENCODER,
        {"sample": (1, 4, 128, 128)},
        "decoder",
    ),
)


@dataclass(frozen=True)
class Step:
    """cost: of a forward with this rewrite and those before it; without: with all but this one."""

    name: str
    cost: Cost
    without: Cost | None = None


def steps(layout: Layout) -> list[Step]:
    """The library's network, ours without a rewrite, and ours with one more each time."""
    counted = [name for name in names() if name not in OUTSIDE]
    with FakeTensorMode(), torch.no_grad():
        with _default_dtype(torch.float16):
            library, network = layout.library(**layout.config), layout.ours(**layout.config)
        call = layout.call(network)

        def cost(on: Iterable[str]) -> Cost:
            chosen = Rewrites.parse(on)
            network.rewrites = chosen  # type: ignore[assignment]
            return _settled(call, filtered=chosen.winograd)

        found = [Step("diffusers", count(layout.call(library)).total), Step("none", cost([]))]
        for place, name in enumerate(counted):
            without = cost(each for each in counted if each not in (name, FILTERED))
            found.append(Step(name, cost(counted[: place + 1]), without))
    return found


def _settled(call: Callable[[], Any], *, filtered: bool) -> Cost:
    """The cost of a call that finds remembered what the calls before it computed: a run's times take two of them."""
    before = count(call, filtered=filtered).total
    while (now := count(call, filtered=filtered).total) != before:
        before = now
    return now


def rows(layouts: Iterable[Layout]) -> list[dict[str, str]]:
    return [
        {"network": layout.title, "rewrite": step.name, **_numbers(step.cost), **_numbers(step.without, "_without")}
        for layout in layouts
        for step in steps(layout)
    ]


def _numbers(cost: Cost | None, suffix: str = "") -> dict[str, str]:
    return {name + suffix: "" if cost is None else str(getattr(cost, name)) for name in COUNTS}


def read() -> list[dict[str, str]]:
    """The rows of the CSV that was written."""
    with CSV.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def text(found: Sequence[Mapping[str, str]]) -> str:
    """The CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return buffer.getvalue()


def markdown(found: Sequence[Mapping[str, str]]) -> str:
    """A table for each network: a row for each step that changes a number, and below it those that change none."""
    parts = []
    for title in dict.fromkeys(row["network"] for row in found):
        own = [row for row in found if row["network"] == title]
        lines = [f"## {title}", "", HEAD, "|---" + "|--:" * 6 + "|"]
        idle, before = [], None
        filtered, whole = _counts(own[-1]), next(_counts(row, "_without") for row in own if row["rewrite"] == FILTERED)
        for row in own:
            counts, without = _counts(row), _counts(row, "_without")
            with_it = filtered if row["rewrite"] == FILTERED else whole
            saved = None if without is None else [off - on for off, on in zip(without, with_it, strict=True)]
            if saved is not None and counts == before and not any(saved):
                idle.append(f"`{row['rewrite']}`")
            else:
                label = _START.get(row["rewrite"], f"`{row['rewrite']}`")
                lines.append(f"| {label} | {' | '.join((*_shown(counts), *_shown(saved)))} |")
            before = counts
        if idle:
            lines += ["", f"Without a change here: {', '.join(idle)}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _counts(row: Mapping[str, str], suffix: str = "") -> list[int] | None:
    numbers = [row[name + suffix] for name in COUNTS]
    return [int(number) for number in numbers] if all(numbers) else None


def _shown(counts: Sequence[int] | None) -> tuple[str, ...]:
    if counts is None:
        return ("",) * len(COUNTS)
    launches, flops, size = counts
    return str(launches), f"{flops / 1e9:.1f}", f"{size / 1e9:.2f}"


def readme(found: Sequence[Mapping[str, str]]) -> str:
    what = [f"- `{each.name}`: {each.metadata['what']}{_needs(each.name)}" for each in fields(Rewrites)]
    return ABOUT.format(what="\n".join(what), tables=markdown(found))


def _needs(name: str) -> str:
    return f"; needs {' and '.join(f'`{each}`' for each in needed(name))}" if needed(name) else ""


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # The parameters of a fake network cannot be converted afterwards.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _made(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _made(item) for key, item in value.items()}
    return value() if callable(value) else torch.zeros(value, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rewrites", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the CSV and the table")
    found = rows(LAYOUTS)
    if parser.parse_args().write:
        write_atomic(CSV, text(found).encode())
        write_atomic(README, readme(found).encode())
    else:
        sys.stdout.write(text(found))


if __name__ == "__main__":
    main()
