"""The model inside the package: small, complete, and following the label it is given."""

from importlib import resources

import pytest
import torch

import fastdiff

TROUSER, PULLOVER, SANDAL = 1, 2, 5


@pytest.fixture(scope="module")
def model():
    return fastdiff.load_model("fashion")


def test_file_is_small_and_has_a_card():
    assets = resources.files("fastdiff.assets")
    assert len((assets / "fashion.safetensors").read_bytes()) < 8_000_000
    assert "Fashion-MNIST" in (assets / "fashion.md").read_text()


def test_says_what_it_is(model):
    assert (model.sample_shape, model.num_classes, model.null_label) == ((1, 28, 28), 10, 10)
    assert model.class_names[TROUSER] == "Trouser"
    assert model.prediction == "v"


def test_follows_its_labels(model):
    """Trousers are narrow and tall, pullovers wide and tall, sandals low; images are neither empty nor full."""
    labels = [label for label in (TROUSER, PULLOVER, SANDAL) for _ in range(4)]
    images = fastdiff.sample(model, seeds=range(12), labels=labels, guidance=2.0, steps=10)
    lit = (images > -0.5).float()
    trouser, pullover, sandal = lit.mean(dim=(1, 2, 3)).split(4)
    assert 0.05 < sandal.mean() < pullover.mean() < 0.9
    columns = lit.amax(dim=2).mean(dim=(1, 2))
    assert columns[:4].max() < columns[4:8].min()
    assert torch.isfinite(images).all()
    assert trouser.mean() < pullover.mean()
