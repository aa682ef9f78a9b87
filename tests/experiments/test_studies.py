"""The studies: data with a known best denoiser, arms, what is measured, the runner, tables and figures."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
import torch.nn.functional as F

from denoiser import Denoiser
from experiments import (
    arms,
    data,
    few_steps,
    figures,
    principle,
    resolution,
    results,
    run,
    samples,
    studies,
    synthetic,
    train,
)
from experiments.arms import ARMS, input_operator
from experiments.train import Run
from sampler import SOLVERS, evaluations
from spectral_forcing import SpectralForcing, dct_rings, num_rings
from util.data import spectrum_file
from util.errors import UserError
from util.io import REPOSITORY

N = synthetic.SIZE


class Pixels:
    """Stands in for the feature network: the mean of each channel in each quarter of an image."""

    def __call__(self, images):
        return {"effnet_lite0": F.adaptive_avg_pool2d(images.float(), 2).flatten(1)}


@pytest.fixture(autouse=True)
def cifar10_of_noise(monkeypatch):
    """A stand-in for CIFAR-10, which may not be here: smooth random images in three correlated channels."""
    rng = np.random.RandomState(0)
    k = np.maximum(np.hypot(*np.mgrid[:32, :32]), 1)
    grey = scipy.fft.idctn(rng.randn(5200, 1, 32, 32) / k, axes=(2, 3), norm="ortho")
    colour = scipy.fft.idctn(rng.randn(5200, 3, 32, 32) / k, axes=(2, 3), norm="ortho")
    images = torch.from_numpy(np.clip(128 + 400 * grey + 100 * colour, 0, 255).astype(np.uint8))
    labels = torch.arange(5200) % 10
    monkeypatch.setattr(data.Cifar10, "_load", staticmethod(lambda split: (images, labels)))
    monkeypatch.setattr(samples, "EffNetLite0", Pixels)
    caches = [data.open_data, data.dct_ring_power, data.fft_ring_power]
    caches += [samples.extractor, samples.real_features, samples.real_spectrum]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


# --- data whose best denoiser is known ------------------------------------------------------------------------------


def covariance(images: synthetic.GaussianImages, c: int) -> np.ndarray:
    basis, variance = images.basis[c].numpy(), images.variance[c].numpy()
    return (basis * variance) @ basis.T


def test_essential_is_low_modes_and_their_product_with_a_carrier():
    """Built image by image with scipy: each low mode, plus its product with the carrier, scaled to 30% of all power."""
    images, c = data.open_data("essential"), 1
    k = np.maximum(np.hypot(*np.mgrid[:N, :N]) / 2, 0.5)
    power = k**-3.0
    power *= 0.7 * synthetic.VARIANCE / power.mean()
    carrier = np.zeros((N, N))
    carrier[synthetic.CARRIERS[c]] = 1
    carrier = scipy.fft.idctn(carrier, norm="ortho")
    low = scipy.fft.idctn(
        np.sqrt(power)[:, :, None, None] * np.eye(N * N).reshape(N, N, N, N), axes=(2, 3), norm="ortho"
    )
    copied = np.zeros_like(low)
    copied[:8, :8] = low[:8, :8] * carrier
    copied *= math.sqrt(0.3 * synthetic.VARIANCE / (copied**2).sum((0, 1)).mean())
    total = (low + copied).reshape(N * N, N * N)
    np.testing.assert_allclose(covariance(images, c), total.T @ total, atol=1e-10)


def test_noise_has_the_power_of_essential_in_each_mode_and_no_correlation():
    noise, essential = data.open_data("noise"), data.open_data("essential")
    for found, expected in zip(noise.mode_power(), essential.mode_power(), strict=True):
        torch.testing.assert_close(found, expected)
    modes = [
        scipy.fft.dctn(covariance(x, 0).reshape(N, N, N, N), axes=(0, 1), norm="ortho") for x in (noise, essential)
    ]
    modes = [scipy.fft.dctn(m, axes=(2, 3), norm="ortho").reshape(N * N, N * N) for m in modes]
    off = [np.abs(m - np.diag(np.diag(m))).max() for m in modes]
    assert off[0] < 1e-10 and off[1] > 1e-3
    high = noise.variance[0].view(N, N)[16:32, 8:24].sum() / noise.variance[0].sum()
    assert 0.3 < high < 0.32  # the copy is there, and a little of the low part


@pytest.mark.parametrize("kind", ["power2", "floor", "essential"])
def test_posterior_mean_is_gaussian_conditioning(kind):
    images = data.open_data(kind)
    x, y = images.batch(0, 0, 6)
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    z = t.view(-1, 1, 1, 1) * x + (1 - t.view(-1, 1, 1, 1)) * e
    found = images.posterior_mean(z, t, y)
    for i in range(6):
        c, time = covariance(images, y[i]), float(t[i])
        mean = images.mean[y[i]].numpy()
        gain = time * c @ np.linalg.pinv(time**2 * c + (1 - time) ** 2 * np.eye(N * N), hermitian=True)
        expected = mean + gain @ (z[i].double().numpy().ravel() - time * mean)
        np.testing.assert_allclose(found[i].numpy().ravel(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_batches_and_the_least_loss(kind):
    images = data.open_data(kind)
    x, y = images.batch(3, 7, 512)
    again, _ = images.batch(3, 7, 300)
    assert torch.equal(x[:300], again) and set(y.tolist()) == {0, 1, 2, 3}
    assert not torch.equal(x, images.batch(3, 8, 512)[0]) and not torch.equal(x, images.batch(4, 7, 512)[0])
    centred = x.double().flatten(1) - images.mean[y]
    assert centred.square().mean().item() == pytest.approx(images.variance.mean().item(), rel=0.1)  # mostly few modes
    assert x.double().flatten(1).square().mean().item() == pytest.approx(0.35 + 0.01 * (kind == "floor"), rel=0.1)
    t = torch.full((512,), 0.6)
    z = 0.6 * x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    error = (images.posterior_mean(z, t, y) - x).square().mean().item()
    assert error == pytest.approx(images.least_loss(t[:1]).item(), rel=0.05)


def test_names():
    with pytest.raises(ValueError, match="'power4' must be one of power1"):
        synthetic.GaussianImages("power4")
    with pytest.raises(ValueError, match="cifar10"):
        data.open_data("cifar100")


# --- arms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["power3", "cifar10"])
def test_controls_have_the_loudness_that_they_promise(name):
    x, _ = data.open_data(name).batch(1, 0, 500)
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for value in (0.1, 0.5, 0.9):
        t = torch.full((500,), value)
        z = value * x + (1 - value) * e
        scale, linear = (input_operator(ARMS[arm], name)(z, t).square().mean().item() for arm in ("scale", "linear"))
        assert scale == pytest.approx(linear, rel=0.06)
        for arm in ("unit", "linear_unit", "snr0.1_unit"):
            seen = input_operator(ARMS[arm], name)(z, t)
            assert seen.square().mean().sqrt().item() == pytest.approx(1, rel=0.03)
    ratio = input_operator(ARMS["scale"], name)(z, t) / z
    assert ratio.amax().item() == pytest.approx(ratio.amin().item(), rel=1e-4)


def test_wiener_gain_is_the_best_linear_prediction():
    """t times the gain of x: with it the best prediction is t z / ... of each mode; 0 at t = 0 and 1 at t = 1."""
    operator, (variance, _) = input_operator(ARMS["wiener"], "power2"), data.open_data("power2").mode_power()
    z = torch.randn(3, 1, N, N, generator=torch.Generator().manual_seed(0))
    seen = operator(z, torch.tensor([0.0, 0.4, 1.0]))
    assert seen[0].abs().max() == 0 and torch.allclose(seen[2], z[2], atol=1e-5)
    power = variance[0].numpy() * (0.4 / 0.6) ** 2
    expected = scipy.fft.idctn(scipy.fft.dctn(z[1, 0].numpy(), norm="ortho") * power / (1 + power), norm="ortho")
    np.testing.assert_allclose(seen[1, 0].numpy(), expected, atol=1e-5)


def test_arms_start_from_the_same_weights():
    plain = train.build_denoiser(Run("cifar10", 8, "plain", 3))
    x = torch.randn(2, 3, N, N)
    for arm in ARMS:
        other = train.build_denoiser(Run("cifar10", 8, arm, 3))
        for name, parameter in plain.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name))
        if not {"input", "unit", "levels"} & ARMS[arm].keys():  # the correction of blocks is zero at first
            t, y = torch.tensor([0.3, 0.8]), torch.tensor([1, 2])
            assert torch.equal(other.velocity(x, t, y), plain.velocity(x, t, y))
    assert not torch.equal(
        next(plain.parameters()), next(train.build_denoiser(Run("cifar10", 8, "plain", 4)).parameters())
    )
    with pytest.raises(ValueError, match="'blur'"):
        input_operator({"input": "blur"}, "power2")


# --- what is measured -----------------------------------------------------------------------------------------------


def test_rings_add_up_to_the_mean_square():
    residual = torch.randn(4, 3, N, N)
    modes = dct_rings(N)[1]
    rings = train.by_ring(residual)
    assert (rings * modes).sum().item() / N**2 == pytest.approx(residual.square().mean().item(), rel=1e-5)
    wave = torch.zeros(N, N)
    wave[6, 8] = 1  # hypot(6, 8) / 2 = 5
    wave = torch.from_numpy(scipy.fft.idctn(wave.numpy(), norm="ortho"))
    assert (train.by_ring(wave[None, None]) > 1e-9).nonzero().tolist() == [[5]]


class Best(torch.nn.Module):
    """Predicts the posterior mean, plus a constant."""

    def __init__(self, images, offset=0.0):
        super().__init__()
        self.images, self.offset = images, offset

    def forward(self, z, t, y):
        return (self.images.posterior_mean(z, t, y) + self.offset).float()


def test_excess_is_the_distance_to_the_best_prediction():
    settings = Run("essential", 16, "plain", 0, images=8, times=4)
    images = data.open_data("essential")
    best = train.measure(Denoiser(Best(images)), settings)
    assert np.abs(best["excess"]).max() < 1e-9
    off = results.table_of({"run": asdict(settings), **train.measure(Denoiser(Best(images, 0.1)), settings)})  # (T, K)
    times = (np.arange(4) + 0.5) / 4
    np.testing.assert_allclose(off.sum(1), 0.01 / (1 - times) ** 2, rtol=1e-3)
    assert off[:, 0].sum() == pytest.approx(off.sum(), rel=1e-4)  # a constant is of ring 0


def test_loss_is_that_of_training():
    settings = Run("cifar10", 16, "linear", 0, images=12, times=5)
    denoiser = train.build_denoiser(settings).eval()
    found = train.measure(denoiser, settings)
    assert found["least"] is None
    x, y = data.open_data("cifar10").held_out(12)
    t = torch.full((12,), 0.5)
    noise = train.CounterRNG(0, 2, torch.arange(12)).normal("validation", x[0].numel()).view_as(x)
    with torch.no_grad():
        expected = denoiser(x, y, t, noise).item()
    assert results.table_of({"run": asdict(settings), **found}).sum(1)[2] == pytest.approx(expected, rel=1e-4)


def test_training_is_reproducible_and_says_when_it_diverges():
    settings = Run("power2", 16, "linear", 1, steps=6, images=8, times=4)
    assert run.do(settings)["excess"] == run.do(settings)["excess"]
    assert run.do(settings)["excess"] != run.do(replace(settings, seed=2))["excess"]
    with pytest.raises(FloatingPointError, match="not finite at step 6"):
        train.train(replace(settings, lr=math.inf, steps=7, batch=2))


def test_density_is_that_of_training_times():
    t = torch.sigmoid(-0.8 + 0.8 * torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    counted = torch.histc(t, 20, 0, 1) / len(t)
    torch.testing.assert_close(train.density(20).float(), counted, atol=3e-3, rtol=0)


# --- the runner -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Results and output in a folder of the test, and runs in this process."""
    monkeypatch.setattr(run, "REPOSITORY", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda n, *settings: ThreadPoolExecutor(1))
    return tmp_path


