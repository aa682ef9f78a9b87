"""From a configuration to training times, sampling grids and what a run records of its spectrum file."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from denoiser import LogitNormal
from sampler import uniform_grid
from spectral_ops.schedule import TightSchedule
from tests.conftest import few_digits
from tools.measure_spectrum import measure
from util.config import resolve
from util.data.spectrum_file import load_spectrum, save_spectrum
from util.errors import UserError
from util.rng import CounterRNG
from util.schedules import (
    SampleSchedules,
    build_time_sampler,
    other_images_warnings,
    record_spectrum,
    spectrum_warnings,
)

CPU, GRIDS = torch.device("cpu"), ("uniform", "spectral_global", "spectral_instance")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two spectrum files of the digits at 16 pixels, of 40 and of 39 images."""
    paths = [tmp_path_factory.mktemp("spectrum") / name for name in ("a.npz", "b.npz")]
    for path, count in zip(paths, (40, 39), strict=True):
        spectrum = measure(few_digits(16), np.arange(count))
        spectrum.meta["split"] = "train"
        save_spectrum(spectrum, path)
    return paths


@pytest.fixture
def make(files):
    """Return configurations with the first spectrum file."""
    return lambda **given: resolve({"dataset": "digits", "img_size": 16, "spectrum_file": str(files[0]), **given})


def test_each_time_sampler_is_that_of_its_name(make, files):
    rng, x = CounterRNG(3, 5, torch.arange(6)), torch.stack([few_digits(16)[i][0] for i in range(6)]) / 127.5 - 1
    spectrum, u = load_spectrum(files[0], 16, 10), rng.uniform("time", 2)[:, 0]
    assert build_time_sampler(make(P_mean=0.5), CPU) == LogitNormal(0.5, 0.8)
    settings = {"t_uniform_mix": 0.0, "spectral_variant": "frequency", "spectral_delta": 0.2}
    schedule = {"variant": "frequency", "delta": 0.2}
    expected = {"uniform": u, "spectral_global": spectrum.schedule(**schedule).time(u)}
    expected["spectral_instance"] = TightSchedule.of_fits(torch.from_numpy(spectrum.fits[:6]), 16, **schedule).time(u)
    for name, times in expected.items():
        sampler = build_time_sampler(make(t_sampler=name, **settings), CPU)
        torch.testing.assert_close(sampler.for_images(x).sample(rng), times, rtol=1e-4, atol=1e-5)
        assert sampler.cdf(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, 1])


def test_a_spectrum_of_other_images_is_named(make):
    """Folders of images share the default name of their spectrum file."""
    labels = np.asarray(few_digits(16).labels)
    changed = labels.copy()
    changed[:2] = (labels[:2] + 1) % 10
    for settings in ({"t_sampler": "spectral_global"}, {"sf_schedule": "snr"}, {"resolution_schedule": "spectrum"}):
        assert other_images_warnings(make(**settings), labels) == []
        for other, count in ((changed, 2), (labels[:30], 10)):
            assert f"{count} of its 40 are missing" in other_images_warnings(make(**settings), other)[0]
    assert other_images_warnings(make(spectrum_file="/nowhere"), changed) == []


def test_recorded_settings(make, files):
    spectrum = load_spectrum(files[0], 16, 10)
    plain = make(spectrum_file="/nowhere")
    assert record_spectrum(plain, None) == plain
    snr = record_spectrum(make(sf_schedule="snr"), None)
    assert snr.sf_power == spectrum.power.tolist() and snr.spectrum_sha256 is snr.schedule_delta is None
    budget = record_spectrum(make(sf_schedule="budget"), None)
    assert budget.sf_power == spectrum.dct_power.tolist() and np.shape(budget.sf_power) == (3, 11)
    assert record_spectrum(make(sf_schedule="snr", disable_dct_patchify=True), None).sf_power is None
    config = record_spectrum(make(t_sampler="spectral_instance", spectral_delta=0.2), None)
    assert (config.schedule_delta, config.schedule_level) == (0.2, spectrum.level.tolist())
    assert config.spectrum_sha256 == spectrum.sha256 and config.sf_power is None
    assert record_spectrum(config, config.as_dict()) == config and spectrum_warnings(config) == []
    other = replace(config, spectrum_file=str(files[1]))
    assert "b.npz, which is not the spectrum file" in spectrum_warnings(other)[0]
    with pytest.raises(UserError, match=rf"b.npz is not .* trained with \(sha256 {spectrum.sha256}"):
        record_spectrum(other, config.as_dict())
    resumed = replace(snr, spectrum_file="/nowhere")  # it has its power already
    assert record_spectrum(resumed, resumed.as_dict()) == resumed
    with pytest.raises(UserError, match="does not exist"):
        record_spectrum(make(sampling_grid="spectral_global", spectrum_file="/nowhere"), None)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("cond", [None, 0.1])
def test_grids_depend_on_seed_index_and_label_alone(make, grid, cond):
    schedules = SampleSchedules.from_config(replace(make(sampling_grid=grid, spectral_delta=0.3), schedule_delta=cond))
    y, rngs = torch.arange(6), [CounterRNG(seed, 0, torch.arange(6)) for seed in (7, 8)]
    (whole, ranges), (other, _) = (schedules.times(6, rng, y) for rng in rngs)
    part, of_part = schedules.times(6, CounterRNG(7, 0, torch.tensor([4, 1])), y[[4, 1]])
    if grid == "spectral_instance":
        assert whole.shape == (7, 6) and torch.equal(part, whole[:, [4, 1]]) and not torch.equal(other, whole)
        assert not torch.equal(schedules.times(6, rngs[0], y.flip(0))[0], whole)
    else:
        assert whole.shape == (7,) and torch.equal(part, whole) and torch.equal(other, whole)
        assert torch.equal(whole, uniform_grid(6)) == (grid == "uniform")
    assert (whole.diff(dim=0) > 0).all() and (ranges is None) == (cond is None)
    clamp = schedules.t_eps(0.05)
    assert (clamp == 0.05) if grid == "uniform" else (1 - whole[-2]).min() >= clamp > 0
    if cond:  # drawn on every grid, with the delta of training
        assert torch.equal(of_part, ranges[[4, 1]]) and len(ranges.unique(dim=0)) == 6
        same = replace(schedules.config, sampling_grid="spectral_instance", spectral_delta=cond)
        drawn = SampleSchedules.from_config(same).times(6, rngs[0], y)[0]
        torch.testing.assert_close(torch.sigmoid(ranges / 2), drawn[[1, -2]].T)


def test_names_and_descriptions_differ_where_images_do(make, files):
    uniform = make(spectrum_file="/nowhere")
    assert (SampleSchedules.from_config(uniform).name, SampleSchedules.from_config(uniform).describe()) == ("", {})
    configs = [make(sampling_grid=grid) for grid in GRIDS[1:]]
    configs += [replace(configs[0], spectral_variant="power"), replace(configs[0], spectral_delta=0.2)]
    configs += [replace(make(), schedule_delta=0.1)]
    configs += [replace(config, spectrum_file=str(files[1])) for config in configs]
    schedules = [SampleSchedules.from_config(config) for config in configs]
    assert len({s.name for s in schedules}) == len({str(s.describe()) for s in schedules}) == len(configs)
    assert schedules[0].name == f"-spectral_global-mixed-delta0.1-{schedules[0].spectrum.sha256[:8]}"
