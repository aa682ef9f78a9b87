"""The validation loss: which images, its value, and that it is a fixed measurement; util/evaluation/validation.py."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter

import main_jit
from denoiser import Denoiser, LogitNormal
from tests.conftest import ONE, TINY_MODEL, arguments, few_digits, read_log, state_differences, train
from tests.util.evaluation.toy import CONFIG, on_ranks
from util.config import resolve
from util.data.datasets import build_dataset
from util.data.images import to_float
from util.errors import UserError
from util.evaluation.validation import (
    BINS,
    WEIGHTS,
    bin_weights,
    hold_out,
    init_overlap_warnings,
    log_values,
    random_order,
)
from util.optim import EMA
from util.rng import CounterRNG

SEED = 3
TIMES = LogitNormal(-0.8, 0.8)
pytestmark = pytest.mark.usefixtures("tiny")


def settings(**changes):
    default = {"val_split": "0.25", "val_rings": True, "seed": SEED, "batch_size": 4, "num_workers": 0}
    return replace(CONFIG, **{**default, **changes})


def digits(size=16):
    images = few_digits(size)
    images.name, images.in_memory = "digits", True
    return images


def part(count=8, **changes):
    """Validation on `count` digits at 16 pixels."""
    return hold_out(digits(), settings(val_images=count, **changes))[1]


def losses(measured, denoiser, emas, ctx=ONE):
    """by_time (W, T) and by_ring (W, T, K) or None of a measurement, from the values for the log."""
    values = measured.measure(denoiser, emas, ctx, TIMES)
    by_time = torch.tensor([[values[f"loss_{name}_t{b}"] for b in range(BINS)] for name in WEIGHTS])
    return by_time, torch.tensor([values[f"rings_{name}"] for name in WEIGHTS]) if "rings_model" in values else None


class Constant(nn.Module):
    """A network whose output is one number, and which remembers what it was asked."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.asked = []

    def forward(self, z, t, y):
        self.asked.append((t, y, self.training))
        return self.value.expand_as(z)


def constant(values=(0.5, -0.25, 2.0), **path):
    """A denoiser whose weights and EMAs are constants."""
    denoiser = Denoiser(Constant(values[0]), **path)
    emas = EMA(denoiser, 0.9), EMA(denoiser, 0.9)
    for ema, value in zip(emas, values[1:], strict=True):
        ema.shadow["net.value"].fill_(value)
    return denoiser, emas


def network(**changes):
    """A network of random weights, with EMAs that differ from them."""
    torch.manual_seed(0)
    denoiser = Denoiser(TINY_MODEL(input_size=16, num_classes=10), **changes)
    emas = EMA(denoiser, 0.9), EMA(denoiser, 0.9)
    for factor, ema in zip((0.9, 1.2), emas, strict=True):
        for average in ema.shadow.values():
            average.mul_(factor)
    return denoiser, emas


# --- its value -------------------------------------------------------------------------------------------------------


def truth(measured, values, path):
    """(W, T) and (W, T, K) of `constant`, in numpy: every image, mode and ring by itself."""
    noise_scale, t_eps = path.get("noise_scale", 1.0), path.get("t_eps", 0.05)
    f = np.fft.fftfreq(16, 1 / 16)
    radius = np.sqrt(f[:, None] ** 2 + f[None] ** 2)
    loss, rings = np.zeros((3, BINS)), np.zeros((3, BINS, 12))
    for number in measured.images.numbers:
        x = to_float(measured.images.whole[int(number)][0][None])[0].double().numpy()
        index = torch.tensor([number])
        u = CounterRNG(SEED, 1, index).uniform("validation", BINS)[0].double().numpy()
        for b in range(BINS):
            t = (b + u[b]) / 10
            e = CounterRNG(SEED, 2 + b, index).normal("validation", x.size).double().numpy().reshape(x.shape)
            e *= noise_scale
            z = t * x + (1 - t) * e
            for w, value in enumerate(values):
                if path["pred_param"] == "v":
                    error = (x - e if t_eps == 0 else (x - z) / max(1 - t, t_eps)) - value
                else:
                    error = (x - value) / max(1 - t, t_eps)
                loss[w, b] += (error**2).mean()
                power = (np.abs(np.fft.fft2(error)) ** 2 / 256).mean(0)
                rings[w, b] += [power[(k <= radius) & (radius < k + 1)].mean() for k in range(12)]
    return loss / len(measured.images), rings / len(measured.images)


