"""Trajectories are those of sampling, and networks that cannot be used are named."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sampler import SOLVERS
from spectral_forcing import SpectralForcing
from tests.conftest import ONE, Payload, spectrum_of_digits, train
from tests.tools.test_export import inputs, of_run
from tools.explorer import trajectory
from tools.explorer.runs import find_networks, find_runs
from util.checkpoint.files import NAME
from util.data.images import quantise
from util.errors import UserError
from util.evaluation.generate import generate_all

pytestmark = pytest.mark.usefixtures("tiny")
CPU = torch.device("cpu")


def follow(folder, labels=(3, 1, 4), **settings):
    """Denoiser, configuration and trajectory of a run's ema1."""
    denoiser, config = trajectory.load_network(folder, "ema1", CPU)
    config = trajectory.with_settings(config, {"num_sampling_steps": 4, "cfg": 2.0, "seed": 5, **settings})
    return denoiser, config, trajectory.follow(denoiser, config, labels)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_images_are_those_of_sampling(trained, solver):
    denoiser, config, found = follow(trained, sampling_method=solver, interval_min=0.3, interval_max=0.7)
    assert torch.equal(quantise(found.x), generate_all(denoiser, config, [3, 1, 4], ONE))


def test_states_are_those_of_heun_with_guidance(trained):
    """Against a second implementation, of the solver, of guidance and of the prediction."""
    denoiser, config, found = follow(trained, sample_t_eps=0.4)
    y, none, grid = torch.tensor([3, 1, 4]), torch.full((3,), config.null_class), torch.linspace(0, 1, 5)

    def predict(z, t):
        c, u = (denoiser.predict(z, t.expand(3), labels) for labels in (y, none))
        return u + (2.0 if config.interval_min < t < config.interval_max else 1.0) * (c - u)

    def v(z, t):
        return (predict(z, t) - z) / (1 - t).clamp_min(0.4)

    z = found.z[0]
    assert abs(float(z.std()) - 1) < 0.1 and found.t[:, 0].tolist() == [0, 0.25, 0.5, 0.75]
    with torch.no_grad():
        for i in range(4):
            torch.testing.assert_close(found.z[i], z, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.predicted[i], predict(z, grid[i]), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.seen[i], SpectralForcing(16)(z, grid[i]), rtol=1e-4, atol=1e-4)
            first = v(z, grid[i])
            second = v(z + 0.25 * first, grid[i + 1]) if i < 3 else first
            z = z + 0.25 * (first + second) / 2
    torch.testing.assert_close(found.x, z, rtol=1e-4, atol=1e-4)
    assert found.x.shape == (3, 3, 16, 16) and found.labels == (3, 1, 4)


def test_a_plain_network_that_predicts_v(tmp_path):
    run = train(tmp_path / "run", disable_dct_patchify=True, pred_param="v", t_eps=0.0, epochs=1)
    _, _, found = follow(run, sampling_method="euler", cfg=1.0)
    assert torch.equal(found.seen, found.z)
    torch.testing.assert_close(found.z[1], 0.75 * found.z[0] + 0.25 * found.predicted[0])  # a straight line to x


def test_each_image_may_have_its_own_times(trained, tmp_path):
    file = spectrum_of_digits(tmp_path / "spectrum.npz")
    settings = {"sampling_grid": "spectral_instance", "spectrum_file": str(file)}
    denoiser, config, found = follow(trained, num_sampling_steps=9, **settings)
    assert found.t.shape == (6, 3) and len(set(found.t[3].tolist())) == 3
    assert torch.equal(quantise(found.x), generate_all(denoiser, config, [3, 1, 4], ONE))
    trajectory.draw(found, 1, trajectory.power_range(found, 1))


def test_a_computation_ends_when_its_reader_has_left(trained):
    """The page raises in `on_step`."""
    denoiser, config, _ = follow(trained)
    times = []

    def on_step(t):
        times.append(t)
        if t > 0.3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trajectory.follow(denoiser, config, [1], 3, on_step)
    assert times == [0, 0.25, 0.25, 0.5] and not denoiser.training


def test_networks_of_a_folder(output, trained):
    networks = find_networks([output])
    assert set(networks) == {output / "run", output / "exported.safetensors", output / "hub"}
    assert find_runs([output]) == [output / "run"] == find_runs([output / "run"])
    expected = of_run(trained, "model_ema1").velocity(*inputs())
    for path in networks:
        denoiser, config = trajectory.load_network(path, "ema1", CPU)
        assert torch.equal(denoiser.velocity(*inputs()), expected) and config.img_size == 16


def test_networks_that_cannot_be_used_are_one_sentence(output, tmp_path):
    run = shutil.copytree(output / "run", tmp_path / "run")
    content = torch.load(run / NAME, weights_only=False)
    weights = load_file(output / "exported.safetensors")
    save_file(weights, tmp_path / "bare.safetensors")
    shutil.copytree(output / "hub", tmp_path / "hub")
    save_file({**weights, "net.more": torch.zeros(1)}, tmp_path / "hub" / "model.safetensors")

    def load(name):
        with pytest.raises(UserError) as found:
            trajectory.load_network(tmp_path / name, "ema1", CPU)
        return str(found.value)

    assert "weights without settings" in load("bare.safetensors") and "net.more is unknown" in load("hub")
    torch.save({**content, "model_ema1": {"net.other": torch.zeros(1)}}, run / NAME)
    assert "lack" in load("run")
    torch.save({**content, "extra": Payload(tmp_path / "executed")}, run / NAME)
    assert "could execute code" in load("run") and not (tmp_path / "executed").exists()
    os.truncate(run / NAME, 1000)
    assert "truncated" in load("run")
