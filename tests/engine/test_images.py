"""Starting from an image and keeping parts of one."""

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import ops, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_INITIAL, seed_tensor

SHAPE = (3, 2, 4, 5)
SEEDS = [4, 9, -2]
VP = schedules.linear(1000)
IMAGE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 2.0 - 1.0
NOISE = ops.philox_normal(seed_tensor(SEEDS), SHAPE, stream=STREAM_INITIAL)
HALF = torch.zeros(SHAPE[2:])
HALF[:, 2:] = 1.0


def table(method: str = "ddim", steps: int = 8, **options) -> samplers.StepTable:
    return samplers.build(method, schedule=VP, steps=steps, prediction="sample", **options)


def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.8 * torch.sin(2.0 * x + 0.001 * t.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("method", ["ddim", "euler", "dpmpp_2m"])
def test_a_run_starts_from_the_noised_image(method):
    steps = table(method, strength=0.5)
    assert len(steps) == 4
    alpha, sigma = (float(value) for value in VP.at(steps.timesteps[0]))
    seen = []

    def remember(x, t):
        seen.append(x)
        return denoiser(x, t)

    found = fastdiff.run(remember, steps, seeds=SEEDS, image=IMAGE)
    torch.testing.assert_close(seen[0], alpha * IMAGE + sigma * NOISE, rtol=1e-5, atol=1e-6)
    again = fastdiff.run(denoiser, steps, seeds=SEEDS, x=seen[0] * steps.init_level[0] / alpha)
    torch.testing.assert_close(found, again, rtol=1e-5, atol=1e-5)


def test_less_strength_stays_nearer_to_the_image():
    """With the exact denoiser of a single image's neighbourhood: the distance grows with the strength."""

    def near(x, t):
        alpha, sigma = (torch.from_numpy(v).float().reshape(-1, 1, 1, 1) for v in VP.at(t.double().numpy()))
        return alpha * x / (alpha**2 + sigma**2)

    distances = []
    for strength in (0.2, 0.5, 0.9):
        steps = table(steps=20, strength=strength)
        found = fastdiff.run(near, steps, seeds=SEEDS, image=IMAGE)
        distances.append(float((found - IMAGE).norm()))
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("method", ["ddim", "ddpm", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_inpainting_keeps_the_image_at_every_noise_level(method, guidance):
    steps, states = table(method), []
    arguments = {"seeds": SEEDS, "image": IMAGE, "mask": HALF, "guidance": guidance}
    found = fastdiff.run(denoiser, steps, callback=lambda info: states.append(info.x), **arguments)
    assert torch.equal(found[..., :2], IMAGE[..., :2])
    assert not torch.isclose(found[..., 2:], IMAGE[..., 2:]).any()
    for row, state in zip(steps.rows, states, strict=True):
        signal, noise = row[fastdiff.ops.row.KNOWN]
        expected = signal * IMAGE + noise * NOISE
        torch.testing.assert_close(state[..., :2], expected[..., :2].float(), rtol=1e-5, atol=1e-5)


def test_the_new_part_starts_from_noise_alone():
    seen = []

    def remember(x, t):
        seen.append(x)
        return denoiser(x, t)

    steps = table(steps=4)
    fastdiff.run(remember, steps, seeds=SEEDS, image=100.0 * IMAGE, mask=HALF)
    assert torch.equal(seen[0][..., 2:], (steps.init_scale * NOISE)[..., 2:])
    fastdiff.run(remember, table(steps=4, strength=0.5), seeds=SEEDS, image=IMAGE, mask=HALF)
    alpha, sigma = (float(value) for value in VP.at(table(steps=4, strength=0.5).timesteps[0]))
    torch.testing.assert_close(seen[4], alpha * IMAGE + sigma * NOISE, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "mask",
    [
        HALF,
        HALF.bool(),
        HALF[None],
        HALF[None, None],
        HALF.expand(SHAPE),
        HALF[None, None].expand(3, 1, 4, 5),
        HALF[:1],
    ],
    ids=lambda mask: f"{tuple(mask.shape)}-{mask.dtype}",
)
def test_masks_broadcast(mask):
    steps = table(steps=3)
    expected = fastdiff.run(denoiser, steps, seeds=SEEDS, image=IMAGE, mask=HALF)
    assert torch.equal(fastdiff.run(denoiser, steps, seeds=SEEDS, image=IMAGE, mask=mask), expected)


def test_a_soft_mask_blends():
    steps = table(steps=3)
    soft = torch.full(SHAPE[2:], 0.25)
    found = fastdiff.run(denoiser, steps, seeds=SEEDS, image=IMAGE, mask=soft)
    states = []
    fastdiff.run(denoiser, steps, seeds=SEEDS, image=IMAGE, mask=soft, callback=lambda info: states.append(info))
    last = states[-1].model_output
    torch.testing.assert_close(found, 0.25 * last + 0.75 * IMAGE, rtol=1e-5, atol=1e-5)


def test_a_mask_of_ones_is_no_mask():
    steps = table("dpmpp_2m")
    free = fastdiff.run(denoiser, steps, shape=SHAPE, seeds=SEEDS)
    assert torch.equal(fastdiff.run(denoiser, steps, seeds=SEEDS, image=IMAGE, mask=torch.ones(1, 1, 4, 5)), free)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": HALF}, "mask: expected None without an image to keep; pass image"),
        ({"image": IMAGE.numpy()}, "image: expected a tensor, got ndarray"),
        ({"image": IMAGE[:, :1]}, "image: expected the batch's shape"),
        ({"image": IMAGE.double()}, "image: expected float32, got torch.float64"),
        ({"image": IMAGE, "mask": HALF[:, :3]}, "mask: expected a shape that broadcasts to"),
        ({"image": IMAGE, "mask": torch.ones(1, 3, 2, 4, 5)}, "mask: expected a shape that broadcasts to"),
        ({"shape": None}, "shape: expected the sizes of the batch"),
    ],
    ids=str,
)
def test_bad_images_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        fastdiff.run(denoiser, table(), **{"seeds": SEEDS, "shape": SHAPE, **arguments})


def test_levels_say_where_each_row_starts():
    steps = table("heun", steps=5)
    assert steps.levels.shape == (len(steps), 2)
    ratios = steps.levels[:, 1] / steps.levels[:, 0]
    alphas, sigmas = VP.at(steps.timesteps)
    np.testing.assert_allclose(ratios, sigmas / alphas, rtol=1e-9)