@pytest.mark.parametrize(
    "path",
    [
        {"pred_param": "x", "noise_scale": 2.0, "t_eps": 0.2},
        {"pred_param": "v", "t_eps": 0.0},
        {"pred_param": "v", "noise_scale": 2.0},
    ],
    ids=str,
)
def test_constant_networks_have_the_loss_that_numpy_computes(path):
    values, measured = (0.5, -0.25, 2.0), part(6)
    found = losses(measured, *constant(values, **path))
    by_time, by_ring = truth(measured, values, path)
    np.testing.assert_allclose(found[0].numpy(), by_time, rtol=1e-4)
    np.testing.assert_allclose(found[1].numpy(), by_ring, rtol=1e-3, atol=1e-6)
    assert len({f"{x:.6f}" for x in found[0][:, 5].tolist()}) == 3  # the weights and both EMAs


def test_rings_add_up_to_the_loss():
    """Parseval, with a network; n_k counted by hand."""
    by_time, by_ring = losses(part(), *network())
    count = np.zeros(12)
    for u in range(-8, 8):
        for v in range(-8, 8):
            count[int(np.hypot(u, v))] += 1
    assert by_ring.shape == (3, BINS, 12) and count.sum() == 256
    np.testing.assert_allclose((by_ring.numpy() * count).sum(-1) / 256, by_time.numpy(), rtol=1e-5)
    assert losses(part(val_rings=False), *network())[1] is None


def test_weights_of_the_bins_are_integrals_of_the_density_of_times():
    """Against the integral of the density of t = sigmoid(P_mean + P_std n)."""
    for mean, std in ((-0.8, 0.8), (0.3, 1.5), (-0.8, -0.8)):

        def density(t, mean=mean, std=std):
            return scipy.stats.norm.pdf(np.log(t / (1 - t)), mean, abs(std)) / (t * (1 - t))

        expected = [scipy.integrate.quad(density, b / 10, (b + 1) / 10)[0] for b in range(BINS)]
        weights = bin_weights(LogitNormal(mean, std))
        np.testing.assert_allclose(weights.numpy(), expected, atol=1e-9)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert bin_weights(LogitNormal(-1.0, 0.0)).tolist() == [0, 0, 1] + [0] * 7  # sigmoid(-1) = .27


def test_values_for_the_log():
    by_time = torch.arange(30, dtype=torch.float64).view(3, 10)
    values = log_values(by_time, by_time[..., None].repeat(1, 1, 4), TIMES)
    assert values["loss_ema1"] == pytest.approx(float((by_time[1] * bin_weights(TIMES)).sum()))
    assert (values["loss_model_t0"], values["loss_ema1_t3"], values["loss_ema2_t9"]) == (0, 13, 29)
    assert values["rings_ema1"][3] == [13] * 4


# --- a fixed measurement ---------------------------------------------------------------------------------------------


def test_the_network_is_asked_once_per_image_and_bin_in_eval_mode_with_true_labels():
    measured = part(10)
    denoiser, emas = constant(pred_param="v")
    losses(measured, denoiser, emas)
    t, y = (torch.cat([asked[i] for asked in denoiser.net.asked]).view(-1) for i in (0, 1))
    assert not any(training for *_, training in denoiser.net.asked) and denoiser.training
    assert torch.bincount((t * 10).long()).tolist() == [30] * BINS and len(set(t.tolist())) == 100
    labels = measured.images.labels
    assert torch.bincount(y, minlength=10).tolist() == (30 * np.bincount(labels, minlength=10)).tolist()


