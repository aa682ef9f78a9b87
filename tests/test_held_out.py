"""The loss on held-out images: which images, its value, that it is a fixed measurement, and that training stays."""

from argparse import Namespace
from datetime import timedelta
from multiprocessing.process import BaseProcess

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter

import main_jit
from denoiser import Denoiser, LogitNormal
from tests.conftest import ONE, TINY_MODEL, arguments, few_digits, raw, read_log, state_differences, train
from tests.test_refusals import images, refuses  # noqa: F401 (a fixture)
from util import held_out, rng
from util.data import build_dataset, to_float
from util.distributed import World
from util.ema import EMA
from util.errors import UserError
from util.held_out import BINS, bin_weights, hold_out, random_order
from util.rng import Stream

SEED = 3


@pytest.fixture(autouse=True)
def _tiny(tiny):
    pass


def settings(**changes):
    default = {"val_split": "0.25", "val_images": 2048, "val_rings": True, "seed": SEED, "batch_size": 4}
    return Namespace(**{**default, "num_workers": 0, "data_path": None, **changes})


def part(count=8, **changes):
    """HeldOut on `count` digits at 16 pixels."""
    return hold_out(few_digits(16), settings(val_images=count, **changes))[1]


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
    """A denoiser whose weights and averages are constants."""
    denoiser = Denoiser(Constant(values[0]), **path)
    emas = EMA(denoiser, 0.9), EMA(denoiser, 0.9)
    for ema, value in zip(emas, values[1:], strict=True):
        ema.averages["net.value"].fill_(value)
    return denoiser, emas


def network():
    """A network of random weights, with averages that differ from them."""
    torch.manual_seed(0)
    denoiser = Denoiser(TINY_MODEL(input_size=16, num_classes=10))
    emas = EMA(denoiser, 0.9), EMA(denoiser, 0.9)
    for factor, ema in zip((0.9, 1.2), emas, strict=True):
        for average in ema.averages.values():
            average.mul_(factor)
    return denoiser, emas


def truth(measured, values, path):
    """(W, T) and (W, T, K) of `constant`, in numpy: every image, mode and ring by itself."""
    noise_scale, t_eps = path.get("noise_scale", 1.0), path.get("t_eps", 0.05)
    f = np.fft.fftfreq(16, 1 / 16)
    radius = np.sqrt(f[:, None] ** 2 + f[None] ** 2)
    loss, rings = np.zeros((3, BINS)), np.zeros((3, BINS, 12))
    for number in measured.images.numbers:
        x = to_float(measured.images.whole[int(number)][0][None])[0].double().numpy()
        index = torch.tensor([number])
        u = rng.uniform(SEED, Stream.VALIDATION, 1, index, BINS)[0].double().numpy()
        for b in range(BINS):
            t = (b + u[b]) / 10
            e = noise_scale * rng.normal(SEED, Stream.VALIDATION, 2 + b, index, x.size).double().numpy().reshape(
                x.shape
            )
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


def test_weights_are_cast_once_and_the_last_batch_compiles_nothing():
    """Ten images in batches of four: one graph for the weights and both averages, with and without a smaller batch."""
    counter, measured = CompileCounter(), part(10)
    denoiser, emas = network()
    denoiser.autocast_dtype = torch.bfloat16
    plain = measured.measure(denoiser, emas, ONE).by_time
    dtypes = set()
    for layer in denoiser.net.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda layer, _: dtypes.add(layer.weight.dtype))
    measured.measure(denoiser, emas, ONE)
    assert dtypes == {torch.bfloat16}
    denoiser, emas = network()
    denoiser.autocast_dtype = torch.bfloat16
    denoiser.net.compile(backend=counter, dynamic=False)
    torch.testing.assert_close(measured.measure(denoiser, emas, ONE).by_time, plain, rtol=1e-2, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "path",
    [
        {"pred_param": "x"},
        {"pred_param": "x", "noise_scale": 2.0, "t_eps": 0.2},
        {"pred_param": "v", "t_eps": 0.0},
        {"pred_param": "v", "noise_scale": 2.0},
    ],
    ids=str,
)
def test_known_answer(path):
    values, measured = (0.5, -0.25, 2.0), part(6)
    denoiser, emas = constant(values, **path)
    loss = measured.measure(denoiser, emas, ONE)
    by_time, by_ring = truth(measured, values, path)
    np.testing.assert_allclose(loss.by_time.numpy(), by_time, rtol=1e-4)
    np.testing.assert_allclose(loss.by_ring.numpy(), by_ring, rtol=1e-3, atol=1e-6)
    assert len({f"{x:.6f}" for x in loss.by_time[:, 5].tolist()}) == 3  # the weights and both averages


