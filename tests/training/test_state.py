"""The training state: the average's formula, and files of other runs refused."""

import copy

import pytest
import torch

from fastdiff.errors import CheckpointError, InputError
from fastdiff.training.state import Progress, ema_decay, load_state, save_state, update_ema

SETTINGS = {"steps": 10, "lr": 0.001}


def test_average_is_the_recursion_written_out():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    average = copy.deepcopy(network)
    expected = network.weight.detach().double().clone()
    for step in range(1, 30):
        with torch.no_grad():
            network.weight.add_(torch.randn(2, 3))
        decay = ema_decay(step, 0.9)
        update_ema(average, network, decay)
        expected = decay * expected + (1 - decay) * network.weight.detach().double()
    torch.testing.assert_close(average.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_decay_warms_up():
    assert ema_decay(1, 0.999) == 2 / 11
    assert ema_decay(90, 0.999) == 0.91
    assert ema_decay(10**6, 0.999) == 0.999
    assert ema_decay(5, 0.2) == 0.2


def write(path, **changes):
    progress = Progress(step=4, loss_sum=0.1 + 0.2, loss_count=3, best=1 / 3, history=[(2, 0.7, 1 / 3)])
    arguments = {"settings": SETTINGS, "fingerprint": "f"} | changes
    save_state(path, {"network.w": torch.arange(4.0)}, progress, **arguments)
    return progress


def test_state_round_trip_is_exact(tmp_path):
    progress = write(tmp_path / "a.state.safetensors")
    tensors, again = load_state(tmp_path / "a.state.safetensors", settings=SETTINGS, fingerprint="f")
    assert again == progress
    assert torch.equal(tensors["network.w"], torch.arange(4.0))


@pytest.mark.parametrize(
    ("settings", "fingerprint", "message"),
    [({"steps": 10, "lr": 0.002}, "f", "lr was 0.001 and is 0.002"), (SETTINGS, "g", "other data")],
    ids=["settings", "data"],
)
def test_state_of_another_run(tmp_path, settings, fingerprint, message):
    write(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        load_state(tmp_path / "a", settings=settings, fingerprint=fingerprint)


def test_a_run_may_be_made_longer_or_shorter(tmp_path):
    write(tmp_path / "a")
    _, progress = load_state(tmp_path / "a", settings=SETTINGS | {"steps": 4}, fingerprint="f")
    assert progress.lengths == [(4, 4)]
    with pytest.raises(CheckpointError, match="stands at step 4, beyond the 3 asked for"):
        load_state(tmp_path / "a", settings=SETTINGS | {"steps": 3}, fingerprint="f")


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "foreign"])
def test_bad_state_files(tmp_path, kind):
    path = tmp_path / "a"
    write(path)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "text":
        path.write_text("hello")
    else:
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="training state"):
        load_state(path, settings=SETTINGS, fingerprint="f")


def test_interrupted_write_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write(path)
    before = path.read_bytes()

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write(path, fingerprint="new")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
