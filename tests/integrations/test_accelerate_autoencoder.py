"""diffusers' AutoencoderKL, accelerated: what its own methods give, with and without tiles and slices."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from inputs import normal
from tolerance import assert_close_to_truth
from torch import nn

import fastdiff

CONFIG: dict[str, Any] = {
    "block_out_channels": [16, 24, 24],
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "sample_size": 16,
}


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def library(dtype: torch.dtype = torch.float32, **changes: Any) -> diffusers.AutoencoderKL:
    torch.manual_seed(5)
    vae = diffusers.AutoencoderKL(**{**CONFIG, **changes}).eval()
    for name, parameter in vae.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return vae.to(dtype)


def results(vae: diffusers.AutoencoderKL, samples: int = 2) -> list[torch.Tensor]:
    """Means and deviations of a picture's latents, and the picture of other latents."""
    dtype = next(vae.parameters()).dtype
    latents = vae.encode(normal(samples, 3, 43, 30).to(dtype)).latent_dist
    return [latents.mean, latents.std, vae.decode(normal(samples, 4, 7, 5, seed=1).to(dtype)).sample]


def norms() -> int:
    """Norms that have run as our operator since the last question."""
    report = fastdiff.report(reset=True)
    return sum(count for (operator, _), count in report.calls.items() if operator == "group_norm_silu")


def check(vae: diffusers.AutoencoderKL, truth: diffusers.AutoencoderKL, plain: diffusers.AutoencoderKL) -> None:
    """Holds an accelerated autoencoder to the rule, and sees that it ran on our network."""
    norms()
    actual = results(vae)
    assert norms() > 0
    for value, exact, usual in zip(actual, results(truth), results(plain), strict=True):
        assert_close_to_truth(value, exact, usual)


@pytest.mark.parametrize("sliced", [False, True], ids=["", "slices"])
@pytest.mark.parametrize("tiled", [False, True], ids=["", "tiles"])
@pytest.mark.parametrize("convolved", [True, False], ids=["", "no-quant-conv"])
def test_its_own_ways_of_calling_it(convolved, tiled, sliced):
    changes = {"use_quant_conv": convolved, "use_post_quant_conv": convolved}
    networks = fastdiff.accelerate(library(**changes)), library(torch.float64, **changes), library(**changes)
    for vae in networks:
        vae.use_tiling, vae.use_slicing = tiled, sliced
    check(*networks)


def test_bfloat16_and_the_way_back():
    vae = fastdiff.accelerate(library(), strict=True).to(torch.bfloat16)
    check(vae, library(torch.float64), library(torch.bfloat16))
    fastdiff.restore(vae)
    norms()
    assert all(map(torch.equal, results(vae), results(library(torch.bfloat16))))
    assert norms() == 0


def test_forward_of_the_whole():
    picture = normal(1, 3, 20, 16)
    actual = fastdiff.accelerate(library(), strict=True)(picture).sample
    assert_close_to_truth(actual, library(torch.float64)(picture.double()).sample, library()(picture).sample)


def test_state_and_configuration_stay_its_own():
    vae, before = fastdiff.accelerate(library(), strict=True), library()
    assert list(vae.state_dict()) == list(before.state_dict())
    assert vae.config == before.config
    assert {id(each) for each in vae.parameters()} == {id(each) for each in vae.state_dict(keep_vars=True).values()}


def test_other_weights_take_effect():
    vae = fastdiff.accelerate(library(), strict=True)
    results(vae)
    torch.manual_seed(9)
    other = diffusers.AutoencoderKL(**CONFIG).eval()
    vae.load_state_dict(other.state_dict())
    check(vae, copy.deepcopy(other).double(), other)