def test_rings_add_up_to_the_loss():
    """Parseval, with a network; n_k counted by hand."""
    denoiser, emas = network()
    loss = part().measure(denoiser, emas, ONE)
    count = np.zeros(12)
    for u in range(-8, 8):
        for v in range(-8, 8):
            count[int(np.hypot(u, v))] += 1
    assert loss.by_ring.shape == (3, BINS, 12) and count.sum() == 256
    np.testing.assert_allclose((loss.by_ring.numpy() * count).sum(-1) / 256, loss.by_time.numpy(), rtol=1e-5)
    assert part(val_rings=False).measure(denoiser, emas, ONE).by_ring is None


def test_weights_of_the_bins():
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
    density = LogitNormal(-0.8, 0.8)
    by_time = torch.arange(30, dtype=torch.float64).view(3, 10)
    values = held_out.Loss(by_time, None).values(density)
    assert values["loss_ema1"] == pytest.approx(float((by_time[1] * bin_weights(density)).sum()))
    assert (values["loss_model_t0"], values["loss_ema1_t3"], values["loss_ema2_t9"]) == (0, 13, 29)
    assert len(values) == 33 and all(type(value) is float for value in values.values())
    values = held_out.Loss(by_time, by_time[..., None].repeat(1, 1, 4)).values(density)
    assert values["rings_ema1"][3] == [13] * 4


# --- a fixed measurement --------------------------------------------------------------------------------------------


def test_what_the_network_is_asked():
    """Every image at one time in each bin, in eval mode, with its own label and never 'no class'."""
    measured = part(10)
    denoiser, emas = constant(pred_param="v")
    measured.measure(denoiser, emas, ONE)
    t, y = (torch.cat([asked[i] for asked in denoiser.net.asked]).view(-1) for i in (0, 1))
    assert not any(training for *_, training in denoiser.net.asked) and denoiser.training
    assert torch.bincount((t * 10).long()).tolist() == [30] * BINS and len(set(t.tolist())) == 100
    labels = measured.images.labels
    assert torch.bincount(y, minlength=10).tolist() == (30 * np.bincount(labels, minlength=10)).tolist()


