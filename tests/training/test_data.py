"""Reading image sets: every accepted form, and one clear error for each kind of bad file."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.errors import InputError
from fastdiff.training.data import load_images, split_holdout


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def write_idx(folder, pixels, labels, *, split="train", compress=False):
    pack, end = (gzip.compress, ".gz") if compress else (bytes, "")
    (folder / f"{split}-images-idx3-ubyte{end}").write_bytes(pack(idx_bytes(pixels)))
    (folder / f"{split}-labels-idx1-ubyte{end}").write_bytes(pack(idx_bytes(labels)))


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "gzip"])
def test_idx_folder(tmp_path, pixels, labels, compress):
    write_idx(tmp_path, pixels, labels, compress=compress)
    write_idx(tmp_path, pixels[:2] // 2, labels[:2], split="t10k", compress=compress)
    data = load_images(tmp_path)
    assert torch.equal(data.images, torch.from_numpy(pixels)[:, None])
    assert data.labels.tolist() == labels.tolist()
    assert data.num_classes == 3
    assert torch.equal(load_images(tmp_path, split="t10k").images, torch.from_numpy(pixels[:2] // 2)[:, None])


def test_one_idx_file_finds_its_labels(tmp_path, pixels, labels):
    write_idx(tmp_path, pixels, labels)
    assert load_images(tmp_path / "train-images-idx3-ubyte").labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda x: idx_bytes(x)[:-1], "truncated"),
        (lambda x: idx_bytes(x) + b"\0", "truncated or foreign"),
        (lambda x: idx_bytes(x)[:7], "header"),
        (lambda x: idx_bytes(x[0]), "magic number 0x00000803"),
        (lambda x: gzip.compress(idx_bytes(x))[:-20], "cannot be read"),
        (lambda x: b"\x1f\x8b" + idx_bytes(x), "cannot be read"),
    ],
    ids=["truncated", "overlong", "no-header", "magic", "truncated-gzip", "bad-gzip"],
)
def test_bad_idx(tmp_path, pixels, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content(pixels))
    with pytest.raises(InputError, match=message):
        load_images(tmp_path)


def test_idx_label_count(tmp_path, pixels, labels):
    write_idx(tmp_path, pixels, labels[:-1])
    with pytest.raises(InputError, match="expected 6 labels, got 5"):
        load_images(tmp_path)


def test_unknown_split_names_those_there(tmp_path, pixels, labels):
    write_idx(tmp_path, pixels, labels)
    with pytest.raises(InputError, match="got the splits train"):
        load_images(tmp_path, split="test")


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
@pytest.mark.parametrize("names", [("x", "labels"), ("images", "y")], ids=["x-labels", "images-y"])
def test_npz(tmp_path, layout, names, labels):
    x = np.random.default_rng(1).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    stored = {"NHW": x[:, 0], "NHWC": x.transpose(0, 2, 3, 1), "NCHW": x}[layout]
    np.savez(tmp_path / "set.npz", **{names[0]: stored, names[1]: labels})
    data = load_images(tmp_path / "set.npz")
    assert torch.equal(data.images, torch.from_numpy(x[:, :1] if layout == "NHW" else x))
    assert data.labels.tolist() == labels.tolist()


def test_npz_class_names_and_no_labels(tmp_path, pixels, labels):
    np.savez(tmp_path / "named.npz", x=pixels, labels=labels, classes=["a", "b", "c"])
    assert load_images(tmp_path / "named.npz").class_names == ("a", "b", "c")
    assert load_images(tmp_path / "named.npz", class_names=["p", "q", "r", "s"]).num_classes == 4
    np.savez(tmp_path / "bare.npz", x=pixels)
    bare = load_images(tmp_path / "bare.npz")
    assert bare.labels is None
    assert bare.num_classes is None


def test_npz_of_jpeg_files(tmp_path, labels):
    import io

    files = []
    for shade in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * shade, 10, 20)).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "set.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=labels)
    data = load_images(tmp_path / "set.npz")
    assert data.sample_shape == (3, 8, 8)
    assert data.images[:, 0, 4, 4].tolist() == pytest.approx([0, 40, 80, 120, 160, 200], abs=3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros(3)}, "array named x or images, got z"),
        ({"x": np.zeros((2, 8, 8))}, "uint8"),
        ({"x": np.zeros((2, 5, 8, 8), np.uint8)}, "C of 1, 3 or 4"),
        ({"x": np.zeros((2, 8, 6), np.uint8)}, "square"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.zeros(3, int)}, "expected 2 labels"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.zeros(2)}, "whole-number labels"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([0, -1])}, "counted from 0"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([0, 2]), "classes": np.array(["a", "b"])}, "class names"),
        ({"x": np.zeros((0, 8, 8), np.uint8)}, "at least one image"),
    ],
    ids=["no-images", "float", "channels", "oblong", "label-count", "label-type", "negative", "unnamed", "empty"],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_images(tmp_path / "set.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip", None], ids=["empty", "foreign", "pickled"])
def test_npz_that_is_none(tmp_path, content):
    path = tmp_path / "set.npz"
    if content is None:
        np.savez(path, x=np.array([{}], dtype=object))
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="plain arrays"):
        load_images(path)


def test_folder_of_classes(tmp_path):
    for name, shade in (("coat", 30), ("bag", 200)):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (12, 9), (shade, 0, 0)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(InputError, match="pass --size"):
        load_images(tmp_path)
    data = load_images(tmp_path, size=8)
    assert data.class_names == ("bag", "coat")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.images.shape == (4, 3, 8, 8)
    assert data.images[:, 0, 0, 0].tolist() == [200, 200, 30, 30]


def test_flat_folder_of_grey_images_has_one_channel(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), 10 * i).save(tmp_path / f"{i}.png")
    data = load_images(tmp_path)
    assert data.labels is None
    assert data.images[:, 0, 0, 0].tolist() == [0, 10, 20]


def test_resizing_crops_the_middle(tmp_path):
    x = np.zeros((1, 4, 16), np.uint8)
    x[:, :, 6:10] = 255
    np.savez(tmp_path / "set.npz", x=x)
    assert (load_images(tmp_path / "set.npz", size=4).images == 255).all()


@pytest.mark.parametrize("kind", ["missing", "empty-folder", "text", "broken-image"])
def test_bad_paths(tmp_path, kind):
    path = tmp_path / "data"
    if kind != "missing":
        path.mkdir()
    if kind == "text":
        path = tmp_path / "data.txt"
        path.write_text("x")
    if kind == "broken-image":
        (path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match="data"):
        load_images(path)


def test_holdout_keeps_the_number_of_classes(tmp_path, pixels):
    np.savez(tmp_path / "set.npz", x=pixels, labels=[0, 0, 0, 0, 0, 2])
    data = load_images(tmp_path / "set.npz")
    for seed in range(6):
        assert {part.num_classes for part in split_holdout(data, 3, seed=seed)} == {3}


def test_holdout_is_fixed_disjoint_and_complete(tmp_path):
    x = np.arange(20, dtype=np.uint8).repeat(16).reshape(20, 4, 4)
    np.savez(tmp_path / "set.npz", x=x)
    data = load_images(tmp_path / "set.npz")
    train, held = split_holdout(data, 5, seed=3)
    again = split_holdout(data, 5, seed=3)[1]
    assert torch.equal(held.images, again.images)
    together = sorted(train.images[:, 0, 0, 0].tolist() + held.images[:, 0, 0, 0].tolist())
    assert together == list(range(20))
    assert split_holdout(data, 0, seed=3)[1] is None
    with pytest.raises(InputError, match="holdout"):
        split_holdout(data, 20, seed=3)
