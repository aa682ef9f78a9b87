"""Spectrum files: they come back as they were written, and files that do not fit are refused."""

import json

import numpy as np
import pytest
import torch

from spectral_ops.schedule import TightSchedule
from tests.conftest import Payload, few_digits
from tools.measure_spectrum import measure
from util.data.spectrum_file import ARRAYS, default_spectrum_file, load_spectrum, save_spectrum
from util.errors import UserError

K = 12  # rings at 16 pixels


@pytest.fixture(scope="module")
def measured():
    spectrum = measure(few_digits(16), np.arange(40))
    spectrum.meta["split"] = "train"
    return spectrum


@pytest.fixture
def written(measured, tmp_path):
    save_spectrum(measured, tmp_path / "new" / "s.npz")
    return tmp_path / "new" / "s.npz"


def test_the_file_comes_back_as_it_was(measured, written):
    back = load_spectrum(written, 16, 10)
    assert all(np.array_equal(getattr(back, name), getattr(measured, name)) for name in ARRAYS)
    assert back.meta == measured.meta and back.path == written and len(back.sha256) == 64
    grid = back.schedule(variant="frequency", delta=0.2).sampling_grid(9)
    power, centred = torch.from_numpy(measured.power), torch.from_numpy(measured.centred)
    assert grid.equal(TightSchedule.of_spectrum(power, centred, 16, variant="frequency", delta=0.2).sampling_grid(9))
    assert back.distribution().covariance.shape == (10, 4, 4)
    assert default_spectrum_file("cifar10", 32).parts[-2:] == ("fid_stats", "cifar10_32_spectrum.npz")


def rewrite(path, meta=None, **changes):
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    text = json.dumps({k: v for k, v in (json.loads(str(content["meta"])) | (meta or {})).items() if v is not None})
    content |= changes | {"meta": np.array(text)}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"power": np.full(K, np.nan)}, "power in .* is no spectrum"),
        ({"centred": np.zeros(K)}, "centred in .* is no spectrum; expected 12 numbers above 0"),
        ({"power": np.ones(13)}, "power in .* is no spectrum"),
        ({"low": None}, "is not an npz of"),
        ({"meta": {"img_size": 32}}, "img_size 32 and this run has 16"),
        ({"meta": {"class_num": 3}}, "class_num 3 and this run has 10"),
        ({"meta": {"img_size": None}}, "is not an npz of"),
    ],
)
def test_files_that_do_not_fit_are_refused(written, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        load_spectrum(rewrite(written, **changes), 16, 10)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", None])
def test_files_of_another_kind_are_refused(written, content):
    written.write_bytes(written.read_bytes()[:500] if content is None else content)
    with pytest.raises(UserError, match="is not an npz of"):
        load_spectrum(written, 16, 10)


def test_missing_and_unwritable_files(measured, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_spectrum(tmp_path / "missing.npz", 16, 10)
    with pytest.raises(UserError, match="cannot be read"):
        load_spectrum(tmp_path, 16, 10)
    with pytest.raises(UserError, match="cannot be written"):
        save_spectrum(measured, "/dev/null/no.npz")


def test_pickled_content_is_not_loaded(written, tmp_path):
    hostile = np.array([Payload(tmp_path / "marker")] * K, dtype=object)
    with pytest.raises(UserError, match="is not an npz of"):
        load_spectrum(rewrite(written, power=hostile), 16, 10)
    assert not (tmp_path / "marker").exists()


def test_a_flipped_bit_is_noticed_or_changes_nothing(written):
    content, expected = written.read_bytes(), load_spectrum(written, 16, 10)
    for i in range(0, len(content), 5):
        written.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        try:
            found = load_spectrum(written, 16, 10)
        except UserError:
            continue
        assert found.meta == expected.meta and all((getattr(found, n) == getattr(expected, n)).all() for n in ARRAYS)
