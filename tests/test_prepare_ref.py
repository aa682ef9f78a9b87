"""prepare_ref.py: what it writes, with one rank and with several, and every refusal."""

import re
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_ref
from spectral_ops.spectrum import grey_spectrum
from tests.util.evaluation.colours import Colours, SpatialColours
from tests.util.evaluation.toy import fork_ranks
from util.data.datasets import build_dataset
from util.data.images import Subset
from util.dist.context import DistContext
from util.evaluation.features import SPATIAL
from util.evaluation.formulas import frechet_distance
from util.evaluation.reference import load_reference


@pytest.fixture
def colours(monkeypatch):
    metric = replace(prepare_ref.EXTRACTORS["inception"], extractor=Colours)
    monkeypatch.setitem(prepare_ref.EXTRACTORS, "inception", metric)


def load(path):
    return load_reference(path, "digits", 32, Colours(), "inception_2048")


def test_prepare_ref_writes_what_numpy_computes(tmp_path, colours, capsys):
    out = tmp_path / "digits.npz"
    arguments = ["--dataset", "digits", "--num_images", "70", "--batch_size", "32", "--device", "cpu"]
    arguments += ["--num_features", "20", "--out", str(out)]
    assert prepare_ref.main(arguments) == 0
    indices = prepare_ref.choose_indices(1797, 70)
    assert len(set(indices)) == 70 and indices == sorted(indices)
    assert set(indices) < set(prepare_ref.choose_indices(1797, 90))
    dataset = build_dataset("digits", None, 32)
    images = torch.stack([dataset[i][0] for i in indices])
    x = Colours()(images)["inception_2048"]
    reference = load(out)
    np.testing.assert_allclose(reference.arrays["mu"], x.double().mean(dim=0), rtol=1e-6)
    np.testing.assert_allclose(reference.arrays["sigma"], np.cov(x.double(), rowvar=False), rtol=1e-5, atol=1e-12)
    assert reference.meta["num_images"] == 70 and reference.meta["subset_seed"] == 0
    assert reference.meta["dataset"] == "digits" and "torch" in reference.meta["versions"]
    assert torch.equal(reference.arrays["features"], x[prepare_ref.choose_features(70, 20)])
    assert reference.meta["num_features"] == 20 and reference.meta["features_seed"] == 1
    np.testing.assert_allclose(reference.arrays["grey_spectrum"], grey_spectrum(images).mean(dim=0), rtol=1e-9)
    printed = capsys.readouterr().out
    assert str(out) in printed and reference.sha256 in printed

    assert prepare_ref.main(arguments) == 2  # it exists
    assert "--overwrite" in capsys.readouterr().err
    assert prepare_ref.main([*arguments, "--overwrite", "--num_features", "0"]) == 0
    again = load(out)
    assert again.arrays.keys() == {"mu", "sigma", "grey_spectrum"} and again.meta["num_features"] == 0


def test_the_images_whose_features_are_stored_are_a_fixed_random_subset():
    """A smaller one is a part of it; it has all images if there are fewer."""
    stored = prepare_ref.choose_features(1000, 50)
    assert stored == sorted(set(stored)) and len(stored) == 50 and 0 <= stored[0] < stored[-1] < 1000
    assert abs(np.mean(stored) - 500) < 150 and set(prepare_ref.choose_features(1000, 20)) < set(stored)
    assert prepare_ref.choose_features(30, 10_000) == list(range(30)) and prepare_ref.choose_features(30, 0) == []


def test_the_parts_of_more_ranks_than_batches_are_the_whole(ranks=5, count=60):
    args = Namespace(batch_size=16, num_workers=0, extractor="inception")
    indices, stored = prepare_ref.choose_indices(1797, count), prepare_ref.choose_features(count, 25)
    work = (build_dataset("digits", None, 32), indices, stored, Colours(), args)
    whole, *parts = (
        prepare_ref.compute(*work, DistContext(r, n)) for r, n in [(0, 1), *((r, ranks) for r in range(ranks))]
    )
    merged, *others = parts
    for other in others:
        merged.merge(other)
    assert merged.moments[""].n == count
    ours, theirs = (statistics.finish_moments() | {"grey": statistics.grey} for statistics in (merged, whole))
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-9, atol=1e-12)
    assert torch.equal(merged.features, whole.features) and len(whole.features) == 25