TOY = studies.Study("?", ("power2", "cifar10"), (16,), ("plain", "linear"), seeds=(0, 1, 2), steps=(2,), images=4)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", studies.STUDIES)
def test_quick(here, name, capsys, monkeypatch):
    """Each study, a few runs of it, with its table."""
    whole = studies.STUDIES[name]
    assert len({json.dumps(asdict(r)) for r in whole.runs()}) == len(whole.runs())
    chosen = replace(whole, arms=whole.arms[:2], data=whole.data[:1], lr=whole.lr[:1])
    monkeypatch.setitem(studies.STUDIES, name, chosen)
    assert run.main([name, "--quick", "--device", "cpu"]) == 0
    lines = lines_of(here / "output" / "quick" / f"{name}.jsonl")
    assert len(lines) == len(chosen.runs(quick=True))
    assert all(math.isfinite(x) for line in lines for x in results.numbers(line).values())
    assert {"commit", "hardware", "date", "versions", "command", "train_s"} <= lines[0].keys()
    capsys.readouterr()
    assert results.main([name, "--quick", "--against", whole.arms[0]]) == 0
    out = capsys.readouterr().out
    assert f"| {whole.arms[:2][-1]} |" in out and "experiments.run" in out


def test_runs_that_have_a_line_are_not_done_again(here, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "toy", TOY)
    assert run.main(["toy"]) == 0 and "12 runs, 12 of them done now, 0 failed" in capsys.readouterr().out
    path = here / "toy.jsonl"
    whole = lines_of(path)
    path.write_text("\n".join(path.read_text().splitlines()[:5]) + '\n{"run": {"da')  # killed in the sixth
    assert run.main(["toy", "--dry_run"]) == 0
    assert [capsys.readouterr().out.count(word) for word in ("to do",)] == [7]
    assert run.main(["toy"]) == 0
    said = capsys.readouterr()
    assert "7 of them done now" in said.out
    again = lines_of(path)
    key = lambda line: json.dumps(line["run"])  # noqa: E731
    assert [line.get("excess", line.get("loss")) for line in sorted(again, key=key)] == [
        line.get("excess", line.get("loss")) for line in sorted(whole, key=key)
    ]
    assert results.main(["toy"]) == 0
    assert capsys.readouterr().out.count("| linear |") == 2