def test_batch_size_does_not_matter():
    denoiser, emas = network()
    losses = [part(7, batch_size=size).measure(denoiser, emas, ONE) for size in (1, 3, 7, 100)]
    for loss in losses[1:]:
        for a, b in ((losses[0].by_time, loss.by_time), (losses[0].by_ring, loss.by_ring)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def _process(rank, file, out):
    """One of two processes: seven images, and one, so that a process has none."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2, timeout=timedelta(minutes=3))
    losses = [part(n, batch_size=2).measure(*network(), World(rank, 2, rank)) for n in (7, 1)]
    torch.save([(loss.by_time, loss.by_ring) for loss in losses], f"{out}{rank}")
    dist.destroy_process_group()


def test_two_processes_measure_the_same(tmp_path):
    files = tmp_path / "rendezvous", tmp_path / "out"
    other = torch.multiprocessing.get_context("spawn").Process(target=_process, args=(1, *files), daemon=True)
    other.start()
    _process(0, *files)
    other.join()
    assert other.exitcode == 0
    for n, one, two in zip((7, 1), *(torch.load(tmp_path / f"out{rank}") for rank in (0, 1)), strict=True):
        alone = part(n).measure(*network(), ONE)
        for a, b, c in zip(one, two, (alone.by_time, alone.by_ring), strict=True):
            assert a.equal(b)
            torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-9)


def test_nothing_of_training_changes():
    denoiser, emas = network()
    before = [
        {k: v.clone() for k, v in state.items()} for state in (denoiser.state_dict(), *(e.averages for e in emas))
    ]
    state, addresses = torch.get_rng_state(), [p.data_ptr() for p in denoiser.parameters()]
    loss = part().measure(denoiser, emas, ONE)
    after = (denoiser.state_dict(), *(e.averages for e in emas))
    assert all(b[k].equal(a[k]) for b, a in zip(before, after, strict=True) for k in b)
    assert torch.get_rng_state().equal(state) and [p.data_ptr() for p in denoiser.parameters()] == addresses
    assert all(p.grad is None for p in denoiser.parameters()) and denoiser.training
    again = part().measure(denoiser, emas, ONE)
    assert loss.by_time.equal(again.by_time) and loss.by_ring.equal(again.by_ring)
    other = part(seed=SEED + 1).measure(denoiser, emas, ONE)
    assert not (loss.by_time == other.by_time).any()


def test_workers_are_started_once_and_are_gone():
    denoiser, emas = constant()
    alone, here = part().measure(denoiser, emas, ONE), set(torch.multiprocessing.active_children())
    started = []
    with pytest.MonkeyPatch.context() as patch:
        start = BaseProcess.start
        patch.setattr(BaseProcess, "start", lambda self: (started.append(self), start(self)))
        loss = part(num_workers=2).measure(denoiser, emas, ONE)
    assert loss.by_time.equal(alone.by_time)
    assert len(started) == 2 and set(torch.multiprocessing.active_children()) == here


# --- which images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "count"), [("0.25", 10), ("0.9", 36), ("0.03", 1)])
def test_a_fraction_is_held_out(fraction, count):
    whole = few_digits(16)
    rest, measured = hold_out(whole, settings(val_split=fraction))
    assert len(measured.images) == count and len(rest) == 40 - count
    assert sorted([*rest.numbers, *measured.images.numbers]) == list(range(40))  # disjoint, and all of them
    for view in (rest, measured.images):
        assert (view.name, view.img_size, view.in_memory, view.flip) == ("digits", 16, True, False)
        assert view.class_names == whole.class_names and len(view.labels) == len(view)
        for i in range(len(view)):
            (a, la), (b, lb) = view[i], whole[int(view.numbers[i])]
            assert a.equal(b) and la == lb == view.labels[i]


def test_which_images_depends_on_seed_and_size_alone():
    def numbers(**changes):
        return set(part(40, **changes).images.numbers)

    assert numbers() == numbers(batch_size=1, val_rings=False)
    assert numbers() != numbers(seed=SEED + 1)
    assert numbers(val_split="0.1") < numbers() < numbers(val_split="0.5")
    torch.manual_seed(1)
    assert numbers() == numbers()
    order = random_order(50_000, 0)
    assert sorted(order) == list(range(50_000)) and abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.02


def test_at_most_val_images_are_measured():
    """They are spread over the classes, though the images of a folder are in the order of classes."""
    rest, measured = hold_out(few_digits(16), settings(val_split="0.5", val_images=7))
    assert len(rest) == 20 and len(measured.images) == 7
    few = hold_out(few_digits(16), settings(val_split="0.5", val_images=3))[1]
    assert set(few.images.numbers) < set(measured.images.numbers) and not set(few.images.numbers) & set(rest.numbers)
    assert list(random_order(1000, 0)[:100]) != list(range(100))


def test_a_split_of_the_data_set(here):
    """The training images stay, and the validation images are those of its folder."""
    images(here / "data", "a", "b", size=(16, 16), count=3)
    (here / "data" / "train").rename(here / "data" / "val")
    images(here / "data", "a", "b", size=(16, 16), count=2)
    whole = build_dataset("imagefolder", "data", 16)
    same, measured = hold_out(whole, settings(val_split="val", data_path="data"))
    assert same is whole and len(measured.images) == 6 and measured.images.whole.folder == here / "data" / "val"


def test_cifar10_test_split(monkeypatch):
    from util import cifar10

    asked = []

    def load(path, split):
        asked.append(split)
        return np.zeros((12, 32, 32, 3), np.uint8), np.arange(12) % 10

    monkeypatch.setattr(cifar10, "load", load)
    whole = build_dataset("cifar10", None, 32)
    for split in ("test", "val"):
        same, measured = hold_out(whole, settings(val_split=split))
        assert same is whole and len(measured.images) == 12
        few = hold_out(whole, settings(val_split=split, val_images=4))[1].images  # not the first of the folder
        assert set(few.numbers) == set(random_order(12, SEED)[:4]) != set(range(4))
    assert asked == ["train"] + ["test"] * 4


def test_off_is_the_data_set_itself():
    whole = few_digits(16)
    assert hold_out(whole, settings(val_split=None)) == (whole, None)


# --- within training ------------------------------------------------------------------------------------------------


def test_the_measurement_is_the_same_in_every_epoch(here, capsys):
    """Nothing is learnt at learning rate 0, so every number is the same, of weights and averages."""
    run = train(here / "run", val_split="0.2", val_rings=True, lr=0, epochs=3, val_freq=2)
    first, second = read_log(run, "val")
    assert (first.pop("epoch"), second.pop("epoch")) == (1, 2) and (first.pop("step"), second.pop("step")) == (4, 6)
    for line in (first, second):
        assert line.pop("seconds") > 0
    assert first == second and first["num_images"] == 8 and np.shape(first["rings_model"]) == (BINS, 12)
    assert first["loss_model"] == first["loss_ema1"] == first["loss_ema2"] > 0
    assert {f"loss_ema2_t{b}" for b in range(BINS)} < set(first)
    assert read_log(run, "start")[0]["steps_per_epoch"] == 2  # 32 images
    lines = [line for line in capsys.readouterr().out.splitlines() if ": held-out loss model" in line]
    assert len(lines) == 2 and lines[0].startswith("epoch 2/3: ") and "8 images" in lines[0]


def test_it_measures_what_training_learns(here):
    run = train(here / "run", val_split="0.2", epochs=6, lr=3e-3)
    lines = read_log(run, "val")
    assert len(lines) == 6 and lines[-1]["loss_model"] < lines[0]["loss_model"]
    assert len({lines[-1][f"loss_{name}"] for name in held_out.WEIGHTS}) == 3


def test_training_is_the_same_with_a_named_split_as_without(here):
    """To the bit, also with dropout, whose masks come from torch's own generator."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (here / "data" / split / name).mkdir(parents=True)
            for i in range(8):
                picture = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i)).byte().numpy()
                main_jit.to_pil(torch.from_numpy(picture).permute(2, 0, 1)).save(
                    here / "data" / split / name / f"{i}.png"
                )
    data = {"dataset": "imagefolder", "data_path": here / "data", "class_num": 2, "batch_size": 8, "num_workers": 1}
    without = train(here / "without", **data, attn_dropout=0.3)
    measured = train(here / "with", **data, attn_dropout=0.3, val_split="val", val_images=5)
    assert state_differences(without, measured) == [] and read_log(without) == read_log(measured)
    assert [line["num_images"] for line in read_log(measured, "val")] == [5, 5]
    assert read_log(without, "val") == []