@pytest.fixture
def halves(monkeypatch):
    """The first 100 digits are the split train, 300 others the split val."""
    monkeypatch.setattr(prepare_ref, "build_dataset", lambda name, path, size, split, *rest: part_of(split, size))


def part_of(split: str, size: int = 32) -> Subset:
    return Subset(build_dataset("digits", None, size), np.arange(100) if split == "train" else np.arange(600, 900))


def test_distances_of_heldout_images_are_stored(tmp_path, colours, halves, monkeypatch, capsys):
    """Of the first images of a fixed permutation, for sFID as well, without spectra; none for other parts or wishes."""
    spectra = []
    monkeypatch.setattr(prepare_ref, "grey_spectrum", lambda x: spectra.append(len(x)) or grey_spectrum(x))
    monkeypatch.setitem(
        prepare_ref.EXTRACTORS, "inception", replace(prepare_ref.EXTRACTORS["inception"], extractor=SpatialColours)
    )
    out = tmp_path / "r.npz"
    arguments = ["--dataset", "digits", "--batch_size", "32", "--device", "cpu", "--out", str(out), "--overwrite"]
    assert prepare_ref.main([*arguments, "--heldout_counts", "200", "60"]) == 0
    reference = load_reference(out, "digits", 32, SpatialColours(), "inception_2048")
    images = torch.stack([image for image, _ in part_of("val")])[np.random.RandomState(0).permutation(300)]
    assert sum(spectra) == 100  # not of the held-out images
    keys = ("heldout_split", "heldout_images", "heldout_counts")
    assert [reference.meta[key] for key in keys] == ["val", 300, [60, 200]]
    for suffix, stream in (("", "inception_2048"), ("_s", SPATIAL)):
        table, mu, sigma = (f"{name}{suffix}" for name in ("heldout", "mu", "sigma"))
        distances = reference.heldout(table)
        assert list(distances) == [60, 200]
        for count, distance in distances.items():
            x = SpatialColours()(images[:count])[stream]
            expected = frechet_distance(x, reference.arrays[mu], reference.arrays[sigma])
            assert distance == pytest.approx(expected, rel=1e-4)
    assert prepare_ref.main(arguments) == 0  # fewer than 500 images
    assert load(out).heldout("heldout") == {} and load(out).meta["heldout_images"] == 300
    for words in (("--heldout_split", "none"), ("--split", "test")):
        assert prepare_ref.main([*arguments, *words]) == 0
        assert load(out).heldout("heldout") == {} and load(out).meta["heldout_split"] is None
    capsys.readouterr()
    for words, message in {
        ("--heldout_counts", "301"): "the split val has 300 images",
        ("--heldout_counts", "1"): "at least 2, not 1",
        ("--heldout_split", "train"): "would not be held out",
    }.items():
        assert prepare_ref.main([*arguments, *words]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--split val --heldout_split test", "--split val"),  # the same images
        ("--split test --heldout_counts 60", "--split test"),
        ("--vae folder --heldout_split test", "--vae"),
        ("--extractor clip_vit_l_14_336px --heldout_counts 60", "--extractor clip_vit_l_14_336px"),
        ("--heldout_split none --heldout_counts 60", "--heldout_split none"),
    ],
)
def test_heldout_flags_that_would_do_nothing_are_refused(tmp_path, capsys, words, flag):
    arguments = ["--dataset", "cifar10", "--device", "cpu", "--out", str(tmp_path / "r.npz"), *words.split()]
    assert prepare_ref.main(arguments) == 2
    assert f"{flag} stores no distances of held-out images" in capsys.readouterr().err


def test_heldout_images_that_cannot_be_opened_are_a_warning_unless_they_are_asked_for(here, colours, capsys):
    """ImageNet's validation images without folders of classes."""
    for i in range(4):
        for folder in (here / "data" / "train" / "class0", here / "data" / "val"):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(folder / f"{i:02d}.png")
    arguments = ["--dataset", "imagefolder", "--data_path", "data", "--img_size", "32", "--num_workers", "0"]
    arguments += ["--device", "cpu", "--out", "r.npz", "--overwrite"]
    assert prepare_ref.main(arguments) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: no distances of held-out images: ") and "holds no class folders" in warning
    assert prepare_ref.main([*arguments, "--heldout_split", "val"]) == 2
    assert "prepare_ref.py: " in (error := capsys.readouterr().err) and "holds no class folders" in error


