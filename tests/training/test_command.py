"""`fastdiff train` from its arguments, and what is left after signals."""

import argparse
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors
import torch

from fastdiff.errors import InputError
from fastdiff.models.loading import load_model
from fastdiff.training import command
from fastdiff.training.data import load_images
from fastdiff.training.trainer import Trainer

OPTIONS = (
    "--steps 6 --evaluate-every 2 --batch 4 --warmup 1 --holdout 4 --channels 8 --groups 4 --attention none "
    "--dtype float32 --threads 1 --no-progress"
)


@pytest.fixture
def data(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x=x, labels=np.arange(20) % 2)
    return tmp_path / "set.npz"


def arguments(data, out, options=""):
    return ["--data", str(data), "--out", str(out), *OPTIONS.split(), *options.split()]


def parsed(data, out, options=""):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments(data, out, options))


def train(data, out, options=""):
    return command.main(parsed(data, out, options))


def settings(data, out, options=""):
    return command.settings_from(parsed(data, out, options))


def test_trains_and_reports(data, tmp_path, capsys):
    assert train(data, tmp_path / "m.safetensors", "--class-names coat,bag --prediction flow") == 0
    assert "step 6 of 6, best validation loss" in capsys.readouterr().out
    model = load_model(tmp_path / "m.safetensors")
    assert model.class_names == ("coat", "bag")
    assert model.schedule.name == "flow"


def test_weights_can_be_stored_in_half_the_space(data, tmp_path):
    out = tmp_path / "m.safetensors"
    train(data, out)
    whole = load_model(out).network.state_dict()
    train(data, out, "--resume --store float16")
    for name, value in load_model(out).network.state_dict().items():
        assert torch.equal(value, whole[name].half().float())
    with safetensors.safe_open(out, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_stop_and_resume(data, tmp_path, capsys):
    assert train(data, tmp_path / "m.safetensors", "--stop-after 3") == 0
    assert "step 3 of 6" in capsys.readouterr().out
    assert train(data, tmp_path / "m.safetensors", "--resume") == 0
    assert train(data, tmp_path / "n.safetensors") == 0
    states = [(tmp_path / f"{name}.state.safetensors").read_bytes() for name in "mn"]
    assert states[0] == states[1]


def test_killed_process_resumes_bit_for_bit(data, tmp_path):
    out, whole = tmp_path / "m.safetensors", tmp_path / "whole.safetensors"
    options = "--steps 100000 --evaluate-every 5"
    process = subprocess.Popen(
        [sys.executable, "-c", "from fastdiff.cli import main; main()", "train", *arguments(data, out, options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not out.with_suffix(".csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    step = Trainer(settings(data, out, options), load_images(data), out, resume=True).progress.step
    assert step >= 5
    assert train(data, out, f"{options} --stop-after {step + 7} --resume") == 0
    assert train(data, whole, f"{options} --stop-after {step + 7}") == 0
    assert out.with_suffix(".state.safetensors").read_bytes() == whole.with_suffix(".state.safetensors").read_bytes()


def test_signal_ends_the_run_after_the_step_in_hand(data, tmp_path, monkeypatch):
    original = Trainer._train_step

    def interrupted(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(self, step)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        assert train(data, tmp_path / "m.safetensors") == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(data, tmp_path / "m.safetensors", "--resume") == 0
    assert train(data, tmp_path / "n.safetensors") == 0
    states = [(tmp_path / f"{name}.state.safetensors").read_bytes() for name in "mn"]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data nowhere", "does not exist"),
        ("--out m.pt", "ending in .safetensors"),
        ("--threads 0", "threads"),
        ("--device tpu0x", "device"),
        ("--resume", "start without --resume"),
        ("--class-names a", "got label 1, but only 1 class names"),
        ("--steps -3", "steps: expected at least 1"),
    ],
    ids=lambda value: value.split()[0].strip("-") if value.startswith("--") else "",
)
def test_bad_arguments(data, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(data, tmp_path / "m.safetensors", options)


def test_help_names_every_option_and_default(capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--resume" in text
    assert "(default 0.001)" in text
