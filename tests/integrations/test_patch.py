"""fastdiff.patch_scheduler and the way back; and what keeps a scheduler the same when it is copied, saved or loaded."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from drop_in import SHAPE, made, network, pair, start
from tiny_pipelines import make, pixel_unet, unet, vae
from torch import Tensor

import fastdiff
import fastdiff.integrations.diffusers as drop_in
from fastdiff.errors import InputError

EXPORTED = [name for name in drop_in.__all__ if name != "SchedulerMixin"]
NAME = "DPMSolverMultistepScheduler"
STEPS = 6


def prepared(library: Any, name: str) -> Any:
    """A scheduler with timesteps, and with things that its class does not know."""
    scheduler = made(library, name)
    scheduler.register_to_config(of_another_class=3)
    if hasattr(scheduler, "set_shift"):
        scheduler.set_shift(2.5)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(2)
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(STEPS)
    scheduler.mine = "kept"
    return scheduler


def run(scheduler: Any, x: Tensor, *indices: int) -> Tensor:
    for index in indices:
        t = scheduler.timesteps[index]
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        step = getattr(scheduler, "step", None) or scheduler.step_pred
        takes = inspect.signature(step).parameters
        torch.default_generator.manual_seed(index)
        given: dict[str, Any] = {"generator": torch.Generator().manual_seed(index)} if "generator" in takes else {}
        if "original_image" in takes:
            given |= {"original_image": torch.ones(SHAPE), "mask": (torch.arange(SHAPE[-1]) < 3).float().expand(SHAPE)}
        x = step(network(scaled, t), t, x, **given).prev_sample
    return x


def pickled(scheduler: Any) -> Any:
    return pickle.loads(pickle.dumps(scheduler))


UNCOPIED = {"SASolverScheduler": (pickled,), "DPMSolverSDEScheduler": (copy.deepcopy, pickled)}
"""diffusers keeps a function without a name in the one, and a Brownian tree in the other."""


def assert_same_state(one: Any, other: Any) -> None:
    for name in ("timesteps", "sigmas"):
        if hasattr(other, name):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0.0, atol=0.0)
    for name in ("begin_index", "step_index", "shift", "init_noise_sigma", "mine"):
        assert str(getattr(one, name, None)) == str(getattr(other, name, None)), name
    assert one.config == other.config


@pytest.mark.parametrize("name", EXPORTED)
def test_a_patched_scheduler_goes_on_where_the_other_was(name: str) -> None:
    theirs = prepared(diffusers, name)
    untouched = copy.deepcopy(vars(theirs))
    pipe = SimpleNamespace(scheduler=theirs)
    fastdiff.patch_scheduler(pipe, strict=True)
    ours = pipe.scheduler
    assert type(ours) is getattr(drop_in, name)
    assert_same_state(ours, theirs)
    x = start(theirs, SHAPE, torch.float32)
    result = run(ours, x, 2, 3, 4)
    assert str(vars(theirs)) == str(untouched), "the old scheduler is left alone"
    torch.testing.assert_close(result, run(theirs, x, 2, 3, 4), rtol=1e-4, atol=1e-4 * float(x.std()))


@pytest.mark.parametrize("name", EXPORTED)
def test_unpatching_leaves_nothing_of_ours(name: str) -> None:
    theirs = prepared(diffusers, name)
    ours = prepared(drop_in, name)
    untouched = str(vars(ours))
    pipe = SimpleNamespace(scheduler=ours)
    fastdiff.unpatch_scheduler(pipe, strict=True)
    assert type(pipe.scheduler) is type(theirs)
    assert set(vars(pipe.scheduler)) == set(vars(theirs))
    assert_same_state(pipe.scheduler, theirs)
    x = start(theirs, SHAPE, torch.float32)
    torch.testing.assert_close(run(pipe.scheduler, x, 2, 3), run(theirs, x, 2, 3), rtol=0.0, atol=0.0)
    assert str(vars(ours)) == untouched, "ours is left alone"


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_goes_on_in_the_middle_of_a_run(name: str, copied: Any) -> None:
    scheduler, theirs = prepared(drop_in, name), prepared(diffusers, name)
    x = run(scheduler, start(scheduler, SHAPE, torch.float32), 2, 3)
    if copied in UNCOPIED.get(name, ()):
        run(theirs, x, 2, 3)
        with pytest.raises((AttributeError, KeyError, pickle.PicklingError)):
            run(copied(theirs), x, 4, 5)
        return
    other = copied(scheduler)
    assert type(other) is type(scheduler)
    assert_same_state(other, scheduler)
    torch.testing.assert_close(run(other, x, 4, 5), run(scheduler, x, 4, 5), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", EXPORTED)
def test_saving_and_loading(name: str, tmp_path: Path) -> None:
    theirs, ours = getattr(diffusers, name), getattr(drop_in, name)
    scheduler = prepared(drop_in, name)
    scheduler.save_pretrained(tmp_path)
    for kind in (theirs, ours):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is kind
        assert loaded.config["of_another_class"] == 3
        expected = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
        assert {key: loaded.config[key] for key in expected} == expected


@pytest.mark.parametrize("name", EXPORTED)
def test_compatible_classes_are_theirs_and_ours_where_there_is_one(name: str) -> None:
    ours, theirs = pair(name)
    assert {kind.__name__ for kind in ours.compatibles} == {kind.__name__ for kind in theirs.compatibles}
    assert type(ours) in ours.compatibles
    assert all(kind is getattr(drop_in, kind.__name__, kind) for kind in ours.compatibles)
    in_order = sorted(ours.compatibles, key=lambda kind: kind.__name__)
    for kind in {in_order[0], in_order[-1], type(ours)}:
        their_kind = getattr(diffusers, kind.__name__)
        assert kind.from_config(ours.config).config == their_kind.from_config(theirs.config).config
        assert kind.from_config(theirs.config).config == their_kind.from_config(ours.config).config


def test_a_saved_pipeline_names_our_class_and_loads_again(tmp_path: Path) -> None:
    pipe = make("DDPM", getattr(diffusers, NAME)(solver_order=3))
    assert fastdiff.patch_scheduler(pipe).replaced == {"scheduler": NAME}
    assert tuple(pipe.config["scheduler"]) == ("fastdiff.integrations.diffusers", NAME)
    assert set(pipe.components) == {"unet", "scheduler"}
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is getattr(drop_in, NAME)
    assert loaded.scheduler.config.solver_order == 3
    assert fastdiff.unpatch_scheduler(loaded).replaced == {"scheduler": NAME}
    assert tuple(loaded.config["scheduler"]) == ("diffusers", NAME)
    loaded.save_pretrained(tmp_path)
    assert "fastdiff" not in (tmp_path / "model_index.json").read_text(encoding="utf-8")


def test_every_scheduler_of_a_pipeline_is_patched() -> None:
    kind = getattr(diffusers, NAME)
    parts = {"vae": vae(), "unet": unet(), "text_encoder": None, "tokenizer": None, "low_res_scheduler": kind()}
    pipe = diffusers.StableDiffusionUpscalePipeline(scheduler=kind(), **parts)
    patch = fastdiff.patch_scheduler(pipe, strict=True)
    assert patch.replaced == {"scheduler": NAME, "low_res_scheduler": NAME}
    assert type(pipe.scheduler) is type(pipe.low_res_scheduler) is getattr(drop_in, NAME)
    assert pipe.scheduler is not pipe.low_res_scheduler


def test_pipelines_inside_a_pipeline_share_the_new_scheduler() -> None:
    inner = make("DDPM", getattr(diffusers, NAME)())
    outer = make("DDPM", inner.scheduler)
    outer.decoder_pipe = inner
    inner.outer = outer
    assert set(fastdiff.patch_scheduler(outer).replaced) == {"scheduler", "decoder_pipe.scheduler"}
    assert inner.scheduler is outer.scheduler
    assert tuple(inner.config["scheduler"]) == ("fastdiff.integrations.diffusers", NAME)


def test_a_modular_pipeline() -> None:
    from diffusers.modular_pipelines import ComponentSpec, SequentialPipelineBlocks
    from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

    class Block(ModularPipelineBlocks):
        @property
        def expected_components(self) -> list[Any]:
            return [ComponentSpec("scheduler", getattr(diffusers, NAME))]

    pipe = SequentialPipelineBlocks.from_blocks_dict({"only": Block}).init_pipeline()
    pipe.update_components(scheduler=getattr(diffusers, NAME)(solver_order=1))
    assert fastdiff.patch_scheduler(pipe, strict=True).replaced == {"scheduler": NAME}
    assert type(pipe.scheduler) is getattr(drop_in, NAME)
    assert pipe.scheduler.config.solver_order == 1
    assert tuple(pipe.config["scheduler"][:2]) == ("fastdiff.integrations.diffusers", NAME)


class Theirs(getattr(diffusers, NAME)):
    """A user's class."""


