"""From a denoiser to images: what comes out, of which it depends, and what an error names.

Shapes: z (B, C, H, W); t, y (B,).
"""

import math
from dataclasses import replace

import pytest
import torch

from denoiser import Denoiser
from tests.conftest import ONE
from tests.util.evaluation.toy import CONFIG, Toy, toy_denoiser, transformer
from util.dist.preemption import Preempted
from util.errors import UserError
from util.evaluation import generate as module
from util.evaluation.generate import generate, generate_all, sample_grid, sampling_settings, setting_name, start_noise

SMALL = replace(CONFIG, gen_bsz=2, seed=4)


def images(denoiser, labels, ctx=ONE, **changes):
    return generate_all(denoiser, replace(SMALL, **changes), labels, ctx)


class Zero(torch.nn.Module):
    """A network without velocity, so that the starting noise comes out."""

    def forward(self, z, t, y):
        assert not self.training and not torch.is_grad_enabled()
        return torch.zeros_like(z)


def test_images_start_from_scaled_noise():
    denoiser = Denoiser(Zero(), pred_param="v", noise_scale=0.25)
    out = images(denoiser, [0] * 5)
    expected = ((0.25 * start_noise(SMALL, range(5)) + 1) * 127.5).clamp(0, 255)
    assert out.dtype == torch.uint8 and out.shape == (5, 3, 16, 16)
    assert (out.float() - expected).abs().max() < 0.501
    assert denoiser.training and denoiser.net.training and torch.is_grad_enabled()  # as before


def test_start_noise_depends_on_seed_and_index_alone():
    noise = start_noise(SMALL, range(3, 10))
    torch.manual_seed(1)
    assert torch.equal(start_noise(SMALL, [5, 3]), noise[[2, 0]])
    assert not torch.equal(start_noise(replace(SMALL, seed=5), range(3, 10)), noise)
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05


def test_an_image_does_not_depend_on_its_batch_or_rank():
    denoiser, labels = transformer(), [3, 1, 4, 1, 5]
    whole = images(denoiser, labels, gen_bsz=5).int()
    assert (images(denoiser, labels, gen_bsz=2).int() - whole).abs().max() <= 1  # a rounding at most
    some = torch.cat([part for _, part in generate(denoiser, SMALL, [3, 1], labels, ONE)]).int()
    assert (some - whole[[3, 1]]).abs().max() <= 1
    assert not images(denoiser, [3, 2, 4, 1, 5]).int().equal(whole)
    assert not images(denoiser, labels, seed=5).int().equal(whole)


def test_noise_of_a_stochastic_solver_belongs_to_the_image():
    settings = {"sampling_method": "sde", "num_sampling_steps": 4}
    labels = [3, 2, 4, 1, 5]
    whole = images(toy_denoiser(), labels, gen_bsz=5, **settings).int()
    assert (images(toy_denoiser(), labels, gen_bsz=2, **settings).int() - whole).abs().max() <= 1  # a rounding at most
    assert not images(toy_denoiser(), labels, gen_bsz=5, **settings | {"sampling_method": "euler"}).int().equal(whole)


@pytest.mark.parametrize(
    ("solver", "cfg", "interval"),
    [("heun", 2.0, (0.25, 0.8)), ("euler", 2.0, (0.25, 0.8)), ("heun", 1.0, (0.0, 1.0)), ("heun", 3.0, (0.0, 1.0))],
)
def test_guidance_is_one_batch_and_without_it_there_is_one_forward(solver, cfg, interval):
    net, (lo, hi) = Toy(), interval
    config = {"sampling_method": solver, "num_sampling_steps": 4, "cfg": cfg, "interval_min": lo, "interval_max": hi}
    images(Denoiser(net, pred_param="v"), [0] * 5, gen_bsz=5, **config)
    times = [0.0, 0.25, 0.5, 0.75] if solver == "euler" else [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    on = [cfg != 1 and t < hi and (lo == 0 or t > lo) for t in times]
    assert net.rows == [10 if guided else 5 for guided in on]


class Breaks(Toy):
    """Not finite for label 6 from time `since` on."""

    def __init__(self, since):
        super().__init__()
        self.since = since

    def forward(self, z, t, y):
        bad = (y == 6) & (t >= self.since - 1e-6)
        return torch.where(bad[:, None, None, None], math.nan, super().forward(z, t, y))


def test_non_finite_images_are_an_error_that_names_image_label_and_seed():
    config = {"gen_bsz": 4, "num_sampling_steps": 4, "cfg": 1.0}
    with pytest.raises(UserError, match=r"seed 4 gave non-finite values: image 3 \(label 6\), 1 in this batch"):
        images(Denoiser(Breaks(0.5), pred_param="v"), [0, 1, 2, 6], **config)
    images(Denoiser(Breaks(1.0), pred_param="v"), [0, 1, 2, 6], **config)  # nothing asks for t = 1


def test_sampling_stops_between_two_batches(monkeypatch):
    answers = iter([None, None, "SIGTERM", "SIGTERM"])
    monkeypatch.setattr(module, "requested_on_any_rank", lambda ctx: next(answers))
    net = Toy()
    with pytest.raises(Preempted, match="before all images existed"):
        images(Denoiser(net, pred_param="v"), [0] * 10, cfg=1.0)
    assert net.rows == [2] * 6  # three evaluations for each of two batches of two


def test_settings_and_names_tell_images_apart():
    settings = sampling_settings(CONFIG)
    assert settings == {"solver": "heun", "steps": 2, "cfg": 2.0, "interval": [0.1, 1.0], "seed": 3}
    names = {
        "epoch0056-ema1-heun2-cfg2": {},
        "epoch0056-model-euler20-cfg2": {"num_sampling_steps": 20, "ema": "model", "sampling_method": "euler"},
        "epoch0056-ema1-heun2-cfg2-t0.2to1": {"interval_min": 0.2},
        "epoch0056-ema1-heun2-cfg1": {"cfg": 1.0, "interval_min": 0.2},  # an interval of no guidance
        "epoch0056-ema1-heun2-cfg2-teps0.01": {"pred_param": "x", "sample_t_eps": 0.01},
    }
    assert [setting_name(replace(CONFIG, **changes), 55) for changes in names.values()] == list(names)
    predicts_x = replace(CONFIG, pred_param="x", sample_t_eps=0.01)
    assert sampling_settings(predicts_x)["sample_t_eps"] == 0.01
    for same in (replace(predicts_x, sample_t_eps=0.05), replace(predicts_x, pred_param="v")):
        assert "sample_t_eps" not in sampling_settings(same)


def test_a_grid_has_a_row_for_each_class_where_classes_are_equally_many(tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(module, "labelled_grid", lambda *args: grids.append(args) or module.save_png)
    monkeypatch.setattr(module, "save_png", lambda grid, path: grids.append(path))
    for labels, columns in (([0, 0, 0, 1, 1, 1], 3), ([0, 1, 2, 3], 2), ([0, 0, 1, 2, 3], 2), ([7], 1)):
        out = sample_grid(toy_denoiser(), SMALL, labels, ONE, tmp_path / "grid.png", "title")
        drawn, path = grids
        assert torch.equal(drawn[0], out) and drawn[1:] == ([str(label) for label in labels], columns, "title")
        assert path == tmp_path / "grid.png" and len(out) == len(labels)
        grids.clear()
