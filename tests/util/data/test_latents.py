"""Latents as a data set: their format, what the network learns from them, and what is found to be damaged."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch

from denoiser import random_flip
from tests.util.data.conftest import ITEM, SHAPE, write
from tools import prepare_data
from util import io
from util.data.images import BadImage, DataError
from util.data.latents import LATENTS, LatentImages
from util.rng import CounterRNG

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("small_blocks")


def test_latents_of_this_format_are_opened_in_later_versions(tmp_path):
    """Written here without the code that is tested."""
    values = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 4, 4)).astype(np.float16)
    files = {"a": [1], "b": [0, 2]}
    index = {"version": 1, "img_size": 32, "num_images": 3, "channels": 5, "size": 4, "views": 1}
    index |= {"content": "moments", "dtype": "float16", "source": "toy", "made": {}, "bad": {"2": "truncated"}}
    index |= {"vae": {"name": "x", "sha256": "y", "factor": 8}, "block_size": 2, "sums": {}}
    index |= {"dataset": "toy", "class_num": 2}
    index["files_hash"] = io.json_hash(files)
    index["statistics"] = {"mean": [0.0] * 5, "std": [1.0] * 5}
    parts = {"0": values[:2], "1": values[2:]}
    index["sha256"] = {k: hashlib.sha256(part.tobytes()).hexdigest() for k, part in parts.items()}
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "latents.npy", values)
    (tmp_path / "train" / "files.json").write_text(json.dumps(files))
    (tmp_path / "train" / "latents.json").write_text(json.dumps(index))
    found = LatentImages(LATENTS.find(tmp_path))
    assert LATENTS.damaged_blocks(tmp_path / "train", index) == [] and found.labels.tolist() == [1, 0, 1]
    assert np.array_equal(found[1][0], values[1]) and found[1][1] == 0
    with pytest.raises(BadImage, match="cannot read image toy/b/2: truncated"):
        found[2]


def test_prepare_draws_z(out):
    images = LatentImages(out)
    batch = torch.stack([images[i][0] for i in range(8)])  # (B, V, S, C, h, w)
    numbers = CounterRNG(0, 5, torch.arange(8))
    z = images.prepare(batch, numbers, flip=True)
    assert z.shape == (8, 4, 8, 8) and z.dtype == torch.float32
    assert torch.equal(z, images.prepare(batch, CounterRNG(0, 5, torch.arange(8)), flip=True))
    assert torch.equal(z[3:5], images.prepare(batch[3:5], CounterRNG(0, 5, torch.arange(3, 5)), flip=True))
    assert torch.equal(images.prepare(batch), batch[:, 0, 0].float())
    assert torch.equal(images.prepare(batch, flip=True), batch[:, 0, 0].float())
    mirrored = random_flip(torch.tensor([0.0, 1.0]).expand(8, 1, 1, 2), numbers)[:, 0, 0, 0].bool()
    assert 0 < mirrored.sum() < 8
    noise = numbers.normal("latent", 256).view(8, 4, 8, 8)
    for i in range(8):
        mean, std = batch[i, int(mirrored[i])].float()
        assert torch.equal(z[i], mean + std * noise[i])
        assert torch.equal(images.prepare(batch, numbers)[i], batch[i, 0, 0].float() + batch[i, 0, 1] * noise[i])


def test_prepare_has_the_mean_and_the_variance_that_are_stored(out):
    images, draws = LatentImages(out), 4000
    item = images[2][0]
    z = images.prepare(item.expand(draws, *SHAPE), CounterRNG(1, 0, torch.arange(draws)))
    mean, std = item[0].float()
    error = (z.mean(0) - mean) / std * draws**0.5  # standard normal
    assert error.abs().max() < 4.5 and abs(error.square().mean() - 1) < 0.3
    ratio = z.var(0) / std**2
    assert abs(ratio.mean() - 1) < 0.01 and (ratio - 1).abs().max() < 0.15


def flip_a_bit(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def edit_index(folder, **changes):
    io.write_json(folder / "latents.json", {**LATENTS.read_index(folder), **changes})


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "latents.npy", 3000), r"latents\.npy is missing, damaged or not float16"),
    "other values": (lambda f: np.save(f / "latents.npy", np.zeros(3)), r"not float16 \(18, 2, 2, 4, 8, 8\)"),
    "altered list": (lambda f: flip_a_bit(f / "files.json", 20), r"files\.json is missing or damaged"),
    "half an index": (lambda f: os.truncate(f / "latents.json", 90), r"another layout \(version unknown, expected 1"),
    "later layout": (lambda f: edit_index(f, version=2), r"version 2, expected 1.*make it again"),
    "no index": (lambda f: (f / "latents.json").unlink(), "has no train images"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_when_latents_are_opened(out, kind):
    harm, match = DAMAGE[kind]
    harm(out)
    with pytest.raises(DataError, match=match) as error:
        LatentImages(out)
    assert str(out) in str(error.value)


def test_verify_finds_a_flipped_bit_and_its_advice_helps(out, folder, vae, vae_folder, capsys):
    path = out / "latents.npy"
    whole = path.read_bytes()
    assert prepare_data.main(["verify", str(out.parent)]) == prepare_data.main(["verify", str(out)]) == 0
    assert capsys.readouterr().out.count("train: all 18 images have their checksums") == 2
    flip_a_bit(path, len(whole) - 8 * ITEM)  # in image 10, the first of block 2
    assert len(LatentImages(out)) == 18  # opening reads no latents
    assert LATENTS.damaged_blocks(out, LATENTS.read_index(out)) == ["2"]
    assert prepare_data.main(["verify", str(out.parent)]) == 2
    sentence = capsys.readouterr().err
    assert f"{out}: 1 of 4 blocks do not have" in sentence and LATENTS.again in sentence
    write(folder, out.parent, vae)
    assert path.read_bytes() == whole


def test_a_file_that_is_cut_while_it_is_in_use(out):
    images = LatentImages(out)
    os.truncate(out / "latents.npy", (out / "latents.npy").stat().st_size - 12 * ITEM)
    assert images[5][0].shape == SHAPE
    with pytest.raises(DataError, match=r"latents\.npy ends within image 6"):
        images[6]