class Foreign(diffusers.SchedulerMixin, diffusers.ConfigMixin):
    """A scheduler that is nobody's."""


def with_a_step_of_its_own() -> Any:
    scheduler = getattr(diffusers, NAME)()
    scheduler.step = print
    return scheduler


@pytest.mark.parametrize(
    ("make_one", "why"),
    [
        (Theirs, f"Theirs is a subclass of {NAME}, and what it changes would be lost"),
        (Foreign, "Foreign, of which fastdiff has no class"),
        (with_a_step_of_its_own, f"{NAME}, because this object has a step of its own"),
    ],
    ids=["subclass", "unknown", "own step"],
)
def test_what_cannot_be_replaced_is_kept(make_one: Any, why: str) -> None:
    known, scheduler = getattr(diffusers, NAME)(), make_one()
    pipe = SimpleNamespace(prior_scheduler=known, scheduler=scheduler)
    with pytest.raises(InputError, match=r"pipe\.scheduler cannot be replaced, and strict=True: .*" + why):
        fastdiff.patch_scheduler(pipe, strict=True)
    assert pipe.prior_scheduler is known, "nothing is changed by half"
    patch = fastdiff.patch_scheduler(pipe)
    assert pipe.scheduler is scheduler
    assert patch.replaced == {"prior_scheduler": NAME}
    assert patch.kept["scheduler"].endswith(why)
    assert str(patch).splitlines()[0] == f"prior_scheduler: {NAME}, now from fastdiff"
    assert str(patch).splitlines()[1] == f"scheduler: kept, {patch.kept['scheduler']}"


