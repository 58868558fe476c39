"""`fastdiff.sample`: labels, guidance and batches put into the loop, with a small network in place of a real one."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff import Guidance, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.models import Model as LoadedModel

SEEDS = [3, 1, 4, 1, 5, 9, 2]
LABELS = [0, 1, 2, 2, 1, 0, 3]
VP_METHODS = [
    name for name, info in samplers.methods().items() if (not info.kinds or "vp" in info.kinds) and not info.inverse
]


class Network(torch.nn.Module):
    """v that leads to an image of one grey per class; keeps what it was called with."""

    def __init__(self, classes: int | None = 4):
        super().__init__()
        self.grey = torch.nn.Parameter(torch.linspace(-0.8, 0.8, 5))
        self.classes, self.calls = classes, []

    def forward(self, sample, timestep, encoder_hidden_states=None, *, class_labels=None):
        self.calls.append((sample.shape[0], class_labels))
        alpha, sigma = (torch.from_numpy(a).float()[timestep.long()].view(-1, 1, 1, 1) for a in LEVELS)
        target = torch.zeros_like(sample)
        if class_labels is not None:
            target = target + self.grey[class_labels].view(-1, 1, 1, 1)
        clean = target + 0.2 * torch.tanh(alpha * sample)
        return (alpha * (sample - alpha * clean) / sigma - sigma * clean).to(sample.dtype)


SCHEDULE = schedules.cosine(1000)
LEVELS = (SCHEDULE.alphas.copy(), SCHEDULE.sigmas.copy())


@dataclass(frozen=True)
class Model:
    network: Any
    schedule: schedules.Schedule = SCHEDULE
    prediction: str = "v"
    sample_shape: tuple[int, ...] = (1, 6, 6)
    num_classes: int | None = 4
    null_label: int | None = 4
    clip: float | None = 1.0


@pytest.fixture
def model() -> Model:
    return Model(Network())


def test_samples_are_images_of_their_class(model):
    images = fastdiff.sample(model, method="dpmpp_2m", steps=20, seeds=SEEDS, labels=LABELS, guidance=1.0)
    assert images.shape == (7, 1, 6, 6)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1.0
    expected = model.network.grey[torch.tensor(LABELS)].view(-1, 1, 1, 1)
    assert (images - expected).abs().max() < 0.21
    assert {count for count, _ in model.network.calls} == {7}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_batches_do_not_change_the_samples(model, batch_size):
    arguments = {"seeds": SEEDS, "labels": LABELS, "guidance": 2.5, "method": "dpmpp_2m_sde", "steps": 5}
    whole = fastdiff.sample(model, **arguments, batch_size=7)
    model.network.calls.clear()
    assert torch.equal(fastdiff.sample(model, **arguments, batch_size=batch_size), whole)
    assert max(count for count, _ in model.network.calls) == 2 * min(batch_size, 7)


def test_guidance_pairs_the_null_label_with_the_class(model):
    fastdiff.sample(model, steps=3, seeds=SEEDS, labels=LABELS, guidance=2.0)
    for count, labels in model.network.calls:
        assert count == 14
        assert labels.tolist() == [4] * 7 + LABELS


def test_guidance_moves_away_from_the_unconditional_sample(model):
    plain, guided = (
        fastdiff.sample(model, steps=10, seeds=[0], labels=[3], guidance=g).mean().item() for g in (1.0, 1.2)
    )
    # uncond is grey[4], the class grey[3] below it: guidance goes further below.
    assert guided < plain - 0.05


def test_without_labels_the_null_label_is_used(model):
    fastdiff.sample(model, steps=2, seeds=[0, 1])
    assert all(labels.tolist() == [4, 4] for _, labels in model.network.calls)


def test_a_model_without_classes_gets_no_labels():
    model = Model(Network(), num_classes=None, null_label=None)
    images = fastdiff.sample(model, steps=2, seeds=[0, 1])
    assert images.shape == (2, 1, 6, 6)
    assert all(labels is None for _, labels in model.network.calls)


@pytest.mark.parametrize("method", VP_METHODS)
def test_every_method_samples(model, method):
    images = fastdiff.sample(model, method=method, seeds=SEEDS, labels=LABELS)
    expected = model.network.grey[torch.tensor(LABELS)].view(-1, 1, 1, 1)
    assert (images - expected).abs().mean() < 0.21


@pytest.mark.parametrize("method", samplers.ADAPTIVE)
@pytest.mark.parametrize("guidance", [1.0, 1.2])
def test_adaptive_methods_sample(model, method, guidance):
    arguments = {"seeds": SEEDS, "labels": LABELS, "guidance": guidance, "rtol": 0.01}
    images = fastdiff.sample(model, method=method, **arguments)
    fixed = fastdiff.sample(model, method="dpmpp_2m", steps=100, seeds=SEEDS, labels=LABELS, guidance=guidance)
    assert (images - fixed).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 20}, "steps: expected None with rk45, which chooses its own"),
        ({"image": torch.zeros(1, 1, 6, 6)}, "image: expected None with rk45, which starts from noise"),
        ({"callback": print}, "callback: expected None with rk45"),
        ({"guidance": Guidance(scale=2.0, rescale=0.5)}, "guidance: expected one number with rk45"),
        ({"eta": 0.5}, "eta"),
    ],
    ids=str,
)
def test_what_adaptive_methods_refuse(model, arguments, message):
    with pytest.raises(InputError, match=message):
        fastdiff.sample(model, method="rk45", seeds=SEEDS, labels=LABELS, **arguments)


def test_several_conditions(model):
    """grey[1] + 2 (grey[2] - grey[4]) and so on: the sample is the combination of what each class looks like."""
    guidance = Guidance(scale=(1.0, 0.5))
    images = fastdiff.sample(model, seeds=SEEDS, labels=[[0] * len(SEEDS), [1] * len(SEEDS)], guidance=guidance)
    grey = model.network.grey
    expected = grey[4] + (grey[0] - grey[4]) + 0.5 * (grey[1] - grey[4])
    assert (images - expected.clamp(-1.0, 1.0)).abs().mean() < 0.21
    with pytest.raises(InputError, match="labels: expected 2 lists, one for each scale of guidance, got"):
        fastdiff.sample(model, seeds=SEEDS, labels=LABELS, guidance=guidance)


def test_one_image_for_every_seed(model):
    image = torch.full((1, 6, 6), 0.25)
    mask = torch.zeros(6, 6)
    mask[3:] = 1.0
    found = fastdiff.sample(model, seeds=SEEDS, labels=LABELS, image=image, mask=mask, batch_size=2)
    assert (found[:, :, :3] == 0.25).all()
    assert not torch.isclose(found[:, :, 3:], torch.tensor(0.25)).all()
    with pytest.raises(InputError, match=r"image: expected .*, one per seed, or one for all, got 2"):
        fastdiff.sample(model, seeds=[*SEEDS, 9], labels=[*LABELS, 0], image=torch.zeros(2, 1, 6, 6))


def test_options_reach_the_table(model):
    a = fastdiff.sample(model, method="ddim", steps=4, seeds=[7], labels=[0], eta=1.0, spacing="leading")
    b = fastdiff.sample(model, method="ddim", steps=4, seeds=[7], labels=[0], eta=0.0, spacing="leading")
    assert not torch.equal(a, b)
    with pytest.raises(InputError, match="no option 'etta'"):
        fastdiff.sample(model, method="ddim", seeds=[7], labels=[0], etta=1.0)


def test_clip_is_the_models_unless_given(model):
    tight = fastdiff.sample(model, steps=4, seeds=[7], labels=[0], clip=0.1)
    assert tight.abs().max() <= 0.1 + 1e-6
    own = fastdiff.sample(replace(model, clip=0.1), steps=4, seeds=[7], labels=[0])
    assert torch.equal(tight, own)


def test_callback_and_seeds_of_any_kind(model):
    infos = []
    images = fastdiff.sample(model, steps=3, seeds=range(2), labels=iter([1, 2]), callback=infos.append)
    assert len(infos) == 3
    listed = fastdiff.sample(model, steps=3, seeds=torch.tensor([0, 1]), labels=torch.tensor([1, 2]))
    assert torch.equal(images, listed)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"labels": [0]}, "labels: expected 2, one per seed, got 1"),
        ({}, {"labels": 3}, "labels: expected one integer per sample, got 3"),
        ({}, {"labels": [0, 4]}, r"labels\[1\]: expected a class from 0 to 3, got 4"),
        ({}, {"labels": [0, -1]}, r"labels\[1\]: expected a class"),
        ({}, {"labels": [0, "shirt"]}, r"labels\[1\]: expected an integer, got 'shirt'"),
        ({}, {"labels": torch.tensor([0.0, 1.5])}, r"labels\[0\]: expected an integer"),
        ({}, {"guidance": 2.0}, "guidance: expected 1.0 because labels is None"),
        ({"null_label": None}, {"labels": [0, 1], "guidance": 2.0}, "trained without dropping labels"),
        ({"null_label": None}, {}, "labels: expected one class from 0 to 3 per seed, got None"),
        ({"num_classes": None}, {"labels": [0, 1]}, "labels: expected None because the model has no classes"),
        ({}, {"seeds": []}, "seeds: expected at least one"),
        ({}, {"seeds": 3}, "seeds: expected one integer per sample, got 3; pass a list or a range"),
        ({}, {"seeds": [0, 1, 2**64], "batch_size": 2}, r"seeds\[2\]: expected an integer of at most 64 bits"),
        ({}, {"batch_size": 0}, "batch_size: expected a positive whole number"),
        ({}, {"steps": 0}, "steps: expected a whole number from 1 to 1000"),
        ({}, {"method": "dpm++"}, "method: no method 'dpm"),
        ({}, {"device": "meta"}, "device: the network is on cpu, got meta; move the network"),
        ({}, {"dtype": torch.bfloat16}, "dtype: the network is torch.float32, got torch.bfloat16; convert"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(model, changes, arguments, message):
    with pytest.raises(InputError, match=message):
        fastdiff.sample(replace(model, **changes), **{"seeds": [0, 1], **arguments})


def test_a_loaded_model_is_what_sample_takes():
    """The real Model and UNet, with random weights."""
    from fastdiff.models import UNet

    network = UNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=4,
    ).eval()
    model = LoadedModel(network, SCHEDULE, "v", (1, 8, 8), num_classes=3)
    images = fastdiff.sample(model, steps=3, seeds=[0, 1], labels=[0, 2], guidance=2.0)
    assert images.shape == (2, 1, 8, 8)
    assert torch.isfinite(images).all()
    alone = fastdiff.sample(model, steps=3, seeds=[1], labels=[2], guidance=2.0)
    torch.testing.assert_close(alone[0], images[1], rtol=0, atol=1e-4)