def test_the_last_batch_compiles_nothing():
    """Ten images in batches of four: one graph for the weights and both EMAs, with and without a smaller batch."""
    counter, measured = CompileCounter(), part(10, val_rings=False)
    denoiser, emas = network(autocast_dtype=torch.bfloat16)
    plain, _ = losses(measured, denoiser, emas)
    denoiser, emas = network(autocast_dtype=torch.bfloat16)
    denoiser.net.compile(backend=counter, dynamic=False)
    torch.testing.assert_close(losses(measured, denoiser, emas)[0], plain, rtol=1e-2, atol=0)
    assert counter.frame_count == 1


def test_batch_size_and_number_of_ranks_do_not_matter(tmp_path):
    """Seven images, and one, so that one of two ranks has none."""

    def work(ctx):
        for n in (7, 1):
            found = losses(part(n, batch_size=2), *network(), ctx), losses(part(n, batch_size=100), *network())
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)

    done = on_ranks(2, tmp_path, work)
    assert [code for code, _ in done] == [0, 0], done


def test_nothing_of_training_changes():
    denoiser, emas = network()
    before = [{k: v.clone() for k, v in s.items()} for s in (denoiser.state_dict(), *(e.shadow for e in emas))]
    state, addresses = torch.get_rng_state(), [p.data_ptr() for p in denoiser.parameters()]
    first = losses(part(), denoiser, emas)
    after = (denoiser.state_dict(), *(e.shadow for e in emas))
    assert all(b[k].equal(a[k]) for b, a in zip(before, after, strict=True) for k in b)
    assert torch.get_rng_state().equal(state) and [p.data_ptr() for p in denoiser.parameters()] == addresses
    assert all(p.grad is None for p in denoiser.parameters()) and denoiser.training
    again = losses(part(), denoiser, emas)
    assert first[0].equal(again[0]) and first[1].equal(again[1])
    assert not (first[0] == losses(part(seed=SEED + 1), denoiser, emas)[0]).any()


# --- which images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "count"), [("0.25", 10), ("0.03", 1)])
def test_a_fraction_is_held_out(fraction, count):
    whole = digits()
    rest, measured = hold_out(whole, settings(val_split=fraction))
    assert len(measured.images) == count and len(rest) == 40 - count
    assert sorted([*rest.numbers, *measured.images.numbers]) == list(range(40))  # disjoint, and all of them
    for view in (rest, measured.images):
        assert (view.name, view.img_size, view.in_memory, view.class_names) == ("digits", 16, True, whole.class_names)
        assert all(view[i][0].equal(whole[int(view.numbers[i])][0]) for i in range(len(view)))
        assert [view[i][1] for i in range(len(view))] == view.labels.tolist() == whole.labels[view.numbers].tolist()


def test_which_images_depends_on_seed_and_size_alone():
    def numbers(**changes):
        return set(part(40, **changes).images.numbers)

    assert numbers() == numbers(batch_size=1, val_rings=False)
    assert numbers() != numbers(seed=SEED + 1)
    few = set(part(3).images.numbers)
    assert len(few) == 3 and few < numbers() and few != {0, 1, 2}
    assert numbers(val_split="0.1") < numbers() < numbers(val_split="0.5")
    order = random_order(50_000, 0)
    assert sorted(order) == list(range(50_000)) and abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.02
    assert order[:5].tolist() == [27756, 33796, 28570, 39176, 42937]  # a resumed run holds out the same images as ever


def folder_of_images(folder, *classes, count=1):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (i * 40, 9, 99)).save(folder / name / f"{i}.png")


