"""The loop: that it applies the table, that a sample depends on its seed alone, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from interpret import solve
from method_cases import fitting
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import ops, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_INITIAL, STREAM_STEP, seed_tensor
from fastdiff.ops.row import INPUT_SCALE, INPUTS, NEW_HISTORY, NEW_X, ROW_SIZE
from fastdiff.samplers import StepTable

SHAPE = (5, 3, 4, 7)
SEEDS = [11, 0, 2**63 + 5, -4, 11]
FROM_NOISE = [name for name, info in samplers.methods().items() if not info.inverse]


def table(method: str = "dpmpp_2m", steps: int = 6, **options) -> StepTable:
    schedule, prediction = fitting(method, schedules.linear(1000))
    return samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, clip=1.5, **options)


def per_element(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(1.3 * x - 0.001 * t.to(x.dtype).view(-1, 1, 1, 1))


def per_sample(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Every element depends on its whole sample, one sample at a time."""
    return torch.stack([per_element(one[None], time[None])[0] - one.mean() for one, time in zip(x, t, strict=True)])


@pytest.mark.parametrize("method", FROM_NOISE)
def test_the_loop_is_the_table(method):
    """Against float64 arithmetic on the same noise: starting noise, anchor, history, step noise, input scales."""
    steps = table(method)
    keys = seed_tensor(SEEDS)

    def model(x, t):
        return per_element(torch.from_numpy(x), torch.full((len(x),), t, dtype=torch.float64)).numpy()

    def noise(row):
        return ops.philox_normal(keys, SHAPE, step=row, stream=STREAM_STEP).double().numpy()

    start = steps.init_scale * ops.philox_normal(keys, SHAPE, stream=STREAM_INITIAL).double().numpy()
    expected = solve(model, steps, start, noise)
    found = fastdiff.run(per_element, steps, shape=SHAPE, seeds=SEEDS)
    assert found.dtype == torch.float32
    # Six steps from a state of up to 160 standard deviations, each rounded to float32.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("denoiser", [per_element, per_sample], ids=["per_element", "per_sample"])
@pytest.mark.parametrize("method", FROM_NOISE)
def test_a_sample_depends_on_its_seed_alone(method, denoiser):
    steps = table(method)
    batch = fastdiff.run(denoiser, steps, shape=SHAPE, seeds=SEEDS)
    assert torch.equal(batch[0], batch[4])
    assert not torch.equal(batch[0], batch[1])
    backwards = fastdiff.run(denoiser, steps, shape=SHAPE, seeds=SEEDS[::-1])
    assert torch.equal(backwards.flip(0), batch)
    for index, seed in enumerate(SEEDS):
        alone = fastdiff.run(denoiser, steps, shape=(1, *SHAPE[1:]), seeds=[seed])
        assert torch.equal(alone[0], batch[index])


def test_three_slots_of_history_newest_first():
    """No method here reads three yet: rows 0 to 3 remember 1, 2, 3 and 4 times the model's output, row 4 reads all."""
    rows = np.zeros((5, ROW_SIZE))
    rows[:4, NEW_X.start + INPUTS.index("x")] = 1.0
    rows[:4, NEW_HISTORY.start + INPUTS.index("m")] = 1.0, 2.0, 3.0, 4.0
    rows[4, NEW_X] = [{"hist1": 1.0, "hist2": 10.0, "hist3": 100.0}.get(name, 0.0) for name in INPUTS]
    rows[:, INPUT_SCALE] = 1.0
    steps = replace(table("ddim", steps=5), rows=rows)
    found = fastdiff.run(lambda x, t: torch.ones_like(x), steps, shape=SHAPE, seeds=SEEDS)
    assert (found == 4.0 + 30.0 + 200.0).all()


def test_a_run_repeats_bit_for_bit():
    first, second = (fastdiff.run(per_element, table("ddpm"), shape=SHAPE, seeds=SEEDS) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["ddpm", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5])