def test_a_failed_run_is_listed(here, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "toy", TOY)
    do = run.do
    monkeypatch.setattr(run, "do", lambda r, device: do(r, device) if r.seed else [][0])
    assert run.main(["toy"]) == 1 and "4 failed" in capsys.readouterr().out
    assert len(lines_of(here / "toy.jsonl")) == 12
    assert results.main(["toy"]) == 0
    out = capsys.readouterr().out
    assert out.count("failed: data") == 4 and "list index out of range" in out and "| 2 |" in out
    assert run.main(["toy"]) == 0 and "0 of them done now" in capsys.readouterr().out


def test_wrong_input(here, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["nothing"], ["cifar10", "--processes", "0"], ["gpu"]):
        with pytest.raises(SystemExit) as stop:
            run.main(words)
        assert stop.value.code == 2
    assert run.main(["gpu", "--dry_run"]) == 0 and capsys.readouterr().out.count("to do") == 8
    monkeypatch.setitem(studies.STUDIES, "toy", TOY)
    assert results.main(["toy"]) == 2 and "has no results yet" in capsys.readouterr().err
    run.main(["toy"])
    assert results.main(["toy", "--against", "wiener"]) == 2 and "no run of the arm wiener" in capsys.readouterr().err
    monkeypatch.setitem(studies.STUDIES, "toy", replace(TOY, steps=(3,)))
    assert results.main(["toy"]) == 2 and "12 runs of other settings" in capsys.readouterr().err