def test_two_ranks_write_what_one_writes(tmp_path, colours, halves):
    arguments = ["--dataset", "digits", "--num_features", "40", "--batch_size", "16", "--heldout_counts", "20", "50"]
    arguments += ["--device", "cpu", "--out"]
    two, one = tmp_path / "two.npz", tmp_path / "one.npz"
    done = fork_ranks(2, tmp_path, lambda: prepare_ref.main([*arguments, str(two)]))
    assert [code for code, _ in done] == [0, 0] and str(two) in done[0][1], done
    assert done[1][1] == ""  # rank 0 alone speaks
    assert prepare_ref.main([*arguments, str(one)]) == 0
    one, two = load(one), load(two)
    assert (one.meta["processes"], two.meta["processes"]) == (1, 2)
    assert torch.equal(two.arrays["features"], one.arrays["features"])
    for name, values in one.arrays.items():
        np.testing.assert_allclose(two.arrays[name], values, rtol=1e-8, atol=1e-11)
    assert list(two.heldout("heldout")) == [20, 50]


@pytest.mark.parametrize("broken", [0, 11])
def test_an_error_on_any_rank_ends_all_with_one_sentence(here, colours, broken):
    """An image that one of two ranks cannot read."""
    folder = here / "data" / "train" / "class0"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(folder / f"{i:02d}.png")
    (folder / f"{broken:02d}.png").write_bytes(b"no image")
    arguments = ["--dataset", "imagefolder", "--data_path", "data", "--img_size", "32", "--num_workers", "0"]
    arguments += ["--batch_size", "2", "--device", "cpu", "--out", "r.npz"]
    done = fork_ranks(2, here, lambda: prepare_ref.main(arguments))
    assert [code for code, _ in done] == [2, 2] and not (here / "r.npz").exists()
    (sentence,) = (done[0][1] + done[1][1]).splitlines()
    assert sentence.startswith("prepare_ref.py: ") and f"{broken:02d}.png" in sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digits", "--num_images", "1798"], "1798 must be from 2 to 1797"),
        (["--dataset", "digits", "--num_images", "1"], "1 must be from 2 to 1797"),
        (["--dataset", "digits", "--batch_size", "0"], "--batch_size must be"),
        (["--dataset", "digits", "--num_workers", "-1"], "--num_workers must be"),
        (["--dataset", "digits", "--num_features", "2"], "--num_features must be 0 or at least 4"),
        (["--dataset", "digits", "--device", "abacus"], "--device abacus"),
        (["--dataset", "digits", "--split", "test"], "no split"),
        (["--dataset", "digits", "--heldout_split", "test"], "no split"),
        (["--dataset", "digits", "--heldout_counts", "500"], "no split"),
        (["--dataset", "digits", "--out", "/proc/r.npz"], "The folder /proc cannot be written"),
        (["--dataset", "imagefolder"], "--data_path"),
        (["--dataset", "imagefolder", "--data_path", "nowhere"], "does not exist"),
    ],
)
def test_errors_are_one_sentence(here, colours, capsys, arguments, message):
    out = [] if "--out" in arguments else ["--out", str(here / "r.npz")]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert prepare_ref.main([*arguments, *device, *out]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(message, error[0]), error
    assert list(here.iterdir()) == []


def test_another_split_needs_a_name_and_missing_weights_are_one_sentence(no_network, capsys, monkeypatch, tmp_path):
    assert prepare_ref.main(["--dataset", "cifar10", "--split", "val", "--device", "cpu"]) == 2
    assert "--split val needs --out" in capsys.readouterr().err
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(tmp_path / "none.pth"))
    assert prepare_ref.main(["--dataset", "digits", "--device", "cpu", "--out", str(tmp_path / "r.npz")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "INCEPTION_WEIGHTS" in error[0] and not (tmp_path / "r.npz").exists()
