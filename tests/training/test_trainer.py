"""The training loop on tiny made-up data: bit-for-bit resume, early stopping, learning, clear refusals."""

import csv
import json

import pytest
import safetensors
import torch

from fastdiff.config import use_backend
from fastdiff.errors import CheckpointError, InputError
from fastdiff.models.loading import load_model
from fastdiff.training.data import ImageSet
from fastdiff.training.settings import Settings
from fastdiff.training.trainer import Trainer, learning_rate

TINY = {
    "steps": 12,
    "batch": 8,
    "warmup": 2,
    "holdout": 8,
    "evaluate_every": 4,
    "channels": (8, 8),
    "groups": 4,
    "attention": (4,),
    "head_dim": 4,
}


def image_set(classes=2):
    """Bright or dark squares with a little texture."""
    texture = torch.randint(0, 40, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(40) % 2
    images = texture + (labels * 200).to(torch.uint8)[:, None, None, None]
    return ImageSet(images, labels, 2, ("dark", "bright")) if classes else ImageSet(images)


def trainer(folder, *, resume=False, data=None, **changes):
    settings = Settings(**(TINY | changes))
    return Trainer(settings, image_set() if data is None else data, folder / "m.safetensors", resume=resume)


def contents(path):
    """Header and tensors of a safetensors file; the library writes the header's keys in no fixed order."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastdiff"])
        return header, {name: file.get_tensor(name).view(torch.uint8).tolist() for name in file.keys()}  # noqa: SIM118


def assert_same_run(first, second):
    assert (first / "m.state.safetensors").read_bytes() == (second / "m.state.safetensors").read_bytes()
    assert contents(first / "m.safetensors") == contents(second / "m.safetensors")


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


@pytest.mark.parametrize(
    ("stops", "dtype"),
    [([6], "float32"), ([1, 5, 11], "bfloat16"), ([4], "bfloat16")],
    ids=["middle-float32", "often-bfloat16", "at-a-checkpoint-bfloat16"],
)
def test_resume_is_bit_for_bit(tmp_path, stops, dtype):
    whole, parts = folders(tmp_path, "whole", "parts")
    options = {"dtype": dtype, "flip": True, "label_dropout": 0.3, "parts": 2}
    trainer(whole, **options).run()
    for index, stop in enumerate(stops):
        assert trainer(parts, resume=index > 0, **options).run(stop_after=stop).step == stop
    assert trainer(parts, resume=True, **options).run().finished
    assert_same_run(whole, parts)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("place", ["save_state", "save_model", "update_ema"])
def test_resume_after_a_kill(tmp_path, monkeypatch, place):
    """Killed in the middle of a step, or between the files of a checkpoint: what is on disk is enough."""
    whole, killed = folders(tmp_path, "whole", "killed")
    trainer(whole).run()
    calls = []

    def kill(*arguments, **options):
        calls.append(None)
        if len(calls) == {"save_state": 2, "save_model": 2, "update_ema": 7}[place]:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        module = "fastdiff.training.trainer."
        import fastdiff.training.trainer as loop

        original = getattr(loop, place)
        patch.setattr(module + place, kill)
        with pytest.raises(Killed):
            trainer(killed).run()
    assert trainer(killed, resume=True).progress.step == 4
    trainer(killed, resume=True).run()
    assert_same_run(whole, killed)


def test_parts_of_a_batch_are_the_batch(tmp_path):
    """One step in one part and in four: the same weights up to rounding."""
    one, four = folders(tmp_path, "one", "four")
    options = {"dtype": "float32", "holdout": 0, "steps": 1, "warmup": 0}
    a, b = trainer(one, **options), trainer(four, parts=4, **options)
    with use_backend("reference"):
        batch = a.stream.at(1)
    _, whole = a._gradients(batch)
    split = [b._gradients(part)[1] for part in batch.split(4)]
    for gradient, *parts in zip(whole, *split, strict=True):
        torch.testing.assert_close(sum(parts) / 4, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_every_objective_learns(tmp_path, prediction):
    run = trainer(tmp_path, prediction=prediction, steps=60, evaluate_every=20, lr=3e-3, dtype="float32")
    before = run.validation_loss()
    run.run()
    assert run.progress.best < 0.7 * before


def test_model_file_loads_and_says_what_it_is(tmp_path):
    run = trainer(tmp_path)
    run.run()
    model = load_model(tmp_path / "m.safetensors")
    assert (model.prediction, model.schedule.name, model.sample_shape) == ("v", "cosine", (1, 8, 8))
    assert (model.num_classes, model.null_label, model.class_names) == (2, 2, ("dark", "bright"))
    assert model.training["steps"] == 12
    for name, value in run.best.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value)


def test_no_dropout_leaves_no_row_for_no_label(tmp_path):
    trainer(tmp_path, label_dropout=0.0).run()
    assert load_model(tmp_path / "m.safetensors").null_label is None


def test_data_without_labels(tmp_path):
    trainer(tmp_path, data=image_set(classes=0)).run()
    assert load_model(tmp_path / "m.safetensors").num_classes is None


def test_loss_curve(tmp_path):
    run = trainer(tmp_path)
    run.run()
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 8, 12]
    assert [(float(r["train_loss"]), float(r["validation_loss"])) for r in rows] == [
        h[1:] for h in run.progress.history
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_early_stopping_keeps_the_best_weights(tmp_path, monkeypatch):
    run = trainer(tmp_path, patience=2, steps=100, evaluate_every=1)
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 0.5])
    monkeypatch.setattr(run, "validation_loss", lambda: next(losses))
    weights = []
    original = run._evaluate

    def evaluate():
        weights.append({k: v.clone() for k, v in run.average.state_dict().items()})
        original()

    monkeypatch.setattr(run, "_evaluate", evaluate)
    state = run.run()
    assert (state.step, state.best, state.stale, state.finished) == (6, 1.0, 2, True)
    for name, value in load_model(tmp_path / "m.safetensors").network.state_dict().items():
        assert torch.equal(value, weights[3][name])
    again = trainer(tmp_path, resume=True, patience=2, steps=100, evaluate_every=1)
    for name, value in again.best.state_dict().items():
        assert torch.equal(value, weights[3][name])
    assert again.run().step == 6


def test_without_holdout_the_last_weights_are_kept(tmp_path):
    run = trainer(tmp_path, holdout=0)
    run.run()
    for name, value in load_model(tmp_path / "m.safetensors").network.state_dict().items():
        assert torch.equal(value, run.average.state_dict()[name])


def test_learning_rate():
    rates = [learning_rate(step, peak=2.0, warmup=10, steps=110) for step in (1, 5, 10, 60, 110)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 1.0, 0.0])
    assert learning_rate(1, peak=2.0, warmup=0, steps=2) == pytest.approx(1.0)


def test_diverging_run_says_so(tmp_path):
    with pytest.raises(InputError, match="lower the learning rate"):
        trainer(tmp_path, lr=1e30, warmup=0, clip=1e30, dtype="float32").run()


def test_a_run_is_not_overwritten(tmp_path):
    trainer(tmp_path).run(stop_after=1)
    with pytest.raises(InputError, match="pass --resume"):
        trainer(tmp_path)


def test_interrupted_before_the_first_checkpoint_writes_no_model(tmp_path):
    trainer(tmp_path).run(stop_after=1)
    assert not (tmp_path / "m.safetensors").exists()
    assert (tmp_path / "m.state.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lr": 5e-4}, "lr was 0.001 and is 0.0005"), ({"seed": 1}, "seed was 0 and is 1")],
    ids=["lr", "seed"],
)
def test_resume_with_other_settings(tmp_path, changes, message):
    trainer(tmp_path).run(stop_after=1)
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path, resume=True, **changes)


def test_a_finished_run_can_go_on(tmp_path):
    trainer(tmp_path).run()
    longer = trainer(tmp_path, resume=True, steps=16)
    assert longer.run().step == 16
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
    assert load_model(tmp_path / "m.safetensors").training["lengths"] == [[12, 16]]
    assert trainer(tmp_path, resume=True, steps=16).run().lengths == [(12, 16)]


def test_resume_without_a_state(tmp_path):
    with pytest.raises(CheckpointError, match="start without --resume"):
        trainer(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"lr": float("nan")}, "lr: expected a positive number"),
        ({"ema": 1.0}, "ema: expected at least 0 and below 1"),
        ({"label_dropout": 1.5}, "label_dropout: expected from 0 to 1"),
        ({"dtype": "float16"}, "dtype: expected one of float32, bfloat16"),
        ({"patience": 2, "holdout": 0}, "hold some images out"),
        ({"channels": (6,)}, "not divisible by groups=4"),
        ({"channels": ()}, "channels: expected positive numbers"),
        ({"channels": (8, 8, 8, 8, 8)}, "8 cannot be halved 4 times; pass --size with a multiple of 16"),
        ({"head_dim": 3}, "head_dim: expected a divisor of the 8 channels that attend, got 3"),
        ({"parts": 3}, "batch: expected a multiple of parts=3"),
        ({"holdout": 40}, "holdout: expected 0 to 39"),
        ({"seed": -1}, "seed: expected from 0"),
        ({"schedule": "sinus"}, "schedule: expected a name among"),
        ({"prediction": "x"}, "prediction: expected one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_unwritable_out(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        trainer(tmp_path / "missing")
