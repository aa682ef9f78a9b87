"""Writing latents: what is stored is what the VAE says, and nothing is lost when it is interrupted."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.conftest import ONE, listing
from tests.util.data.conftest import CPU, ITEM, SHAPE, command, pixels, random_vae, write
from tests.util.data.image_files import SIZE, damage, interrupted_at_rename
from tests.util.evaluation.toy import fork_ranks
from tools import prepare_data
from util.data import blocks, encode
from util.data.datasets import ImageFolderImages, build_dataset
from util.data.encode import write_latents
from util.data.images import BadImage, DataError
from util.data.latents import LATENTS, LatentImages
from util.data.loader import ImageLoader
from util.data.vae import load_vae
from util.rng import CounterRNG

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("small_blocks")


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
        index = LATENTS.read_index(tmp_path / "latents" / split)
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


def test_it_continues_wherever_it_was_interrupted(out, folder, tmp_path, vae, monkeypatch):
    """Interrupted before each rename of a JSON file: the list of files, the index, and the index after each block."""
    whole, index = (out / "latents.npy").read_bytes(), LATENTS.read_index(out)
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
        found = LATENTS.read_index(out)
        assert {**found, "made": 0} == {**index, "made": 0} == {**json.loads(json.dumps(again)), "made": 0}
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
    assert {**LATENTS.read_index(many), "made": 0} == {**LATENTS.read_index(out), "made": 0}
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
    assert list(LATENTS.read_index(tmp_path / "latents" / "train")["sha256"]) == ["0", "1"]
    (folder / "train" / "b" / "6.png").write_bytes(whole)
    write(folder, tmp_path / "latents", vae)  # one rank continues
    assert len(LatentImages(tmp_path / "latents" / "train")) == 18


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
    assert LATENTS.read_index(tmp_path / "latents" / "train")["sha256"] == {}
    write(folder, tmp_path / "bfloat16", large, dtype="bfloat16")
    assert LatentImages(tmp_path / "bfloat16" / "train").statistics["std"][0] > 1e4


def test_too_small_a_disk_is_refused_before_the_work(folder, tmp_path, vae, monkeypatch):
    monkeypatch.setattr(blocks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 5 * ITEM))
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
