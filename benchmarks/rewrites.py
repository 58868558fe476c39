"""What each exact rewrite saves in one forward, counted: `python -m benchmarks.rewrites [--write]`.

It prints the CSV, or writes it and the table in fastdiff/models/README.md. The rewrites are turned on one after
another; a row stands for its rewrite and all above it. What is remembered from an earlier call is there already.
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
from fastdiff.models.rewrites import Rewrites, names

CSV = RESULTS / "rewrites.csv"
README = ROOT / "fastdiff" / "models" / "README.md"
COLUMNS = ("network", "rewrite", "launches", "flops", "bytes")
OUTSIDE = ("sampler_step",)
"""Rewrites of what happens between two forwards."""

_START = {"diffusers": "diffusers", "none": "fastdiff, no rewrite"}

_STAGES = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
_AUTOENCODER = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, **_STAGES}


@dataclass(frozen=True)
class Layout:
    """A network of the library's, ours for its configuration, and the arguments of one call by their shapes.

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


LAYOUTS = (
    Layout(
        "Stable Diffusion 1.5: U-Net, 2 x 64 x 64",
        diffusers.UNet2DConditionModel,
        UNet,
        {"cross_attention_dim": 768},
        {"sample": (2, 4, 64, 64), "timestep": (), "encoder_hidden_states": (2, 77, 768)},
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
            "timestep": (),
            "encoder_hidden_states": (2, 77, 2048),
            "added_cond_kwargs": {"text_embeds": (2, 1280), "time_ids": (2, 6)},
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


def steps(layout: Layout) -> list[tuple[str, Cost]]:
    """(name, cost of a forward): of the library's network, of ours without a rewrite, and with one more each time."""
    with FakeTensorMode(), torch.no_grad():
        with _default_dtype(torch.float16):
            library, network = layout.library(**layout.config), layout.ours(**layout.config)
        found = [("diffusers", count(layout.call(library)).total)]
        call, on = layout.call(network), Rewrites.none()
        for name in ("none", *(name for name in names() if name not in OUTSIDE)):
            if name != "none":
                on = Rewrites.parse([*(each for each in names() if getattr(on, each)), name])
            network.rewrites = on  # type: ignore[assignment]
            # A run's times are projected in its second call.
            call()
            call()
            found.append((name, count(call).total))
    return found


def rows(layouts: Iterable[Layout]) -> list[dict[str, str]]:
    return [
        {
            "network": layout.title,
            "rewrite": name,
            "launches": str(cost.launches),
            "flops": str(cost.flops),
            "bytes": str(cost.bytes),
        }
        for layout in layouts
        for name, cost in steps(layout)
    ]


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
        lines = [f"## {title}", "", "| | launches | GFLOP | GB |", "|---|--:|--:|--:|"]
        before: tuple[str, ...] = ()
        idle = []
        for row in (row for row in found if row["network"] == title):
            numbers = (row["launches"], f"{int(row['flops']) / 1e9:.1f}", f"{int(row['bytes']) / 1e9:.2f}")
            label = {"diffusers": "diffusers", "none": "fastdiff, no rewrite"}.get(
                row["rewrite"], f"`{row['rewrite']}`"
            )
            if numbers == before and row["rewrite"] not in ("diffusers", "none"):
                idle.append(label)
            else:
                lines.append(f"| {label} | {' | '.join(numbers)} |")
            before = numbers
        if idle:
            lines += ["", f"Without a change here: {', '.join(idle)}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def readme(found: Sequence[Mapping[str, str]]) -> str:
    what = [f"- `{each.name}`: {each.metadata['what']}" for each in fields(Rewrites)]
    return "\n".join(
        (
            "# Networks",
            "",
            "Made by `python -m benchmarks.rewrites --write`; do not edit it.",
            "",
            "Each network computes the function of diffusers' own, with its parameters, in less work. That is a set of",
            "rewrites; each leaves the function as it is and can be turned off:",
            "",
            *what,
            "",
            "What one forward costs in float16, counted on fake tensors, not timed. Each row has its rewrite and those",
            "above it. Launches are calls of operators that compute something, a convolution's bias being one more;",
            "FLOP are those of convolutions, products and attention; bytes are what the operators read and write.",
            "",
            markdown(found),
            "",
        )
    )


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
    # A time is an element of its run's times, as in a pipeline.
    made: Tensor = torch.arange(50)[7] if value == () else torch.zeros(value, dtype=torch.float16)
    return made


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