class Adapted(nn.Module):
    """A layer with something added to its result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 0.3 * x.mean()


LAYERS = (
    "encoder.conv_in",
    "encoder.down_blocks.1.resnets.0.conv1",
    "encoder.down_blocks.0.downsamplers.0.conv",
    "encoder.mid_block.attentions.0.to_k",
    "encoder.conv_out",
    "quant_conv",
    "decoder.conv_in",
    "decoder.mid_block.attentions.0.to_out.0",
    "decoder.mid_block.resnets.1.conv2",
    "decoder.up_blocks.0.upsamplers.0.conv",
    "decoder.up_blocks.2.resnets.0.conv_shortcut",
)


def adapt(vae: diffusers.AutoencoderKL, path: str) -> diffusers.AutoencoderKL:
    parent, _, name = path.rpartition(".")
    setattr(vae.get_submodule(parent), name, Adapted(vae.get_submodule(path)))
    return vae


@pytest.mark.parametrize("path", LAYERS)
def test_a_layer_that_is_replaced_is_called(path):
    vae = fastdiff.accelerate(library(), strict=True)
    before = results(vae)
    adapt(vae, path)
    check(vae, adapt(library(torch.float64), path), adapt(library(), path))
    assert not all(map(torch.equal, results(vae), before))


def test_another_way_of_attention_is_left_alone():
    vae = fastdiff.accelerate(library(), strict=True)
    vae.fuse_qkv_projections()
    expected = library()
    expected.fuse_qkv_projections()
    norms()
    with pytest.warns(UserWarning, match="AutoencoderKL runs as before"):
        actual = results(vae)
    assert norms() == 0
    assert all(map(torch.equal, actual, results(expected)))


def test_latent_embeddings_are_refused_by_the_library():
    """Only a decoder with other norms takes them: this one says what it says without us."""
    vae = fastdiff.accelerate(library(), strict=True)
    with pytest.raises(RuntimeError):
        vae.decoder(normal(1, 4, 5, 5), normal(1, 4, 5, 5))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_input_that_does_not_fit_is_refused_by_the_library(part):
    vae = fastdiff.accelerate(library(), strict=True)
    with pytest.raises(RuntimeError, match="to have"):
        getattr(vae, part)(normal(1, 5, 8, 8))


def test_gradients_are_the_librarys():
    vae, expected = fastdiff.accelerate(library(), strict=True), library()
    with torch.enable_grad():
        for network in (vae, expected):
            network.decode(normal(1, 4, 4, 4)).sample.square().mean().backward()
    for ours, theirs in zip(vae.decoder.parameters(), expected.decoder.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_layout_that_is_not_supported():
    vae = library(act_fn="gelu")
    with pytest.warns(UserWarning, match="act_fn='gelu' is not supported") as said:
        fastdiff.accelerate(vae)
    assert len(said) == 1
    assert all(map(torch.equal, results(vae), results(library(act_fn="gelu"))))
    with pytest.raises(fastdiff.InputError, match="act_fn='gelu'"):
        fastdiff.accelerate(vae, strict=True)


def parts(vae: diffusers.AutoencoderKL, name: str) -> tuple[Any, torch.Tensor]:
    """A part of that name, which nothing else is held of, and an input."""
    return getattr(vae, name), normal(2, 3, 22, 16) if name == "encoder" else normal(2, 4, 7, 5)


def reported() -> dict[str, int]:
    gc.collect()  # other tests' pipelines
    return {name: size for name, size in fastdiff.report().networks.items() if name.startswith("AutoencoderKL")}


def check_part(part: nn.Module, name: str, *, ran: bool = True) -> None:
    truth, x = parts(library(torch.float64), name)
    norms()
    actual = part(x)
    assert bool(norms()) == ran
    assert_close_to_truth(actual, truth(x.double()), parts(library(), name)[0](x))


@pytest.fixture(params=["encoder", "decoder"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("called", [False, True], ids=["", "called"])
def test_a_part_outlives_the_whole(name, called):
    vae = fastdiff.accelerate(library(), strict=True)
    if called:
        results(vae)
    part, _ = parts(vae, name)
    other = weakref.ref(vae.decoder if name == "encoder" else vae.encoder)
    gc.disable()
    try:
        del vae
        assert other() is None, "what nobody holds is freed"
    finally:
        gc.enable()
    check_part(part, name)
    assert list(reported()) == ["AutoencoderKL"]
    assert fastdiff.restore(part) is part
    check_part(part, name, ran=False)
    assert not reported()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))], ids=["copy", "pickle"]
)
def test_a_part_is_copied_without_the_whole(name, copied):
    part = copied(parts(fastdiff.accelerate(library(), strict=True), name)[0])
    check_part(part, name)
    fastdiff.accelerate(part, rewrites=["geglu"])
    check_part(part, name, ran=False)
    assert part.forward.conversion.rewrites.geglu
    assert not part.forward.conversion.rewrites.group_norm_silu


def test_a_part_follows_its_weights(name):
    part, x = parts(fastdiff.accelerate(library(), strict=True), name)
    before = part(x)
    part.conv_out.weight.mul_(2)
    part.conv_out.bias.mul_(2)
    torch.testing.assert_close(part(x), 2 * before)


def test_the_whole_is_reported_once():
    vae = fastdiff.accelerate(library(), strict=True)
    results(vae)
    (size,) = reported().values()
    copies = [part.forward.conversion.copies() for part in (vae.encoder, vae.decoder)]
    assert size == sum(copies)
    assert min(copies) > 0