def test_a_named_split_leaves_the_training_images(here):
    folder_of_images(here / "data" / "val", "a", "b", count=3)
    folder_of_images(here / "data" / "train", "a", "b", count=2)
    whole = build_dataset("imagefolder", "data", 16)
    same, measured = hold_out(whole, settings(val_split="val", data_path="data"))
    assert same is whole and len(measured.images) == 6 and measured.images.whole.folder == here / "data" / "val"
    assert hold_out(whole, settings(val_split=None)) == (whole, None)


# --- within training -------------------------------------------------------------------------------------------------


def test_training_is_the_same_with_a_named_split_as_without(here):
    """To the bit, also with dropout, whose masks come from torch's own generator."""
    for split in ("train", "val"):
        folder_of_images(here / "data" / split, "a", "b", count=8)
    data = {"dataset": "imagefolder", "data_path": here / "data", "class_num": 2, "batch_size": 8, "num_workers": 1}
    without = train(here / "without", **data, attn_dropout=0.3)
    measured = train(here / "with", **data, attn_dropout=0.3, val_split="val", val_images=5)
    assert state_differences(without, measured) == [] and read_log(without) == read_log(measured)
    assert [line["num_images"] for line in read_log(measured, "val")] == [5, 5] and read_log(without, "val") == []


def test_an_interrupted_run_measures_what_an_uninterrupted_one_does(here):
    whole, parts = train(here / "whole", val_split="0.2", lr=3e-3), here / "parts"
    train(parts, val_split="0.2", lr=3e-3, epochs=1)
    assert main_jit.main(arguments(output_dir=parts, val_images=3, lr=3e-3)) == 0  # --val_split is the checkpoint's
    assert state_differences(whole, parts) == []
    lines = read_log(whole, "val")
    assert [line["num_images"] for line in read_log(parts, "val")] == [8, 3]
    assert lines[0]["loss_ema1"] == read_log(parts, "val")[0]["loss_ema1"]
    assert lines[1]["loss_model"] < lines[0]["loss_model"] and len({lines[1][f"loss_{name}"] for name in WEIGHTS}) == 3


def test_weights_that_know_the_held_out_images_are_warned_of():
    config = settings()
    assert init_overlap_warnings(config, config.as_dict()) == []
    for other in ({"seed": 9}, {"val_split": None}, {"dataset": "cifar10"}):
        (warning,) = init_overlap_warnings(config, config.as_dict() | other)
        assert "may have been trained on the held-out images" in warning
    for split in ("val", None):
        assert init_overlap_warnings(settings(val_split=split), {}) == []


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_neither_a_fraction_nor_a_split():
    for text in ("0", "1", "1.5", "-0.1", "nan", "inf", "train", ""):
        with pytest.raises(UserError, match=rf"--val_split {text} must be a fraction"):
            hold_out(digits(), settings(val_split=text))


def test_what_cannot_be_held_out(here):
    def refused(match, split, whole=None):
        with pytest.raises(UserError, match=f"--val_split {split}.*{match}"):
            hold_out(whole or digits(), settings(val_split=split, data_path="data"))

    refused("digits have no split.* fraction", "val")
    refused("of 40 images", "0.01")
    refused("of 40 images", "0.99")
    folder_of_images(here / "data" / "train", "a", "b")
    whole = build_dataset("imagefolder", "data", 16)
    refused("no validation images", "val", whole)
    refused("no split 'test'", "test", whole)
    for names in (("a",), ("a", "b"), ("a", "c")):
        for name in names:
            (here / "data" / "val" / name).mkdir(parents=True, exist_ok=True)
        refused("data/val", "val", whole)


def test_images_that_a_checkpoint_was_trained_on_cannot_be_held_out():
    for saved in ({"val_split": "0.1"}, {"val_split": None}, {}):
        with pytest.raises(UserError, match=r"--val_split 0.25 \(the checkpoint has"):
            resolve({"val_split": "0.25"}, {"model": "JiT-B/16", **saved})
    assert resolve({"val_split": "0.25"}, {"model": "JiT-B/16", "val_split": "0.25"}).val_split == "0.25"
