"""Few steps: samples, sweeps and solvers on trained networks."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from experiments import arms, data, few_steps, results, run, samples, studies, train
from experiments.train import Run
from sampler import SOLVERS
from tests.experiments.conftest import TOY, lines_of

pytestmark = pytest.mark.usefixtures("cifar10_of_noise")


def test_density_of_half_of_the_draws():
    sampler = arms.time_sampler({"times": "half"}, "cifar10", train.CPU)
    rng = train.CounterRNG(0, 0, torch.arange(50_000))
    t, edges = sampler.sample(rng), torch.linspace(0, 1, 11, dtype=torch.float64)
    counted = torch.histc(t, 10, 0, 1).double() / len(t)
    torch.testing.assert_close(sampler.cdf(edges).diff(), counted, atol=6e-3, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_use_up_the_evaluations(solver):
    for count in (1, 8, 9, 64):
        steps = few_steps.steps_for(solver, count)
        assert SOLVERS[solver].nfe(steps) <= count < SOLVERS[solver].nfe(steps + 1)


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


def test_numbers_of_samples_are_those_of_one_number_of_steps():
    settings = Run("cifar10", 16, "half", 0, steps=3, samples=10, cfgs=(2.0,), sampling_steps=(2, 4))
    found = list(samples.sweep(*train.train(settings)[:2], settings))
    assert [(x["steps"], x["weights"]) for x in found] == [(2, "model"), (4, "model")]
    line = {"run": asdict(settings), "samples": found}
    assert results.numbers(line)["spectrum_gap"] == found[0]["spectrum_gap"]
    assert results.numbers(line, 4)["spectrum_gap"] == found[1]["spectrum_gap"] != found[0]["spectrum_gap"]


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
