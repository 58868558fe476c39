"""Batches: functions of (seed, step), each image once an epoch, the right share of labels dropped."""

import numpy as np
import pytest
import torch

from fastdiff.config import use_backend
from fastdiff.training.batches import BatchStream, validation_batches
from fastdiff.training.data import ImageSet


@pytest.fixture(autouse=True)
def reference():
    with use_backend("reference"):
        yield


def image_set(count=40):
    images = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).repeat(1, 1, 4, 4)
    images[:, :, :, 0] = 255
    return ImageSet(images, torch.arange(count) % 4, 4)


def stream(**options):
    return BatchStream(image_set(), **({"batch": 16, "timesteps": 100, "seed": 5} | options))


def tensors(batch):
    return [batch.x0, batch.noise, batch.k, batch.labels]


def test_a_step_does_not_depend_on_those_before_it():
    walked = stream(label_dropout=0.3, flip=True)
    for step in range(1, 8):
        last = walked.at(step)
    jumped = stream(label_dropout=0.3, flip=True).at(7)
    assert all(map(torch.equal, tensors(last), tensors(jumped)))


@pytest.mark.parametrize("other", [{"seed": 6}, {"step": 8}], ids=["seed", "step"])
def test_seed_and_step_change_everything(other):
    first = stream(label_dropout=0.3).at(7)
    second = stream(label_dropout=0.3, seed=other.get("seed", 5)).at(other.get("step", 7))
    assert not any(map(torch.equal, tensors(first), tensors(second)))


def test_each_epoch_shows_every_image_once_in_a_new_order():
    seen = torch.cat([stream().indices(step) for step in range(1, 6)])
    first, second = seen[:40], seen[40:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(40))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(40))


def test_each_batch_spreads_its_times_evenly():
    for step in range(1, 20):
        k = stream().at(step).k
        assert sorted((k * 16 // 100).tolist())[0] >= 0
        gaps = np.diff(np.sort(k.numpy()))
        assert set(gaps.tolist()) <= {6, 7}


def test_times_cover_the_schedule_uniformly():
    k = torch.cat([stream().at(step).k for step in range(1, 401)])
    counts = torch.bincount(k, minlength=100)
    assert len(counts) == 100
    # 64 on average; evenly spread draws vary less than independent ones would (8).
    assert (counts - 64).abs().max() < 32


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_share_of_dropped_labels(rate):
    labels = torch.cat([stream(label_dropout=rate).at(step).labels for step in range(1, 201)])
    share = (labels == 4).float().mean().item()
    # Three standard deviations of 3,200 draws.
    assert abs(share - rate) <= 3 * (rate * (1 - rate) / 3200) ** 0.5
    assert labels.max() <= 4


def test_images_are_scaled_and_flipped_by_half():
    plain, flipped = stream().at(3), stream(flip=True).at(3)
    assert plain.x0[:, 0, 0, 0].eq(1).all()
    assert torch.equal(plain.x0[:, 0, 0, 1], plain.x0.new_tensor(stream().indices(3).tolist()) / 127.5 - 1)
    mirrored = flipped.x0[:, 0, 0, 3].eq(1)
    assert torch.equal(flipped.x0[mirrored], plain.x0[mirrored].flip(-1))
    assert torch.equal(flipped.x0[~mirrored], plain.x0[~mirrored])
    share = torch.cat([stream(flip=True).at(s).x0[:, 0, 0, 3].eq(1) for s in range(1, 101)]).float().mean()
    assert abs(share - 0.5) < 3 * 0.5 / 1600**0.5


def test_noise_is_standard_normal_and_new_each_step():
    noise = torch.stack([stream().at(step).noise for step in range(1, 101)])
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std() - 1) < 0.02
    flat = noise.flatten(2).transpose(0, 1).flatten(0, 1)
    assert len(torch.unique(flat, dim=0)) == 1600


def test_validation_is_fixed_and_keeps_labels():
    data = image_set()
    first, second = (validation_batches(data, batch=16, timesteps=100, seed=5) for _ in range(2))
    assert [len(batch.k) for batch in first] == [16, 16, 8]
    assert all(
        torch.equal(x, y)
        for a, b in zip(first, second, strict=True)
        for x, y in zip(tensors(a), tensors(b), strict=True)
    )
    assert torch.equal(torch.cat([batch.labels for batch in first]), data.labels)
    assert sorted(torch.cat([batch.k for batch in first]).tolist()) == [int((i + 0.5) / 40 * 100) for i in range(40)]
    # A batch size says nothing about the noise.
    whole = validation_batches(data, batch=40, timesteps=100, seed=5)[0]
    assert torch.equal(torch.cat([batch.noise for batch in first]), whole.noise)