def test_an_interrupted_run_measures_the_same(here):
    whole = train(here / "whole", val_split="0.2")
    train(here / "parts", val_split="0.2", epochs=1)
    parts = here / "parts"
    assert main_jit.main(arguments(output_dir=parts, val_images=3)) == 0  # --val_split is the checkpoint's
    assert state_differences(whole, parts) == []
    assert [line["num_images"] for line in read_log(parts, "val")] == [8, 3]
    assert read_log(whole, "val")[0]["loss_ema1"] == read_log(parts, "val")[0]["loss_ema1"]


def test_weights_that_know_the_held_out_images(here, trained, capsys):
    for changes, warned in (({"val_split": "0.2"}, True), ({"val_split": None}, False)):
        capsys.readouterr()
        train(here / "run", init_from=trained, epochs=1, **changes)
        assert ("may have been trained on the held-out images" in capsys.readouterr().err) == warned
        (here / "run" / "checkpoint-last.pth").unlink()
    args = settings(dataset="digits")
    assert held_out.seen_before(args, vars(args)) == []
    assert held_out.seen_before(args, {**vars(args), "seed": 9})
    assert held_out.seen_before(settings(val_split="val", dataset="x"), {}) == []


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.1", "nan", "inf", "train", "x", ""])
def test_no_fraction_and_no_split(refuses, text):  # noqa: F811
    refuses([*arguments(output_dir="out"), f"--val_split={text}"], f"--val_split {text}", "fraction")


def test_what_cannot_be_held_out(here, refuses):  # noqa: F811
    refuses(arguments(output_dir="out", val_split="val"), "--val_split val", "digits have no split", "fraction")
    for fraction in ("0.01", "0.99"):
        refuses(arguments(output_dir="out", val_split=fraction), f"--val_split {fraction}", "of 40 images")
    refuses(arguments(output_dir="out", val_split="0.7"), "12 images", "fewer than one global batch")
    data = arguments(
        output_dir="out", dataset="imagefolder", data_path="data", class_num=2, val_split="val", batch_size=2
    )
    images(here / "data", "a", "b", size=(16, 16))
    refuses(data, "--val_split val", "no validation images", here / "data" / "val")
    refuses([*data, "--val_split=test"], "--val_split test", "no split 'test'")
    for folders in (("a",), ("a", "b"), ("a", "c")):
        for name in folders:
            (here / "data" / "val" / name).mkdir(parents=True, exist_ok=True)
        refuses(data, "--val_split val", here / "data")


def test_images_that_a_checkpoint_was_trained_on(here, refuses):  # noqa: F811
    run = train(here / "run", epochs=1)
    refuses(arguments(output_dir=run, val_split="0.2"), "--val_split 0.2", "trained with None")
    content = raw(run)
    del content["args"].val_split  # a checkpoint of before the flag
    torch.save(content, run / "checkpoint-last.pth")
    refuses(arguments(output_dir=run, val_split="0.2"), "--val_split 0.2", "on all images")
    with pytest.raises(UserError, match="on all images"):
        hold_out(few_digits(16), settings(), {"val_split": "0.1"})


def test_flags_without_held_out_images_are_named(tmp_path, capsys):
    train(tmp_path / "run", epochs=1, val_freq=1, val_images=3)
    assert "--val_images, --val_freq: no effect without --val_split" in capsys.readouterr().err
