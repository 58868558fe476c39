"""`fastdiff profile`: what it takes, prints, writes and draws, and how it refuses."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from known_machine import Known
from test_cli import _no_interpreter, assert_refused, checkpoint, run  # noqa: F401

from fastdiff import profiling
from fastdiff.profiling import Machine, networks, plot, table


def profile(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run(capsys, "profile", *arguments, "--threads", 1, "--steps", 1)


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "copying", Known.copying)
    monkeypatch.setattr(Machine, "flops", Known.flops)


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_profiled(capsys, checkpoint, tmp_path, dtype):  # noqa: F811
    out, picture = tmp_path / "layers.csv", tmp_path / "layers.png"
    arguments = ("--dtype", dtype, "--batch", 2, "--size", 16, "--rows", 3, "--diffusers")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        status, stdout, stderr = profile(capsys, checkpoint, *arguments, "--csv", out, "--plot", picture)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (status, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0].startswith(f"{checkpoint}, 2x1x16x16, {dtype}, 1 threads of ")
    assert sum(line.startswith(("fastdiff: a step takes", "diffusers: a step takes")) for line in lines) == 2
    heads = [index for index, line in enumerate(lines) if line.startswith("layer ")]
    assert len(heads) == 2
    for head in heads:
        assert lines[head].split() == ["layer", "calls", "time", "share", "GFLOP/s", "GB/s", "roofline", "bound"]
        assert lines[head + 4].startswith("... ")
    with out.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == list(table.COLUMNS)
    for code in ("fastdiff", "diffusers"):
        shares = [float(row["share"]) for row in written if row["code"] == code]
        assert math.isclose(sum(shares), 1.0, abs_tol=0.01)
    # What a convolution computes does not depend on whose it is.
    flops = {
        code: sum(float(r["gflop"] or 0) for r in written if r["code"] == code) for code in ("fastdiff", "diffusers")
    }
    assert flops["fastdiff"] == pytest.approx(flops["diffusers"], rel=0.01)
    assert table.read(out) == written
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("_known")
def test_the_default_is_the_embedded_model(capsys):
    status, stdout, _ = profile(capsys)
    assert status == 0
    assert stdout.startswith("fashion, 1x1x28x28, float32")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Diffusers folders of tiny networks: with text, with what SDXL is told besides, with an unknown input, and an
    autoencoder."""
    import diffusers

    stages = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    small = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    text = {**small, **stages, "cross_attention_dim": 8, "attention_head_dim": 2}
    size = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    made = {
        "text": diffusers.UNet2DConditionModel(**text),
        "sdxl": diffusers.UNet2DConditionModel(**text, addition_embed_type="text_time", **size),
        "unsaid": diffusers.UNet2DConditionModel(**text, class_embed_type="timestep"),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
            sample_size=16,
        ),
    }
    for name, network in made.items():
        network.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in made}


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(
    ("name", "shape"), [("text", "1x4x8x8"), ("sdxl", "1x4x8x8"), ("vae", "1x4x8x8")], ids=lambda value: value
)
def test_a_folder_is_profiled(capsys, folders, name, shape):
    status, stdout, stderr = profile(capsys, folders[name], "--diffusers")
    assert (status, stderr) == (0, "")
    assert shape in stdout.splitlines()[0]
    assert "conv2d 3x3" in stdout
    if name != "vae":
        assert "77 keys" in stdout


def test_the_library_s_step_gives_the_same_output(folders):
    for folder in (folders["text"], folders["vae"]):
        step = profiling.find(str(folder))
        with torch.no_grad():
            theirs, ours = step.library()(), step.call()()
        theirs = theirs[0] if isinstance(theirs, tuple) else getattr(theirs, "sample", theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_layouts_are_networks_of_ours(name, monkeypatch):
    layout = networks.NETWORKS[name]
    millions = {"cifar": 35.7, "sd15": 859.5, "decoder": 83.7}
    with torch.device("meta"):
        network, shape = networks._made(layout)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions[name]
    assert len(shape) == 4


@pytest.mark.usefixtures("_known")
def test_a_layout_is_profiled(capsys, monkeypatch):
    small = networks.Layout(
        "UNet2DModel", {**networks.NETWORKS["cifar"].config, "block_out_channels": (32,) * 4}, (4, 3, 32, 32)
    )
    monkeypatch.setitem(networks.NETWORKS, "cifar", small)
    status, stdout, _ = profile(capsys, "cifar", "--batch", 1, "--size", 8)
    assert status == 0
    assert stdout.startswith("cifar, 1x3x8x8, float32")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "no such file"]),
        (["--batch", "0"], ["batch", "0"]),
        (["--size", "-1"], ["size", "-1"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--steps", "0"], ["steps"]),
        (["--rows", "0"], ["rows"]),
        (["--dtype", "int8"], ["int8"]),
        (["--csv", "/nowhere/layers.csv"], ["csv", "/nowhere"]),
        (["--plot", "layers.txt"], ["plot", ".png"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_arguments_end_with_one_line(capsys, arguments, words):
    assert_refused(run(capsys, "profile", *arguments), *words)


def test_unknown_inputs_and_sizes_are_refused(capsys, folders, tmp_path):
    assert_refused(run(capsys, "profile", folders["unsaid"]), "class_embed_type")
    torch.manual_seed(0)
    import diffusers

    network = diffusers.UNet2DModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]
    )
    network.save_pretrained(tmp_path / "sizeless")
    assert_refused(run(capsys, "profile", tmp_path / "sizeless"), "size")


def test_missing_libraries_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "find_spec", lambda _: None)
    monkeypatch.setattr(plot, "find_spec", lambda _: None)
    status, _, stderr = run(capsys, "profile", "--diffusers")
    assert (status, "diffusers" in stderr) == (2, True)
    assert_refused(run(capsys, "profile", "--plot", tmp_path / "x.png"), "matplotlib")


def test_a_picture_has_a_panel_for_each_network(tmp_path):
    facts = {"shape": "1", "dtype": "float32", "threads": "1", "hardware": "x", "step_us": "5"}
    lines = [
        {
            **facts,
            "model": model,
            "code": code,
            "operator": f"op{i}",
            "layer": "",
            "time_us": str(1 + i),
            "roofline_us": "",
        }
        for model in "abc"
        for code in ("before", "after")
        for i in range(9)
    ]
    plot.draw(lines, tmp_path / "x.svg", layers=6)
    text = (tmp_path / "x.svg").read_text()
    assert text.startswith("<?xml")
