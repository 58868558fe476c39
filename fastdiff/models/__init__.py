"""Networks built on the operators, and the checkpoints they come from."""

from fastdiff.models.unet import UNet

__all__ = ["UNet"]