def test_patching_twice_changes_nothing() -> None:
    pipe = make("DDPM", getattr(diffusers, NAME)())
    fastdiff.patch_scheduler(pipe)
    scheduler = pipe.scheduler
    again = fastdiff.patch_scheduler(pipe, strict=True)
    assert pipe.scheduler is scheduler
    assert again.replaced == {}
    assert str(again) == f"scheduler: kept, {NAME} is fastdiff's already"


@pytest.mark.parametrize(
    ("library", "change"),
    [(diffusers, fastdiff.patch_scheduler), (drop_in, fastdiff.unpatch_scheduler)],
    ids=["patch", "unpatch"],
)
def test_a_multistep_run_under_way_begins_again_with_its_first_order(library: Any, change: Any) -> None:
    first, second = getattr(library, NAME)(solver_order=1), getattr(library, NAME)()
    x = start(first, SHAPE, torch.float32)
    for scheduler in (first, second):
        scheduler.set_timesteps(STEPS)
    x = run(second, x, 0, 1)
    first.set_begin_index(2)
    pipe = SimpleNamespace(scheduler=second)
    change(pipe, strict=True)
    torch.testing.assert_close(run(pipe.scheduler, x, 2), run(first, x, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "pipe has no scheduler: expected a pipeline of diffusers, .* got NoneType"),
        ("name", "pipe has no scheduler: .* got str"),
        (SimpleNamespace(scheduler=None), "pipe has no scheduler: .* got types.SimpleNamespace"),
        (diffusers.DDPMPipeline, "pipe is a class, .*DDPMPipeline: expected a pipeline that has one"),
        (getattr(diffusers, NAME)(), r"pipe is a scheduler, .*; .*from_config\(scheduler.config\)"),
    ],
    ids=["None", "str", "no scheduler", "class", "scheduler"],
)
@pytest.mark.parametrize("function", [fastdiff.patch_scheduler, fastdiff.unpatch_scheduler], ids=lambda f: f.__name__)
def test_what_is_no_pipeline(function: Any, value: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^{function.__name__}: {said}"):
        function(value)


def test_a_configuration_of_the_old_object_is_not_shared() -> None:
    pipe = make("DDPM", getattr(diffusers, NAME)())
    old = pipe.scheduler
    fastdiff.patch_scheduler(pipe)
    pipe.scheduler.register_to_config(solver_order=3)
    assert old.config.solver_order == 2
    assert isinstance(pipe.scheduler.config, FrozenDict)
    assert pipe.unet is pixel_unet()


def test_the_examples_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = text.split("## In other people's pipelines")[1].split("## ")[0]
    change, patch, accelerate, k_diffusion = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:4]
    names: dict[str, Any] = {}
    exec(patch.replace("steps=20", "steps=2"), names)
    said = re.search(r"print\(.*?\)\)  # (.*)", patch)
    assert said is not None
    assert capsys.readouterr().out == said[1] + "\n"
    names["pipe"].scheduler = diffusers.DDIMScheduler()
    exec(change, names)
    assert type(names["pipe"].scheduler) is getattr(drop_in, NAME)
    assert names["pipe"].scheduler.config.use_karras_sigmas
    exec(accelerate, names)
    assert "unet (UNet2DModel): accelerated" in capsys.readouterr().out
    exec(k_diffusion, names)
    assert abs(float(names["x0"].std()) - 1.0) < 0.05, "normal data, of which the denoiser is exact"
