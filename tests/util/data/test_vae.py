"""The VAE is diffusers' own: what it encodes and decodes, its digest, and what is refused."""

import json
import math
import os
import shutil
import sys

import pytest
import torch

from experiments import tiny_vae
from tests.util.data.conftest import CPU, random_vae
from util.data.images import quantise
from util.data.vae import _digest, load_vae
from util.errors import UserError

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("small_blocks")


def test_it_encodes_and_decodes_as_diffusers_does_to_the_bit(vae, vae_folder):
    theirs = diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    images = torch.randint(256, (3, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoded = theirs.encode(images.float() / 127.5 - 1).latent_dist
        decoded = theirs.decode(encoded.mean).sample
        theirs.enable_tiling()
        tiled = theirs.decode(encoded.mean).sample
    mean, std = vae.encode(images)
    assert torch.equal(mean, (encoded.mean - 0.3) * 0.7) and torch.equal(std, encoded.std * 0.7)
    assert mean.shape == std.shape == (3, vae.channels, 16, 24) and mean.dtype == torch.float32 and vae.factor == 2
    latent = mean / 0.7 + 0.3
    assert torch.allclose(latent, encoded.mean, atol=1e-6)
    with torch.no_grad():
        theirs.disable_tiling()
        assert torch.equal(vae.decode(mean), quantise(theirs.decode(latent).sample))
        theirs.enable_tiling()
        assert torch.equal(vae.decode(mean, tiled=True), quantise(theirs.decode(latent).sample))
    assert not torch.equal(decoded, tiled) and torch.equal(vae.encode(images)[0], mean)  # tiling is off again
    in_parts = vae.decode(mean, batch_size=2)
    assert in_parts.shape == images.shape and (in_parts.int() - vae.decode(mean).int()).abs().max() <= 1


def test_one_without_noise_has_no_std(tmp_path):
    torch.manual_seed(0)
    sizes = {f"{part}_block_out_channels": (8, 16) for part in ("encoder", "decoder")}
    layers = {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    scales = {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
    theirs = diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.5, **sizes, **layers, **scales).eval()
    theirs.save_pretrained(tmp_path)
    vae = load_vae(tmp_path, CPU)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = vae.encode(images)
    with torch.no_grad():
        assert torch.equal(mean, theirs.encode(images.float() / 127.5 - 1).latent * 0.5)
        assert torch.equal(vae.decode(mean), quantise(theirs.decode(mean / 0.5).sample))
    assert not std.any() and (vae.factor, vae.channels, vae.shift_factor) == (2, 4, 0.0)


def test_the_digest_is_that_of_the_function(vae, vae_folder, tmp_path):
    """Not of the folder, nor of what diffusers writes beside it."""
    shutil.copytree(vae_folder, tmp_path / "copy")
    config = json.loads((vae_folder / "config.json").read_text())
    short = {k: v for k, v in config.items() if k not in ("act_fn", "latents_mean", "_diffusers_version")}  # defaults
    (tmp_path / "copy" / "config.json").write_text(json.dumps(short))
    copy = load_vae(tmp_path / "copy", CPU)
    assert copy.sha256 == vae.sha256 and copy.name == str(tmp_path / "copy") != vae.name
    copy.model.save_pretrained(tmp_path / "saved")
    assert load_vae(tmp_path / "saved", CPU).sha256 == vae.sha256
    for n, other in enumerate((random_vae(seed=1), random_vae(scaling_factor=0.8), random_vae(shift_factor=None))):
        other.save_pretrained(tmp_path / str(n))
        assert load_vae(tmp_path / str(n), CPU).sha256 != vae.sha256


def test_the_digest_stays_where_a_later_diffusers_has_more_settings():
    class Config(dict):
        __getattr__ = dict.__getitem__

    def version(init, **settings):
        model = type("AutoencoderKL", (torch.nn.Linear,), {"__init__": init})()
        torch.nn.init.ones_(model.weight)
        model.config = Config(scaling_factor=0.5, **settings)
        return model

    def now(self, scaling_factor=1.0, act_fn="silu"):
        torch.nn.Linear.__init__(self, 2, 2, bias=False)

    def later(self, scaling_factor=1.0, act_fn="silu", sizes=(1, 2)):
        now(self)

    digest = _digest(version(now, act_fn="silu"))
    assert digest == _digest(version(later, act_fn="silu", sizes=[1, 2], _diffusers_version="9"))
    assert digest != _digest(version(later, act_fn="silu", sizes=[1, 3]))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("encoder.conv_in.weight")
    save_file(weights, path)


NO_VAE = {
    "no config": (lambda f: (f / "config.json").unlink(), r"holds no VAE in diffusers' format \(.*config\.json"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "holds no VAE in diffusers' format"),
    "another class": (lambda f: edit_config(f, _class_name="UNet2DModel"), "holds a UNet2DModel; expected one of Auto"),
    "no scale": (lambda f: edit_config(f, scaling_factor=None), "has no scaling_factor: set it"),
    "no weights": (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "cannot be read: .*safetensors"),
    "half": (lambda f: os.truncate(f / "diffusion_pytorch_model.safetensors", 9000), "cannot be read"),
    "another size": (lambda f: edit_config(f, latent_channels=5), "cannot be read"),
    "a weight less": (drop_a_weight, r"lack encoder\.conv_in\.weight, among others"),
}


@pytest.mark.parametrize("kind", NO_VAE)
def test_what_is_no_vae_is_refused(vae_folder, tmp_path, kind):
    harm, match = NO_VAE[kind]
    shutil.copytree(vae_folder, tmp_path / "vae")
    harm(tmp_path / "vae")
    with pytest.raises(UserError, match=match) as error:
        load_vae(tmp_path / "vae", CPU)
    assert str(tmp_path / "vae") in str(error.value) and "\n" not in str(error.value)


def test_no_folder_and_no_diffusers(vae_folder, monkeypatch):
    with pytest.raises(UserError, match="/no/where is no folder, and no name"):
        load_vae("/no/where", CPU)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers"):
        load_vae(vae_folder, CPU)


def test_the_tiny_vae_learns_and_is_the_same_for_the_same_seed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiny_vae, "HELD_OUT", 40)
    monkeypatch.setattr(tiny_vae, "BATCH", 8)
    words = ["--dataset", "digits", "--steps", "12", "--out"]
    lines = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert tiny_vae.main([*words, str(tmp_path / name), "--seed", seed]) == 0
        lines.append(json.loads(capsys.readouterr().out))
    assert lines[0]["sha256"] == lines[1]["sha256"] != lines[2]["sha256"]
    vae, (images, held_out) = load_vae(tmp_path / "a", CPU), tiny_vae.load_images("digits", 0)
    assert (vae.factor, vae.channels) == (4, 4) and len(held_out) == 40 and len(images) == 1757
    mean, std = vae.encode(images[:400])
    assert abs((mean.var() + std.square().mean()).sqrt() - 1) < 0.1  # what scaling_factor is for
    error = (vae.decode(vae.encode(held_out)[0]).double() - held_out).square().mean()
    assert lines[0]["psnr"] == pytest.approx(10 * math.log10(255**2 / error), abs=0.01)
    untrained = 10 * math.log10(255**2 / (held_out.double() - 127.5).square().mean())
    assert lines[0]["psnr"] > untrained + 1