def test_guidance_combines_the_two_halves(method, guidance):
    seen = []

    def denoiser(x, t):
        assert x.shape == (10, *SHAPE[1:])
        assert t.shape == (10,)
        assert torch.equal(*x.chunk(2))
        seen.append(x)
        uncond, cond = x.chunk(2)
        return torch.cat([per_element(uncond, t[:5]), 0.3 * cond])

    def combined(x, t):
        uncond = per_element(x, t)
        return uncond + guidance * (0.3 * x - uncond)

    found = fastdiff.run(denoiser, table(method), shape=SHAPE, seeds=SEEDS, guidance=guidance)
    expected = fastdiff.run(combined, table(method), shape=SHAPE, seeds=SEEDS)
    assert len(seen) == len(table(method))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "dtype"), [({"spacing": "trailing"}, torch.int64), ({"spacing": "karras"}, torch.float32)]
)
def test_what_the_network_is_told(options, dtype):
    steps, times = table("dpmpp_2m", **options), []

    def denoiser(x, t):
        assert t.shape == (5,)
        assert t.dtype == dtype
        assert (t == t[0]).all()
        times.append(float(t[0]))
        return per_element(x, t)

    fastdiff.run(denoiser, steps, shape=SHAPE, seeds=SEEDS)
    assert times == pytest.approx(steps.timesteps.tolist(), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_network_computes_in_its_dtype_and_the_state_in_float32(dtype):
    def denoiser(x, t):
        assert x.dtype == dtype
        return per_element(x, t)

    states = []
    arguments = {"shape": SHAPE, "seeds": SEEDS, "callback": lambda info: states.append(info.x)}
    found = fastdiff.run(denoiser, table(), dtype=dtype, **arguments)
    assert {state.dtype for state in states} == {torch.float32}
    exact = fastdiff.run(per_element, table(), shape=SHAPE, seeds=SEEDS)
    error = float((found - exact).abs().max())
    assert 0.0 < error < 32 * torch.finfo(dtype).eps


def test_callback_sees_every_evaluation():
    steps, infos = table("heun", steps=4), []
    found = fastdiff.run(per_element, steps, shape=SHAPE, seeds=SEEDS, callback=infos.append)
    assert [info.step for info in infos] == list(range(7))
    assert {info.steps for info in infos} == {7}
    assert [info.timestep for info in infos] == steps.timesteps.tolist()
    assert torch.equal(infos[-1].x, found)
    # Each is a state of its own, not one buffer that the loop writes over.
    assert len({info.x.data_ptr() for info in infos}) == 7
    assert infos[0].model_output.shape == SHAPE


def test_a_given_start_replaces_the_noise_and_is_left_alone():
    steps = table("ddim")
    noise = ops.philox_normal(seed_tensor(SEEDS), SHAPE, stream=STREAM_INITIAL)
    start = noise.clone()
    found = fastdiff.run(per_element, steps, shape=SHAPE, seeds=range(5), x=start)
    assert torch.equal(start, noise)
    assert torch.equal(found, fastdiff.run(per_element, steps, shape=SHAPE, seeds=SEEDS))


def test_the_result_is_an_ordinary_tensor():
    layer = torch.nn.Linear(7, 7)
    found = fastdiff.run(lambda x, t: layer(x), table(), shape=SHAPE, seeds=SEEDS)
    assert not found.requires_grad
    found.mul_(2.0)
    found.requires_grad_(True).sum().backward()


def test_the_denoiser_may_answer_in_channels_last():
    def denoiser(x, t):
        return per_element(x, t).contiguous(memory_format=torch.channels_last)

    found = fastdiff.run(denoiser, table("heun"), shape=SHAPE, seeds=SEEDS)
    assert torch.equal(found, fastdiff.run(per_element, table("heun"), shape=SHAPE, seeds=SEEDS))


class Recorder(TorchDispatchMode):
    """Names of the operators that are called while it is on and `listening`."""

    def __init__(self):
        super().__init__()
        self.names, self.listening = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.listening:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["ddpm", "heun", "dpmpp_2m_sde"])
def test_the_loop_never_reads_from_the_device(method):
    """Between two calls of the network there is the step and the view of the next timestep, no copy, no scalar read."""
    recorder = Recorder()

    def denoiser(x, t):
        recorder.listening = False
        output = per_element(x, t)
        recorder.listening = True
        return output

    def stop(info):
        # What follows the last step is the copy of the result.
        recorder.listening = info.step + 1 < info.steps

    with recorder:
        fastdiff.run(denoiser, table(method), shape=SHAPE, seeds=SEEDS, callback=stop)
    outside_the_step = {name for name in recorder.names if not name.startswith("fastdiff.")}
    assert "fastdiff.sampler_step.default" in recorder.names
    allowed = {"aten.select.int", "aten.expand.default", "aten.detach.default", "aten.alias.default"}
    assert outside_the_step <= allowed, outside_the_step - allowed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": range(4)}, "seeds: expected 5, one per sample"),
        ({"seeds": 3}, "seeds: expected one integer per sample, got 3; pass a list or a range"),
        ({"seeds": "seeds"}, "seeds: expected one integer per sample, got 'seeds'"),
        ({"seeds": [1, 2, 3, 4, -(2**63) - 1]}, r"seeds\[4\]: expected an integer of at most 64 bits"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"seeds": [1, 2, 3, 4, "five"]}, r"seeds\[4\]: expected an integer"),
        ({"shape": ()}, "shape: expected the positive sizes"),
        ({"shape": (5, 0)}, "shape: expected the positive sizes"),
        ({"guidance": float("inf")}, "guidance: expected a finite number"),
        ({"guidance": "2"}, "guidance: expected a finite number"),
        ({"dtype": torch.int64}, "dtype: expected one of torch.float32"),
        ({"x": torch.zeros(5, 3)}, r"x: expected float32 \(5, 3, 4, 7\)"),
        ({"x": torch.zeros(SHAPE, dtype=torch.float16)}, "x: expected float32"),
        ({"denoiser": lambda x, t: x[:1]}, r"denoiser: expected an output of shape \(5, 3, 4, 7\), got \(1, 3, 4, 7\)"),
        ({"denoiser": lambda x, t: (x,)}, "denoiser: expected an output of shape .* got tuple"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value,
)
def test_bad_arguments_are_refused(arguments, message):
    given = {"denoiser": per_element, "table": table(), "shape": SHAPE, "seeds": SEEDS, **arguments}
    with pytest.raises(InputError, match=message):
        fastdiff.run(given.pop("denoiser"), given.pop("table"), **given)


def test_progress_can_be_switched(capsys):
    for progress, shown in ((True, True), (False, False), (None, False)):
        fastdiff.run(per_element, table(steps=20), shape=SHAPE, seeds=SEEDS, progress=progress)
        assert ("dpmpp_2m" in capsys.readouterr().err) == shown