def test_data_that_is_missing_ends_the_study(here, monkeypatch, capsys):
    def missing(split):
        raise run.DataError("CIFAR-10 is missing: make cifar10")

    monkeypatch.setattr(data.Cifar10, "_load", staticmethod(missing))
    assert run.main(["cifar10", "--quick"]) == 2 and "make cifar10" in capsys.readouterr().err


def test_killed_or_interrupted_no_process_stays(tmp_path):
    """In a copy, in which output/ is its own. Ctrl-C ends with one sentence, and the same command goes on."""
    names = ["experiments", "spectral_ops", "util", "model_jit.py", "denoiser.py", "sampler.py", "spectral_forcing.py"]
    for name in names:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, tmp_path)
    command = [sys.executable, "-m", "experiments.run", "synthetic_long", "--quick", "--processes", "2"]
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
        while len(workers := children.read_text().split()) < 3 and time.monotonic() < deadline:  # one tracks resources
            time.sleep(0.05)
        assert len(workers) == 3
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, "Traceback" in said) == (-9 if number == signal.SIGKILL else 130, False), said
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "interrupted; the same command goes on" in said


# --- tables and figures ---------------------------------------------------------------------------------------------


def test_interval_is_that_of_a_paired_t_test():
    a, b = {0: 1.0, 1: 1.3, 2: 0.9}, {2: 1.0, 0: 1.2, 1: 1.45, 7: 9.0}
    found = results.paired(a, b)
    low, high = scipy.stats.ttest_rel([1.0, 1.3, 0.9], [1.2, 1.45, 1.0]).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(low) and found.mean + found.half == pytest.approx(high)
    assert found.pairs == 3 and found.percent == pytest.approx(100 * -0.15 / 3.65 * 3)
    assert str(results.paired({0: 1.0}, {0: 2.0})) == "-50.0%"
    with pytest.raises(UserError, match="common seed"):
        results.paired({0: 1.0}, {1: 1.0})


