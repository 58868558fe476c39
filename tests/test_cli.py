"""The command line: what it writes, what it prints, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastdiff
from fastdiff import cli, config, schedules
from fastdiff.models import UNet
from fastdiff.models.loading import Model, save_model

CLASSES = ("T-shirt/top", "Bag", "Ankle boot")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's process: Triton's interpreter, which the tests of kernels turn on, is off."""
    monkeypatch.setattr(config, "triton_interpreted", lambda: False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network with three classes and random weights."""
    torch.manual_seed(0)
    network = UNet(
        in_channels=1,
        out_channels=1,
        sample_size=8,
        block_out_channels=[8, 8],
        down_block_types=["DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=4,
    )
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    model = Model(network.eval(), schedules.cosine(1000), "v", (1, 8, 8), num_classes=3, class_names=CLASSES)
    save_model(model, path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit status 2, nothing on stdout, one line on stderr with these words."""
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert err.startswith("fastdiff: error: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


def test_sample_writes_a_grid_and_one_line(capsys, checkpoint, tmp_path):
    out = tmp_path / "grid.png"
    status, stdout, stderr = run(
        capsys, "sample", "--model", checkpoint, "--count", 5, "--steps", 3, "--columns", 3, "--out", out
    )
    assert (status, stderr) == (0, "")
    assert stdout.count("\n") == 1
    assert "5 images" in stdout
    assert "steps per second" in stdout
    with Image.open(out) as image:
        # 8 pixels drawn as 64, two rows of three, a gap of two around each.
        assert (image.mode, image.size) == ("L", (3 * 66 + 2, 2 * 66 + 2))
        assert image.getpixel((199, 133)) == 255, "a white line"
        assert image.crop((134, 68, 198, 132)).getextrema() == (0, 0), "the place of the sixth image is empty"


def test_a_grid_is_full_by_default(capsys, checkpoint, tmp_path):
    out = tmp_path / "grid.png"
    run(capsys, "sample", "--model", checkpoint, "--count", 8, "--steps", 1, "--out", out)
    with Image.open(out) as image:
        assert image.size == (4 * 66 + 2, 2 * 66 + 2)


def test_sample_equals_the_python_interface(capsys, checkpoint, tmp_path):
    out = tmp_path / "images.npz"
    arguments = ("--method", "ddim", "--option", "eta=0.5", "--steps", 4, "--guidance", 2, "--seed", 7, "--count", 4)
    status, stdout, _ = run(capsys, "sample", "--model", checkpoint, *arguments, "--out", out, "--json")
    expected = fastdiff.sample(
        fastdiff.load_model(checkpoint),
        method="ddim",
        eta=0.5,
        steps=4,
        guidance=2.0,
        seeds=range(7, 11),
        labels=[0, 1, 2, 0],
    )
    assert status == 0
    written = np.load(out)
    np.testing.assert_array_equal(written["images"], expected.numpy())
    assert written["labels"].tolist() == [0, 1, 2, 0]
    assert written["seeds"].tolist() == [7, 8, 9, 10]
    result = json.loads(stdout)
    assert result["labels"] == [0, 1, 2, 0]
    assert (result["images"], result["steps"], result["method"]) == (4, 4, "ddim")
    assert result["steps_per_second"] > 0


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], [0, 1, 2, 0]),
        (["--label", "1"], [1, 1, 1, 1]),
        (["--label", "bag", "ANKLE BOOT"], [1, 2, 1, 2]),
        (["--label", "2", "--label", "t-shirt/top"], [2, 0, 2, 0]),
        (["--label", "none"], None),
    ],
    ids=str,
)
def test_labels_by_number_and_name(capsys, checkpoint, tmp_path, asked, expected):
    arguments = ("--steps", 1, "--count", 4, "--out", tmp_path / "x.npz", "--json", *asked)
    status, stdout, _ = run(capsys, "sample", "--model", checkpoint, *arguments)
    assert status == 0
    assert json.loads(stdout)["labels"] == expected


