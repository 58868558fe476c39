"""`fastdiff sample` from a picture: what it reads, what it keeps, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import assert_refused, checkpoint, run  # noqa: F401


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A grey 8x8 picture of 128 with a coloured corner, saved larger and in colour."""
    pixels = np.full((8, 8, 3), 128, dtype=np.uint8)
    pixels[:4, :4] = 255, 0, 0
    path = tmp_path / "picture.png"
    Image.fromarray(pixels.repeat(4, axis=0).repeat(4, axis=1)).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:, 4:] = 255
    Image.fromarray(pixels).save(path)
    return path


def draw(capsys, checkpoint, out: Path, *arguments: object) -> np.ndarray:  # noqa: F811
    result = run(capsys, "sample", "--model", checkpoint, "--steps", 4, "--count", 3, "--out", out, *arguments)
    assert result[0] == 0, result[2]
    with np.load(out) as arrays:
        return arrays["images"]


def test_the_masked_part_is_kept(capsys, checkpoint, tmp_path, picture, mask):  # noqa: F811
    kept = draw(capsys, checkpoint, tmp_path / "a.npz", "--image", picture, "--mask", mask)
    expected = 2.0 * 128 / 255 - 1.0
    np.testing.assert_allclose(kept[:, 0, 6:, :3], expected, atol=1e-6)
    assert not np.isclose(kept[:, 0, :, 4:], expected, atol=1e-3).all()


def test_strength_is_how_much_is_new(capsys, checkpoint, tmp_path, picture):  # noqa: F811
    distances = []
    for strength in (0.25, 0.5, 1.0):
        drawn = draw(capsys, checkpoint, tmp_path / "a.npz", "--image", picture, "--strength", strength)
        distances.append(np.abs(drawn - (2.0 * 128 / 255 - 1.0)).mean())
    assert distances[0] < distances[2]
    default = draw(capsys, checkpoint, tmp_path / "a.npz", "--image", picture)
    same = draw(capsys, checkpoint, tmp_path / "a.npz", "--image", picture, "--strength", 0.6)
    assert np.array_equal(default, same)


def test_the_steps_that_strength_leaves_out_are_not_counted(capsys, checkpoint, tmp_path, picture):  # noqa: F811
    given = ["--image", picture, "--strength", 0.5, "--steps", 4, "--count", 1, "--out", tmp_path / "a.png"]
    assert ", 2 steps of dpmpp_2m, " in run(capsys, "sample", "--model", checkpoint, *given)[1]


def test_an_inverse_method_goes_all_the_way_to_noise(capsys, checkpoint, tmp_path, picture):  # noqa: F811
    out, given = tmp_path / "a.npz", ("--image", picture, "--method", "ddim_inverse")
    whole = draw(capsys, checkpoint, out, *given, "--strength", 1)
    assert np.array_equal(draw(capsys, checkpoint, out, *given), whole)
    assert not np.array_equal(draw(capsys, checkpoint, out, *given, "--strength", 0.5), whole)


def test_rescale(capsys, checkpoint, tmp_path):  # noqa: F811
    plain = draw(capsys, checkpoint, tmp_path / "a.npz", "--guidance", 3)
    rescaled = draw(capsys, checkpoint, tmp_path / "a.npz", "--guidance", 3, "--rescale", 1)
    assert not np.allclose(plain, rescaled, atol=1e-3)


@pytest.mark.parametrize("chosen", [["--method", "dpm_adaptive"], ["--option", "timesteps=[900, 500, 100]"]], ids=str)
def test_steps_that_are_not_counted(capsys, checkpoint, tmp_path, chosen):  # noqa: F811
    out = tmp_path / "a.npz"
    result = run(capsys, "sample", "--model", checkpoint, "--count", 2, "--out", out, *chosen)
    assert result[0] == 0, result[2]
    assert "2 images in" in result[1]
    assert "steps per second" not in result[1]
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mask", "MASK"], ["mask: expected --image with it"]),
        (["--strength", 0.5], ["strength: expected --image with it"]),
        (["--image", "nowhere.png"], ["image: nowhere.png cannot be read", "No such file"]),
        (["--image", "TEXT"], ["cannot be read (it is no image"]),
        (["--image", "PICTURE", "--strength", 1.5], ["strength: expected a number above 0 and at most 1"]),
        (["--image", "PICTURE", "--strength", 0.01], ["leaves none; take more steps"]),
        (["--rescale", 2, "--guidance", 2], ["rescale: expected a number from 0 to 1"]),
    ],
    ids=str,
)
def test_bad_pictures_are_refused(capsys, checkpoint, tmp_path, picture, mask, arguments, words):  # noqa: F811
    text = tmp_path / "text.png"
    text.write_text("no picture")
    files = {"MASK": mask, "TEXT": text, "PICTURE": picture}
    given = [files.get(argument, argument) for argument in arguments]
    out = tmp_path / "a.npz"
    assert_refused(run(capsys, "sample", "--model", checkpoint, "--out", out, *given), *words)
    assert not out.exists()
