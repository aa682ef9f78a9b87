"""docs/other-models.md: its code runs, and networks that nobody here wrote see what they should, and nothing else."""

import copy
import math
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

import spectral_forcing
from spectral_forcing import SpectralForcing
from spectral_ops.attach import attach

ROOT = Path(spectral_forcing.__file__).parent
PAGE = (ROOT / "docs" / "other-models.md").read_text()
BLOCKS = re.findall(r"\n## ([^\n]*)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("title", "block"), [pytest.param(*pair, id=pair[0]) for pair in BLOCKS])
def test_the_pages_code_runs_and_learns(title, block):
    torch.manual_seed(0)
    names = {"__name__": "page"}
    exec(compile(block, title, "exec"), names)
    losses, images = names["losses"], names["images"]
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert images.isfinite().all() and len(images) <= 2


def test_all_sections_with_code_are_run():
    assert len(BLOCKS) == PAGE.count("```python") - 1 == 5  # the first block is an excerpt


def prx():
    sizes = {"in_channels": 3, "patch_size": 8, "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0}
    return diffusers.PRXTransformer2DModel(**sizes, num_heads=2, depth=1, axes_dim=[8, 8])


def dit():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 3, "num_layers": 1}
    return diffusers.DiTTransformer2DModel(**sizes, sample_size=16, patch_size=4, num_embeds_ada_norm=4)


def unet():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return diffusers.UNet2DModel(sample_size=16, norm_num_groups=4, layers_per_block=1, **blocks)


MODELS = {
    prx: ("sigma", {"encoder_hidden_states": torch.ones(2, 3, 16)}),
    dit: ("ddpm", {"class_labels": torch.tensor([1, 2])}),
    unet: ("sigma_1000", {}),
}


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_models_of_diffusers_see_the_filtered_image_and_are_themselves_again(build):
    torch.manual_seed(0)
    model, (convention, others) = build().eval(), MODELS[build]
    table = diffusers.DDIMScheduler().alphas_cumprod if convention == "ddpm" else None
    operator = SpectralForcing(time_convention=convention, alphas_cumprod=table)
    z, t = torch.randn(2, 3, 16, 16), {"ddpm": torch.tensor([700, 20])}.get(convention, torch.tensor([0.7, 0.1]))
    t = 1000 * t if convention == "sigma_1000" else t

    def call(z):
        return model(z, timestep=t, **others, return_dict=False)[0]

    with torch.no_grad():
        plain, expected = call(z), call(operator(z, t))
        assert not plain.allclose(expected)
        attached = attach(model, operator)
        assert call(z).equal(expected)
        average = copy.deepcopy(model)
        for parameter in average.parameters():
            parameter.zero_()
        assert call(z).equal(expected) and not average(z, timestep=t, **others, return_dict=False)[0].any()
        attached.detach()
        assert call(z).equal(plain)


class Twice(ModelHook):
    def post_forward(self, module, output):
        return (2 * output[0],)


@pytest.mark.parametrize("first", ["ours", "other"])
def test_the_hook_is_one_among_those_of_diffusers(first):
    """Whichever of two hooks is removed first, the other one works on."""
    torch.manual_seed(0)
    model, operator, z, t = unet().eval(), SpectralForcing(time_convention="sigma"), torch.randn(1, 3, 16, 16), 0.3

    def call(z):
        return model(z, t, return_dict=False)[0]

    with torch.no_grad():
        plain, filtered = call(z), call(operator(z, t))
        attached = attach(model, operator)
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry.register_hook(Twice(), "twice")
        assert call(z).equal(2 * filtered)
        if first == "ours":
            attached.detach()
            assert call(z).equal(2 * plain)
        registry.remove_hook("twice")
        assert call(z).equal(plain if first == "ours" else filtered)
        attached.detach()
        assert call(z).equal(plain)
