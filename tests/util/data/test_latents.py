"""Latents: the VAE is diffusers' own, what is stored is what it says, and nothing is lost when it is interrupted.

The VAE is tiny and random. Blocks are made small enough here that a few images fill several.
"""

import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from denoiser import random_flip
from experiments import tiny_vae
from tests.conftest import ONE, listing
from tests.util.data.image_files import SIZE, damage, interrupted_at_rename, make_folder
from tests.util.evaluation.toy import fork_ranks
from tools import prepare_data
from util import io
from util.data import encode
from util.data import latents as latents_file
from util.data.datasets import ImageFolderImages, build_dataset
from util.data.encode import write_latents
from util.data.images import BadImage, DataError, quantise
from util.data.latents import LatentImages, damaged_blocks, read_index
from util.data.loader import ImageLoader
from util.data.vae import _digest, load_vae
from util.errors import UserError
from util.rng import CounterRNG

diffusers = pytest.importorskip("diffusers")
COUNTS = {"a": 6, "b": 7, "c": 5}  # blocks of 5, 5, 5 and 3 images
SHAPE = (2, 2, 4, 8, 8)  # of an item: f = 2
ITEM = 2 * math.prod(SHAPE)  # bytes
CPU = torch.device("cpu")


def random_vae(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "sample_size": 16,
        "scaling_factor": 0.7,
        "shift_factor": 0.3,
    }
    return diffusers.AutoencoderKL(**{**settings, **changes}).eval()


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    random_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_vae(vae_folder, CPU)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(encode, "BLOCK_BYTES", 5 * ITEM + 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """An image folder with two splits."""
    make_folder(tmp_path / "images" / "train", COUNTS, size=(21, 18))
    return make_folder(tmp_path / "images" / "val", {"a": 1, "b": 2, "c": 1}).parent


@pytest.fixture
def out(folder, tmp_path, vae):
    """Finished latents of the training images."""
    write(folder, tmp_path / "latents", vae)
    return tmp_path / "latents" / "train"


def write(folder, out, vae, **options):
    images = build_dataset("imagefolder", folder, SIZE)
    return write_latents(images, vae, out / "train", ONE, **{"batch_size": 2, "num_workers": 0, **options})[0]


def pixels(images, numbers):
    return torch.stack([images[i][0] for i in numbers])


def command(vae_folder, *words):
    flags = ["--vae", vae_folder, "--img_size", SIZE, "--batch_size", 2, "--num_workers", 0, "--device", "cpu"]
    return ["latents", *map(str, (*flags, *words))]


# The VAE.


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


# The format.


def test_the_command_writes_what_the_vae_says(folder, tmp_path, vae, vae_folder, capsys):
    assert prepare_data.main(command(vae_folder, "--data_path", folder, "--out", tmp_path / "latents")) == 0
    printed = capsys.readouterr().out
    assert "train: latents (2, 2, 4, 8, 8) of 18 images of 16 pixels; " in printed and printed.count("images/s") == 2
    for split, block in (("train", 5), ("val", 5)):
        images, found = ImageFolderImages(folder, SIZE, split), LatentImages(tmp_path / "latents" / split)
        assert len(found) == len(images) > 0 and found.class_names == images.class_names
        assert np.array_equal(found.labels, images.labels)
        assert (found.img_size, found.channels, found.pixels, found.views) == (8, 4, SIZE, 2)
        assert found.vae == vae.describe() and found.content == "moments"
        index = read_index(tmp_path / "latents" / split)
        assert (index["dataset"], index["class_num"]) == ("imagefolder", 3)
        raw = np.load(tmp_path / "latents" / split / "latents.npy")  # any program can read it
        assert raw.shape == (len(images), *SHAPE) and raw.dtype == np.float16
        for i in range(len(images)):
            start = i // block * block + i % block // 2 * 2  # of its batch
            numbers = range(start, min(start + 2, start // block * block + block, len(images)))
            x = pixels(images, numbers)
            views = [torch.stack(vae.encode(view), 1)[i - start] for view in (x, x.flip(-1))]
            item, label = found[i]
            assert torch.equal(item, torch.stack(views).half()) and label == images[i][1]
            assert np.array_equal(raw[i], item.numpy()) and found.path(i) == images.path(i)
    x, y = next(iter(ImageLoader(found, [[0, 3]], 0, pin_memory=False)))
    assert x.shape == (2, *SHAPE) and y.tolist() == [0, 2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_are_those_of_z(folder, tmp_path, vae, dtype):
    index = write(folder, tmp_path / "latents", vae, dtype=dtype)
    found = LatentImages(tmp_path / "latents" / "train")
    assert found[0][0].dtype == getattr(torch, dtype) and len(index["sha256"]) == 4
    assert np.load(tmp_path / "latents" / "train" / "latents.npy").dtype == {"float16": "f2", "bfloat16": "u2"}[dtype]
    stored = torch.stack([found[i][0] for i in range(18)]).double()
    mean, std = (stored[:, :, s].transpose(0, 2).flatten(1) for s in (0, 1))  # (C, N V h w)
    np.testing.assert_allclose(found.statistics["mean"], mean.mean(1), rtol=1e-9)
    expected = (mean.var(1, correction=0) + std.square().mean(1)).sqrt()
    np.testing.assert_allclose(found.statistics["std"], expected, rtol=1e-9)
    draws = mean + std * torch.randn(50, *mean.shape, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(expected, draws.transpose(0, 1).flatten(1).std(1), rtol=0.01)
    x, _ = vae.encode(pixels(ImageFolderImages(folder, SIZE), range(18)))
    assert (stored[:, 0, 0] - x).abs().max() < {"float16": 2e-3, "bfloat16": 2e-2}[dtype] * x.abs().max()


def test_samples_are_drawn_once_by_the_number_of_the_image(folder, tmp_path, vae):
    write(folder, tmp_path / "moments", vae, dtype="bfloat16")
    write(folder, tmp_path / "samples", vae, content="samples", flip=False, batch_size=3)
    moments, samples = (LatentImages(tmp_path / name / "train") for name in ("moments", "samples"))
    assert samples[0][0].shape == (1, 1, 4, 8, 8) and samples.views == 1
    for i in (0, 7, 17):
        noise = CounterRNG(0, 0, torch.tensor([i])).normal("latent", 256).view(4, 8, 8)
        mean, std = moments[i][0][0].float()
        z = samples[i][0][0, 0].float()
        assert torch.allclose(z, mean + std * noise, atol=0.05) and (z - mean).abs().max() > 0.5
        assert torch.equal(samples.prepare(samples[i][0][None], CounterRNG(3, 9, torch.tensor([1]))), z[None])
    stored = np.load(tmp_path / "samples" / "train" / "latents.npy").astype(float)[:, 0, 0]  # (N, C, h, w)
    np.testing.assert_allclose(samples.statistics["mean"], stored.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(samples.statistics["std"], stored.std((0, 2, 3)), rtol=1e-9)
    with pytest.raises(DataError, match="no mirrored images: train with --no-flip"):
        samples.prepare(samples[0][0][None], flip=True)


def test_data_without_files_keep_their_order(tmp_path, vae_folder, monkeypatch, capsys):
    """Whose classes are mixed; digits are never mirrored and have no validation images."""
    monkeypatch.setattr(encode, "BLOCK_BYTES", 2**17)
    words = ("--dataset", "digits", "--out", tmp_path, "--img_size", 8, "--batch_size", 200, "--dtype", "bfloat16")
    assert prepare_data.main(command(vae_folder, *words)) == prepare_data.main(["verify", str(tmp_path)]) == 0
    assert (tmp_path / "train").exists() and not (tmp_path / "val").exists()
    digits, found = build_dataset("digits", None, 8), LatentImages(tmp_path / "train")
    assert np.array_equal(found.labels, digits.labels) and found.class_names == digits.class_names
    assert found[11][1] == digits[11][1] and found.path(11) == "digits/1/11" and found.views == 1
    mean, _ = load_vae(vae_folder, CPU).encode(digits[1700][0][None])
    assert torch.allclose(found[1700][0][0, 0].float(), mean[0], rtol=0.01, atol=0.01)


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
    index["sha256"] = {k: encode.hashlib.sha256(part.tobytes()).hexdigest() for k, part in parts.items()}
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "latents.npy", values)
    (tmp_path / "train" / "files.json").write_text(json.dumps(files))
    (tmp_path / "train" / "latents.json").write_text(json.dumps(index))
    found = LatentImages(latents_file.find(tmp_path))
    assert damaged_blocks(tmp_path / "train", index) == [] and found.labels.tolist() == [1, 0, 1]
    assert np.array_equal(found[1][0], values[1]) and found[1][1] == 0
    with pytest.raises(BadImage, match="cannot read image toy/b/2: truncated"):
        found[2]


# What the network learns from.


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


# Interrupted, and on several ranks.


def test_it_continues_wherever_it_was_interrupted(out, folder, tmp_path, vae, monkeypatch):
    """Interrupted before each rename of a JSON file: the list of files, the index, and the index after each block."""
    whole, index = (out / "latents.npy").read_bytes(), read_index(out)
    encoded, encode_views = [], encode.encode_views
    monkeypatch.setattr(encode, "encode_views", lambda *a: encoded.extend(a[2]) or encode_views(*a))
    for n in range(6):
        shutil.rmtree(out)
        with interrupted_at_rename(monkeypatch, n):
            write(folder, out.parent, vae)
        if n > 1:  # there is an index
            with pytest.raises(DataError, match=f"not finished, {6 - n} blocks are missing: run the same"):
                LatentImages(out)
        encoded.clear()
        again = write(folder, out.parent, vae)
        assert len(encoded) == 18 - 5 * max(0, n - 2) and (out / "latents.npy").read_bytes() == whole
        assert {**read_index(out), "made": 0} == {**index, "made": 0} == {**json.loads(json.dumps(again)), "made": 0}
    encoded.clear()
    write(folder, out.parent, vae)
    assert encoded == []  # nothing of finished latents is encoded again


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_write_what_one_writes(out, folder, tmp_path, vae_folder, ranks):
    """The last round has fewer blocks than ranks, and fewer validation images than ranks have blocks."""
    words = command(vae_folder, "--data_path", folder, "--out", tmp_path / "many")
    done = fork_ranks(ranks, tmp_path, lambda: prepare_data.main(words))
    assert [code for code, _ in done] == [0] * ranks, done
    assert "18 images" in done[0][1] and all(text == "" for _, text in done[1:])
    many = tmp_path / "many" / "train"
    assert (many / "latents.npy").read_bytes() == (out / "latents.npy").read_bytes()
    assert {**read_index(many), "made": 0} == {**read_index(out), "made": 0}
    assert len(LatentImages(tmp_path / "many" / "val")) == 4


def test_an_error_on_a_rank_ends_all_with_one_sentence(folder, tmp_path, vae, vae_folder):
    """A bad image in the third block, which rank 0 of two encodes in the second round."""
    whole = (folder / "train" / "b" / "6.png").read_bytes()
    damage(folder / "train", {"b/6": "text"})
    words = command(vae_folder, "--data_path", folder, "--out", tmp_path / "latents")
    done = fork_ranks(2, tmp_path, lambda: prepare_data.main(words))
    assert [code for code, _ in done] == [2, 2]
    (sentence,) = (done[0][1] + done[1][1]).splitlines()
    assert sentence.startswith("prepare_data: error: cannot read image") and "b/6.png" in sentence
    assert list(read_index(tmp_path / "latents" / "train")["sha256"]) == ["0", "1"]
    (folder / "train" / "b" / "6.png").write_bytes(whole)
    write(folder, tmp_path / "latents", vae)  # one rank continues
    assert len(LatentImages(tmp_path / "latents" / "train")) == 18


# Refused.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vae": 1}, "vae .*, expected"),
        ({"size": 8}, "img_size 16, expected 8"),
        ({"source": 1}, "source .*/images/train, expected .*/moved/train"),
        ({"dtype": "bfloat16"}, "dtype float16, expected bfloat16"),
        ({"content": "samples"}, "content moments, expected samples"),
        ({"flip": False}, "views 2, expected 1"),
        ({"files": 1}, "files_hash"),
    ],
)
def test_other_latents_in_the_same_folder_are_refused(out, folder, tmp_path, vae, change, match):
    size = change.pop("size", SIZE)
    if change.pop("vae", 0):
        random_vae(seed=1).save_pretrained(tmp_path / "other")
        vae = load_vae(tmp_path / "other", CPU)
    if change.pop("files", 0):
        shutil.copy(folder / "train" / "a" / "0.png", folder / "train" / "a" / "00.png")
    if change.pop("source", 0):
        folder = folder.rename(tmp_path / "moved")
    before = listing(out)
    with pytest.raises(DataError, match=match) as error:
        write_latents(ImageFolderImages(folder, size), vae, out, ONE, num_workers=0, **change)
    assert str(error.value).count("expected") == 1 and listing(out) == before


def test_wrong_input_is_refused_in_a_sentence(out, folder, tmp_path, vae_folder, capsys):
    before = listing(out, folder)
    for words, part in (
        (("--data_path", folder, "--img_size", 15), "--img_size 15 is no multiple of 2, the factor of the VAE"),
        (("--data_path", folder, "--vae", folder), "holds no VAE in diffusers' format"),
        (("--data_path", folder, "--batch_size", 0), "--batch_size must be at least 1"),
        (("--data_path", folder, "--out", folder), " and no latents: name an empty folder"),
        (("--data_path", tmp_path / "none"), "does not exist"),
        ((), "no data path given"),
    ):
        capsys.readouterr()
        assert prepare_data.main(command(vae_folder, "--out", tmp_path / "new", *words)) == 2
        err = capsys.readouterr().err
        assert err.startswith("prepare_data: error: ") and err.count("\n") == 1 and part in err, err
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    (folder / "train" / "files.json").unlink(missing_ok=True)
    assert listing(out, folder) == before


def test_latents_that_are_not_finite_are_not_listed(folder, tmp_path):
    random_vae(scaling_factor=1e6).save_pretrained(tmp_path / "vae")
    large = load_vae(tmp_path / "vae", CPU)
    with pytest.raises(DataError, match=r"train/a/0\.png are not finite in float16"):
        write(folder, tmp_path / "latents", large)
    assert read_index(tmp_path / "latents" / "train")["sha256"] == {}
    write(folder, tmp_path / "bfloat16", large, dtype="bfloat16")
    assert LatentImages(tmp_path / "bfloat16" / "train").statistics["std"][0] > 1e4


def test_too_small_a_disk_is_refused_before_the_work(folder, tmp_path, vae, monkeypatch):
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 5 * ITEM))
    monkeypatch.delattr(encode, "encode_views")
    with pytest.raises(DataError, match=r"too small: it needs \S+ GB more"):
        write(folder, tmp_path / "latents", vae)


@pytest.mark.parametrize("cached", [False, True])
def test_bad_images_are_noted_and_can_be_repaired(folder, tmp_path, vae, vae_folder, capsys, cached):
    """Also those that a cache of the images knows."""
    whole = (folder / "train" / "a" / "3.png").read_bytes()
    damage(folder / "train", {"a/3": "empty"})
    data = folder
    if cached:
        data = tmp_path / "cache"
        words = ["cache", "--data_path", str(folder), "--out", str(data), "--img_size", str(SIZE)]
        assert prepare_data.main([*words, "--on_bad_image", "skip"]) == 0
        shutil.rmtree(data / "val")
    words = command(vae_folder, "--data_path", data, "--out", tmp_path / "latents")
    assert prepare_data.main(words) == 2 and "cannot read image" in capsys.readouterr().err
    assert prepare_data.main([*words, "--on_bad_image", "skip"]) == 0
    assert "18 images of 16 pixels, 1 of them bad: training needs --on_bad_image skip" in capsys.readouterr().out
    found = LatentImages(tmp_path / "latents" / "train")
    assert list(found.bad) == [3] and (tmp_path / "latents" / "val").exists() != cached
    stored = torch.from_numpy(np.load(tmp_path / "latents" / "train" / "latents.npy")).double()
    assert not stored[3].any() and stored[2].any() and stored[4].any()
    good = stored[[i for i in range(18) if i != 3], :, 0]
    np.testing.assert_allclose(found.statistics["mean"], good.mean((0, 1, 3, 4)), rtol=1e-9)
    with pytest.raises(BadImage, match=r"a/3\.png: the file is empty"):
        found[3]
    if not cached:
        (folder / "train" / "a" / "3.png").write_bytes(whole)
        assert write(folder, tmp_path / "latents", vae)["bad"] == {}
        assert LatentImages(tmp_path / "latents" / "train")[3][0].any()


# Damage.


def flip_a_bit(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def edit_index(folder, **changes):
    io.write_json(folder / "latents.json", {**read_index(folder), **changes})


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "latents.npy", 3000), r"latents\.npy is missing, damaged or not float16"),
    "other values": (lambda f: np.save(f / "latents.npy", np.zeros(3)), r"not float16 \(18, 2, 2, 4, 8, 8\)"),
    "altered list": (lambda f: flip_a_bit(f / "files.json", 20), r"files\.json is missing or damaged"),
    "half an index": (lambda f: os.truncate(f / "latents.json", 90), r"another layout \(version unknown, expected 1"),
    "later layout": (lambda f: edit_index(f, version=2), r"version 2, expected 1.*make them again"),
    "statistics": (
        lambda f: edit_index(f, statistics={"mean": [0.0], "std": [float("nan")]}),
        "statistics of the latents .* are not finite",
    ),
    "no index": (lambda f: (f / "latents.json").unlink(), "have no train images"),
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
    assert damaged_blocks(out, read_index(out)) == ["2"]
    assert prepare_data.main(["verify", str(out.parent)]) == 2
    sentence = capsys.readouterr().err
    assert f"{out}: 1 of 4 blocks do not have" in sentence and latents_file.AGAIN in sentence
    write(folder, out.parent, vae)
    assert path.read_bytes() == whole


def test_a_file_that_is_cut_while_it_is_in_use(out):
    images = LatentImages(out)
    os.truncate(out / "latents.npy", (out / "latents.npy").stat().st_size - 12 * ITEM)
    assert images[5][0].shape == SHAPE
    with pytest.raises(DataError, match=r"latents\.npy ends within image 6"):
        images[6]


# The VAE to try it with.


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