def line(arm="plain", seed=0, level=1.0, **changes):
    settings = asdict(Run("cifar10", 16, arm, seed)) | changes
    table = (level * np.ones((20, 22))).tolist()
    return {"run": settings, "loss": table, "commit": "abc", "hardware": "x", "train_s": 1.0, "measure_s": 1.0}


def test_numbers_of_a_table():
    flat = results.numbers(line(level=0.5))
    assert flat["density"] == pytest.approx(0.5) and flat["uniform"] == pytest.approx(0.5)
    u = np.hypot(*np.mgrid[:N, :N]) / 2
    assert flat["low"] == pytest.approx(0.5 * (u < 6).mean())


@pytest.mark.parametrize("name", ["steps", "images", "data", "patch", "lr", "width"])
def test_runs_of_different_settings_are_not_compared(name):
    other = {"steps": 5, "images": 9, "data": "power2", "patch": 8, "lr": 1.0, "width": 4}[name]
    with pytest.raises(UserError, match=f"different {name}"):
        results.compare([line(), line("linear", **{name: other})], "plain")


def test_figures_come_from_the_lines(tmp_path, monkeypatch, capsys):
    def fake(study):
        return [
            line(level=1 + 0.1 * r.seed + 0.2 * (r.arm == "linear")) | {"run": asdict(r), "tflop": 1.0}
            for r in studies.STUDIES[study].runs()
        ], []

    monkeypatch.setattr(figures, "load", fake)
    monkeypatch.setattr(resolution, "load", fake)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    points = [
        {"data": kind, "arm": arm, "hidden_noise": 0.5, "lost_percent": {"hard": 1.0}}
        for kind in principle.DATA
        for arm in principle.CUTOFFS
    ]
    (tmp_path / "principle.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    assert figures.main(["--out", str(tmp_path / "figures")]) == 0
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == set(figures.FIGURES)
    (tmp_path / "principle.jsonl").unlink()
    assert figures.main(["--out", str(tmp_path / "fewer")]) == 0
    assert "lost_and_hidden.png is left out" in capsys.readouterr().err


def test_levels_are_compared_with_plain_steps_at_their_cost(monkeypatch, tmp_path, capsys):
    def fake(study):
        if study in ("cifar10_samples", "resolution_samples"):
            arm, steps, distance = ("half", 600, 800.0) if study == "cifar10_samples" else ("levels_half", 1100, 600.0)
            found = {"fd_effnet_lite0": distance, "precision": 0.5, "recall": 0.1, "spectrum_gap": 0.2}
            return [line(arm, seed, steps=steps) | {"samples": [found]} for seed in (0, 1)], []
        if study != "resolution":
            raise UserError("not run")
        made = [("plain", 600, 1.0, 10.0), ("levels", 600, 0.8, 5.0), ("levels", 1200, 0.7, 10.5)]
        runs = [(patch, seed, *run) for patch in (4, 8) for seed in (0, 1) for run in made]
        return [
            line(arm, seed, level + seed, patch=patch, steps=steps) | {"tflop": cost}
            for patch, seed, arm, steps, level, cost in runs
        ], []

    monkeypatch.setattr(resolution, "load", fake)
    found = resolution.by_cost(resolution.lines_of(4))
    assert list(found) == [("plain", 600), ("levels", 600), ("levels", 1200)]
    assert found["levels", 1200]["operations"] == pytest.approx(1.05)
    assert found["levels", 600]["density"].percent == pytest.approx(-100 * 0.2 / 1.5)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert resolution.main([]) == 0
    said = capsys.readouterr().out
    assert said.count("| levels | 1200 | 1.05 | - | -20.0% ± 0.0 |") == 2
    assert "| levels_half | 1100 | 600 | -25.0% ± 0.0 | 0.500 (+0.000 ± 0.000) |" in said
    seconds = {"plain": [4.0, 2.0], "levels": [1.0, 1.0]}
    monkeypatch.setattr(resolution, "step_time", lambda of: seconds[of.arm][of.patch // 8])
    monkeypatch.setattr(resolution, "ARMS", ("plain", "levels"))
    assert resolution.main(["--time"]) == 0
    said = capsys.readouterr().out
    assert "| levels | 1200 | 1.05 | 0.50 |" in said and "| levels | 1200 | 1.05 | 1.00 |" in said
    monkeypatch.setattr(resolution, "load", lambda study: ([line(patch=8, steps=600)], []))
    assert resolution.main([]) == 2 and "no run of plain JiT at patch 4" in capsys.readouterr().err


def test_savings_with_the_spectrum_of_other_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resolution, "MODELS", ("JiT-Ti/4", "JiT-B/32"))
    k = np.maximum(np.arange(len(dct_rings(64)[1])), 1)
    meta = {"img_size": 64, "class_num": 3}
    fourier = np.ones(num_rings(64))
    arrays = {name: np.ones(3) for name in spectrum_file.ARRAYS} | {"power": fourier, "centred": fourier}
    np.savez(tmp_path / "x.npz", meta=np.array(json.dumps(meta)), dct_power=np.stack([400.0 / k**2.7] * 3), **arrays)
    assert resolution.main(["--spectrum", str(tmp_path / "x.npz")]) == 0
    header, _, one, two = capsys.readouterr().out.splitlines()
    assert header.startswith("| 64 px: levels") and one.startswith("| 1 | 0.") and two.startswith("| 2 | 0.")
    assert all(float(ratio) > 1 for ratio in one.split("|")[3:5]) and two.endswith(" | - |")
    assert resolution.main(["--spectrum", str(tmp_path / "none.npz")]) == 2
    assert "is no spectrum file" in capsys.readouterr().err


def test_operations_are_those_of_the_steps_and_of_each_level():
    """Of a level with a quarter of the patches: products with patches are a quarter, attention less, embeddings not."""
    plain = train.operations(Run("cifar10", 4, "plain", 0, steps=2))
    assert train.operations(Run("cifar10", 4, "plain", 0, steps=6)) == 3 * plain
    arm = train.time_sampler(ARMS["levels"], "cifar10", train.CPU)
    share = sum(0.25**level for level in arm.levels) / 8
    assert resolution.step_time(Run("cifar10", 16, "plain", 0), 1, 3) > 0
    found = train.operations(Run("cifar10", 4, "levels", 0, steps=2))
    assert found / plain == pytest.approx(share, abs=0.03)


# --- in principle ---------------------------------------------------------------------------------------------------


def test_nothing_is_lost_where_nothing_is_hidden_and_all_where_all_is():
    variance, second = data.open_data("power2").mode_power()
    times = torch.tensor([0.2, 0.6])
    found = principle.readings(SpectralForcing(N, c_min=9.0, c_max=9.0), variance, second, times)
    for name in ("hard", "gain1", "gain10"):
        torch.testing.assert_close(found[name], found["least"])
    torch.testing.assert_close(
        found["least"], data.open_data("power2").least_loss(times) / (1 - times.double()) ** 2, rtol=0.3, atol=0
    )  # the class is unknown here, and its mean part of the variance
    closed = principle.readings(SpectralForcing(N, c_min=-9.0, c_max=-9.0), variance, second, times)
    torch.testing.assert_close(closed["hard"], variance.mean() / (1 - times.double()) ** 2)
    torch.testing.assert_close(closed["gain1"], closed["hard"], rtol=1e-6, atol=0)


def test_rounding_to_a_mantissa():
    x = torch.tensor([1.0, 1 + 2**-8, 1 + 2**-7, 3.14159, -1e-30], dtype=torch.float64)
    torch.testing.assert_close(principle.round_to(x, 8), x.to(torch.bfloat16).double(), rtol=0, atol=0)
    torch.testing.assert_close(principle.round_to(x, 24), x.float().double(), rtol=0, atol=0)
    torch.testing.assert_close(principle.round_to(x, 11)[:4], x.half().double()[:4], rtol=0, atol=0)


def test_costs_agree_with_values_that_are_known():
    """Linear cutoff, power 1/k: 79% of the noise is hidden, and 0.02% and 0.79% are lost in float32 and bf16."""
    found = principle.costs("power1", "linear")
    assert found["hidden_noise"] == pytest.approx(0.79, abs=0.005)
    assert found["lost_percent"]["float32"] == pytest.approx(0.02, abs=0.002)
    assert found["lost_percent"]["bf16"] == pytest.approx(0.79, rel=0.1)
    assert found["lost_percent"]["hard"] == pytest.approx(4.2, rel=0.1)
    assert principle.costs("power2", "linear")["lost_percent"]["hard"] == pytest.approx(0.49, rel=0.1)


# --- few steps ------------------------------------------------------------------------------------------------------


def test_density_of_half_of_the_draws():
    sampler, rng = arms.HalfUniform(), train.CounterRNG(0, 0, torch.arange(50_000))
    t, edges = sampler.sample(rng), torch.linspace(0, 1, 11, dtype=torch.float64)
    counted = torch.histc(t, 10, 0, 1).double() / len(t)
    torch.testing.assert_close(sampler.cdf(edges).diff(), counted, atol=6e-3, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_use_up_the_evaluations(solver):
    for count in (1, 8, 9, 64):
        steps = few_steps.steps_for(solver, count)
        assert evaluations(solver, steps) <= count < evaluations(solver, steps + 1)


def test_own_gap_is_the_one_of_the_exact_solver():
    """Against the schedule's own prediction of a fine grid: next to nothing is left."""
    gaps = [few_steps.own_gap("heun", "logsnr", steps) for steps in (8, 32)]
    assert 0 < gaps[1] < gaps[0] and gaps[1] < 0.1
    assert few_steps.own_gap("sde", "uniform", 8) is few_steps.own_gap("heun", "instance", 8) is None


def test_samples_are_those_of_the_arm_and_of_nothing_else():
    denoiser = train.build_denoiser(Run("cifar10", 16, "half", 0)).eval()
    images = samples.generate(denoiser, 130, 4)
    assert images.shape == (130, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images[:30], samples.generate(denoiser, 30, 4))  # batches of 100 do not matter
    assert torch.equal(samples.generate(denoiser, 20, 4, "sde"), samples.generate(denoiser, 25, 4, "sde")[:20])
    for other in ({"solver": "euler"}, {"grid": "logsnr"}, {"grid": "class"}, {"grid": "instance"}, {"cfg": 3.0}):
        assert samples.generate(denoiser, 30, 4, **other).shape == (30, 3, 32, 32)
    real = data.open_data("cifar10").held_out(60)[0]
    found = samples.quality(samples.quantise(real), real=60)
    assert found["fd_effnet_lite0"] == pytest.approx(0, abs=1e-3) and found["precision"] == found["recall"] == 1


def test_grid_of_a_class_is_that_of_its_mean_spectrum():
    x, labels = data.open_data("cifar10").batch(data.HELD_OUT_SEED, 0, 5000)
    of_five = samples.rapsd(x[labels == 5]).mean(0), samples.rapsd((x - x.mean(0))[labels == 5]).mean(0)
    expected = samples.TightSchedule.of_spectrum(*of_five, 32).sampling_grid(6)
    grid = samples.grid_of("class", 6, torch.arange(3), torch.tensor([5, 2, 5]))
    assert torch.equal(grid[:, 0], expected) and torch.equal(grid[:, 2], expected)
    assert not torch.equal(grid[:, 1], expected)


def test_the_sweep_is_the_same_for_each_run_and_the_best_decides():
    settings = Run("cifar10", 16, "half", 0, steps=3, samples=10, label_drop=0.1, ema=0.5)
    denoiser, ema, _ = train.train(settings)
    before = [p.clone() for p in denoiser.parameters()]
    found = list(samples.sweep(denoiser, ema, settings))
    assert [(x["cfg"], x["weights"]) for x in found] == [(1, "model"), (1, "ema"), (2, "model"), (2, "ema")]
    assert all(torch.equal(p, q) for p, q in zip(before, denoiser.parameters(), strict=True))
    distances = [x["fd_effnet_lite0"] for x in found]
    assert len(set(distances)) > 1
    numbers = results.numbers({"run": asdict(settings), "samples": found})
    assert next(iter(numbers)) == "fd_effnet_lite0" and numbers["fd_effnet_lite0"] == min(distances)
    assert numbers["recall"] == found[distances.index(min(distances))]["recall"]


def test_a_line_without_a_later_setting_had_its_default(here, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "toy", TOY)
    run.main(["toy"])
    lines = lines_of(here / "toy.jsonl")
    for line in lines:
        for name in ("ema", "samples", "label_drop"):
            del line["run"][name]
    (here / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    assert run.main(["toy"]) == 0 and "0 of them done now" in capsys.readouterr().out
    assert results.main(["toy"]) == 0


def test_few_steps_quick(here, monkeypatch, capsys):
    monkeypatch.setattr(few_steps, "REPOSITORY", here)
    monkeypatch.setattr(few_steps, "NETWORK", replace(few_steps.NETWORK, patch=16))
    monkeypatch.setattr(few_steps, "GRIDS", ("uniform", "instance"))
    assert few_steps.main(["--quick"]) == 0
    lines = lines_of(here / "output" / "quick" / "few_steps.jsonl")
    assert len(lines) == len(few_steps.ARMS) * 2 * len(SOLVERS)
    assert all(x["setting"]["steps"] == (4 if x["setting"]["solver"] == "heun" else 8) for x in lines)
    assert capsys.readouterr().out.count("| linear_mixed | ") == 2 * len(SOLVERS)
    assert torch.equal(*(few_steps.network(replace(few_steps.NETWORK, steps=20)).net.pos_embed for _ in range(2)))
