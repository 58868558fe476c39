"""Networks built on the operators, and the checkpoints they come from."""

from fastdiff.models.autoencoder import AutoencoderKL
from fastdiff.models.loading import Model, load_autoencoder, load_model, save_model
from fastdiff.models.unet import UNet

__all__ = ["AutoencoderKL", "Model", "UNet", "load_autoencoder", "load_model", "save_model"]
