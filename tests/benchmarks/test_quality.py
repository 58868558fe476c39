"""The quality check: its classifier, its augmentation, its counting, its CSV."""

import csv

import numpy as np
import pytest
import torch

from benchmarks import quality
from fastdiff import schedules
from fastdiff.errors import InputError
from fastdiff.models import UNet
from fastdiff.models.loading import Model
from fastdiff.training.data import ImageSet


def squares(count=192):
    """Class 0: bright top half; class 1: bright bottom half."""
    images = torch.randint(0, 60, (count, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(count) % 2
    for image, label in zip(images, labels, strict=True):
        image[:, 14 * label : 14 * label + 14] += 180
    return ImageSet(images, labels, 2)


def test_half_of_the_images_are_mirrored():
    images = torch.rand(200, 1, 4, 4)
    seen = quality.mirrored(images, np.random.default_rng(0))
    turned = (seen == images.flip(3)).flatten(1).all(dim=1)
    assert torch.equal(seen[~turned], images[~turned])
    assert 70 <= turned.sum() <= 130


def test_classifier_learns_and_repeats_itself(monkeypatch):
    monkeypatch.setattr(quality, "EPOCHS", 3)
    monkeypatch.setattr(quality, "BATCH", 32)
    data = squares()
    first, second = quality.train_classifier(data), quality.train_classifier(data)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert (quality.predictions(first, quality.inputs(data.images)) == data.labels).float().mean() > 0.95


def test_recognised_counts_per_class(monkeypatch):
    network = UNet(block_out_channels=[4], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"],
                   norm_num_groups=2, add_attention=False, in_channels=1, out_channels=1, num_class_embeds=4,
                   layers_per_block=1, sample_size=28)  # fmt: skip
    model = Model(network.eval().requires_grad_(False), schedules.cosine(100), "v", (1, 28, 28), 3)
    seen = {}

    def sample(given, *, seeds, labels, **options):
        seen.update(model=given, seeds=list(seeds), labels=labels, options=options)
        return torch.zeros(len(labels), 1, 28, 28)

    monkeypatch.setattr(quality.fastdiff, "sample", sample, raising=False)
    monkeypatch.setattr(quality, "predictions", lambda network, images: torch.tensor([0, 0, 1, 2, 0, 1]))
    shares, seconds = quality.recognised(None, model, 2, steps=5)
    assert shares == [1.0, 0.5, 0.0]
    assert seconds >= 0
    assert seen["labels"] == [0, 0, 1, 1, 2, 2]
    assert seen["seeds"] == list(range(6))
    assert seen["options"] == {"steps": 5}


def test_rows_are_added_to_the_csv(tmp_path):
    path = tmp_path / "quality.csv"
    quality.append(path, {"a": "1", "b": "2"})
    quality.append(path, {"a": "3", "c": "4"})
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "2", "c": ""}, {"a": "3", "b": "", "c": "4"}]


def test_missing_data_is_said(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        quality.classifier(tmp_path / "c.safetensors", tmp_path / "nowhere")