@pytest.mark.parametrize("backend", ["reference", "attention=torch,group_norm_silu=reference"])
def test_backend_is_used(capsys, checkpoint, tmp_path, backend):
    fastdiff.report(reset=True)
    arguments = ("--steps", 1, "--count", 1, "--out", tmp_path / "x.npz", "--backend", backend)
    assert run(capsys, "sample", "--model", checkpoint, *arguments)[0] == 0
    assert ("group_norm_silu", "native") not in fastdiff.report().calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(capsys, checkpoint, tmp_path, dtype):
    arguments = ("--steps", 2, "--count", 2, "--out", tmp_path / "x.npz", "--dtype", dtype)
    assert run(capsys, "sample", "--model", checkpoint, *arguments)[0] == 0
    assert np.isfinite(np.load(tmp_path / "x.npz")["images"]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "ddmi"], ["no method 'ddmi'", "'ddim'"]),
        (["--label", "3"], ["0 to 2", "got 3"]),
        (["--label", "-1"], ["-1"]),
        (["--label", "bagg"], ["no class is called 'bagg'", "did you mean 'Bag'"]),
        (["--label", "none", "1"], ["'none' alone"]),
        (["--steps", "-5"], ["steps", "-5"]),
        (["--steps", "0"], ["steps", "got 0"]),
        (["--steps", "1001"], ["steps", "1001"]),
        (["--steps", "many"], ["--steps", "many", "fastdiff sample --help"]),
        (["--count", "0"], ["count", "got 0"]),
        (["--count", "1000001"], ["count", "1000000"]),
        (["--batch-size", "0"], ["batch-size", "got 0"]),
        (["--threads", "0"], ["threads", "got 0"]),
        (["--seed", "9223372036854775808"], ["seed"]),
        (["--guidance", "nan"], ["guidance", "nan"]),
        (["--label", "none", "--guidance", "2"], ["guidance"]),
        (["--option", "eta"], ["NAME=VALUE"]),
        (["--option", "etta=1"], ["etta"]),
        (["--option", "clip=-1"], ["clip", "got -1"]),
        (["--method", "ddim", "--option", "eta=2"], ["eta", "got 2"]),
        (["--device", "tpu"], ["device", "tpu"]),
        (["--device", "meta"], ["device", "meta"]),
        (["--dtype", "int8"], ["int8"]),
        (["--backend", "fast"], ["unknown backend 'fast'"]),
        (["--backend", "triton"], ["triton", "TRITON_INTERPRET"]),
        (["--cuont", "3"], ["--cuont"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_arguments_end_with_one_line(capsys, checkpoint, tmp_path, arguments, words):
    if arguments == ["--backend", "triton"] and torch.cuda.is_available():
        pytest.skip("Triton runs here")
    out = tmp_path / "grid.png"
    out.write_bytes(b"old")
    assert_refused(run(capsys, "sample", "--model", checkpoint, "--steps", 1, "--out", out, *arguments), *words)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["grid.jpg", "grid", "missing/grid.png", "folder.png"])
def test_bad_path_is_refused_before_the_model_is_read(capsys, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    assert_refused(run(capsys, "sample", "--model", tmp_path / "no-model", "--out", tmp_path / name), "out: ", name)


def test_unwritable_folder(capsys):
    assert_refused(run(capsys, "sample", "--out", "/proc/grid.png"), "/proc/grid.png cannot be written")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "pickle", "foreign", "missing", "folder"])
def test_bad_checkpoint(capsys, checkpoint, tmp_path, damage):
    path = tmp_path / ("model.pt" if damage == "pickle" else "model.safetensors")
    content = checkpoint.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "text":
        path.write_text("this is not a model\n" * 100)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        torch.save({"weight": torch.zeros(3)}, path)
    elif damage == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif damage == "folder":
        path.mkdir()
    assert_refused(run(capsys, "sample", "--model", path, "--out", tmp_path / "x.png"), str(path))
    assert not (tmp_path / "x.png").exists()


def test_failure_while_writing_keeps_the_old_file(capsys, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "grid.png"
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = run(capsys, "sample", "--model", checkpoint, "--steps", 1, "--count", 1, "--out", out)
    assert_refused(result, "No space left on device")
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_interrupt_is_quiet(capsys, checkpoint, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdiff.engine.sample.run", interrupted)
    out = tmp_path / "grid.png"
    out.write_bytes(b"old")
    assert run(capsys, "sample", "--model", checkpoint, "--out", out) == (130, "", "")
    assert out.read_bytes() == b"old"


def test_info_names_each_operator_and_says_what_is_missing(capsys):
    status, stdout, _ = run(capsys, "info")
    assert status == 0
    for words in (fastdiff.__version__, torch.__version__, "instruction set"):
        assert words in stdout
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU was found" in stdout
        assert "nothing CUDA is attempted" in stdout
        assert "not triton: there is no GPU" in stdout
    _, stdout, _ = run(capsys, "info", "--json")
    facts = json.loads(stdout)
    for name, operator in facts["operators"].items():
        assert operator["backend"] is not None, name
        assert set(operator["not"]) | {operator["backend"]} >= {"native", "triton", "reference"}


def test_info_says_why_a_demanded_backend_cannot_run(capsys):
    with fastdiff.use_backend({"sampler_step": "torch"}):
        status, stdout, _ = run(capsys, "info")
    assert status == 0
    assert "sampler_step: sampler_step: backend 'torch' was demanded" not in stdout
    assert "backend 'torch' was demanded but the operator has only" in stdout


def test_methods_lists_the_registry(capsys):
    status, stdout, _ = run(capsys, "methods")
    assert status == 0
    for name, info in fastdiff.samplers.methods().items():
        assert f"\n{name} " in stdout
        assert info.paper in stdout
    _, stdout, _ = run(capsys, "methods", "--json")
    assert {method["name"] for method in json.loads(stdout)["methods"]} == set(fastdiff.samplers.methods())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples(capsys, command):
    status, stdout, _ = run(capsys, command, "--help")
    assert status == 0
    assert "examples:" in stdout
    assert f"fastdiff {command}" in stdout.partition("examples:")[2]


@pytest.mark.parametrize(("arguments", "word"), [(["smaple"], "smaple"), ([], "COMMAND"), (["--fast"], "COMMAND")])
def test_unknown_command(capsys, arguments, word):
    assert_refused(run(capsys, *arguments), word)


def test_train_refuses_bad_input_in_one_line(capsys, tmp_path):
    arguments = ("--data", tmp_path / "nothing", "--out", tmp_path / "m.safetensors", "--steps", 1)
    assert_refused(run(capsys, "train", *arguments), "nothing")


def test_the_installed_command(checkpoint, tmp_path):
    """A process of its own: the exit status and the streams are what a shell sees."""
    command = [sys.executable, "-c", "import sys; from fastdiff.cli import main; sys.exit(main())"]
    refused = subprocess.run([*command, "sample", "--out", "x.gif"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("fastdiff: error: out: expected a name ending in")
    assert "Traceback" not in refused.stderr
    out = tmp_path / "grid.png"
    arguments = ["sample", "--model", str(checkpoint), "--steps", "2", "--out", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.is_file()
