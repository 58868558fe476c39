"""python peak_memory.py eager|accelerated DTYPE: bytes of the peak while a U-Net is called, those of its weights, and
those of the copies of them; the peak counts from before the first call."""

import sys
from pathlib import Path

import diffusers
import torch

import fastdiff


def unet(channels, dtype):
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return model.to(dtype).eval()


def call(model, dtype):
    model(torch.randn(1, 3, 16, 16, dtype=dtype), 7)


def resident(which):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def main(kind, name):
    dtype = getattr(torch, name)
    # The code that a first call reads is not the network's memory.
    for accelerated in (False, True):
        small = unet((32, 64, 64), dtype)
        if accelerated:
            fastdiff.accelerate(small, strict=True)
        call(small, dtype)
    del small
    model = unet((128, 256, 384), dtype)
    if kind == "accelerated":
        fastdiff.accelerate(model, strict=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    for _ in range(3):
        call(model, dtype)
    copies = sum(fastdiff.report().networks.values())
    print(resident("VmHWM") - before, sum(parameter.nbytes for parameter in model.parameters()), copies)


main(*sys.argv[1:])
