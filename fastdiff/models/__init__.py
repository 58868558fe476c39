"""Networks built on the operators, and the checkpoints they come from."""

from fastdiff.models.loading import Model, load_model, save_model
from fastdiff.models.unet import UNet

__all__ = ["Model", "UNet", "load_model", "save_model"]
