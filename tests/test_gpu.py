"""What only a CUDA device can show: `make test-gpu`."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import engine_jit
import main_jit
from engine_jit import Sampling, build_optimizer, generate
from sampler import guided, sample, uniform_grid
from spectral_conditioning import ImageSchedules, InstanceTimes
from spectral_forcing import SpectralForcing
from spectral_schedule import VARIANTS, TightSchedule, TrainingTimes
from tests.conftest import arguments, flags, read_log, train
from tests.golden_inputs import GOLDEN, normals, small_denoiser
from util import rng
from util.acceleration import compile_network
from util.checkpoint_writer import HostCopy
from util.distributed import World
from util.ema import EMA
from util.rng import Stream
from util.window import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("tiny"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """main_jit.py turns TF32 on for the process, and convolutions use it anyway: that is 2e-3 off the golden images."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("compiled", [False, True])
def test_random_numbers_are_those_of_the_cpu(compiled):
    index = torch.arange(8)
    rng.use_compiler(compiled)
    try:
        for draw, tolerance in ((rng.normal, 1e-6), (rng.uniform, 0.0)):
            for n in (1, 1000):
                on_cpu, on_gpu = (draw(3, Stream.NOISE, 5, i, n) for i in (index, index.cuda()))
                torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=10 * tolerance, atol=tolerance)
    finally:
        rng.use_compiler(False)


@pytest.mark.parametrize("mode", ["off", "block"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_images_of_a_recorded_network(mode, dtype):
    """Guidance within an interval, three batches of which the last is smaller, while a thread draws noise."""
    sampling, labels = Sampling("heun", 6, 2.9, (0.1, 1.0), 0, 4), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    plain, recorded = small_denoiser(autocast_dtype=dtype).cuda(), small_denoiser(autocast_dtype=dtype).cuda()
    compile_network(recorded, mode)
    images = [
        torch.cat(list(generate(denoiser, how, labels, (3, 32, 32), 10, World(device=torch.device("cuda", 0))))).float()
        for denoiser, how in ((plain, sampling), (recorded, replace(sampling, cuda_graph=True)))
    ]
    difference = (images[0] - images[1]).abs()
    assert images[0].std() > 10 and difference.mean() < (0.05 if dtype is None else 3.0)  # levels of 255


@pytest.mark.parametrize("variant", VARIANTS)
def test_schedules_are_those_of_the_cpu(variant):
    power = torch.arange(1, 24).double() ** -2.9 * torch.logspace(-1, 1, 8, dtype=torch.float64)[:, None]  # (B, K)
    schedules = [TightSchedule.of_spectrum(p, p, 32, variant=variant) for p in (power, power.cuda())]
    assert schedules[1].sampling_grid(20).sub(schedules[0].sampling_grid(20)).abs().max() < 1e-6
    index = torch.arange(8)
    t, on_gpu = (TrainingTimes(s).draw(0, 0, i) for s, i in zip(schedules, (index, index.cuda()), strict=True))
    assert on_gpu.is_cuda and on_gpu.cpu().sub(t).abs().max() < 1e-6
    weights, theirs = (TrainingTimes(s).density(x) for s, x in zip(schedules, (t, t.cuda()), strict=True))
    torch.testing.assert_close(theirs.cpu(), weights, rtol=1e-6, atol=0)


def test_times_of_images_are_those_of_the_cpu_and_wait_for_nothing():
    x, position = torch.rand(8, 3, 32, 32) * 2 - 1, torch.arange(8)
    density = InstanceTimes(ImageSchedules(32, [0.1, 0.0, -0.1], 0.1), "mixed", 0.1, torch.empty(0, 4))
    expected, bounds = density.of_images(x).draw(0, 0, position), density.schedules(x).bounds
    x, position = x.cuda(), position.cuda()
    density.schedules.cuda()
    for mode in ("default", "error"):  # at first tables are made, and then nothing waits for the device
        torch.cuda.set_sync_debug_mode(mode)
        try:
            t, theirs = density.of_images(x).draw(0, 0, position), density.schedules(x).bounds
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert t.cpu().sub(expected).abs().max() < 1e-5
    torch.testing.assert_close(theirs.cpu(), bounds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"schedule": "power", "alpha": 2.0}, {"schedule": "snr"}])
def test_cutoffs_are_those_of_the_cpu(settings):
    power = (torch.arange(1, 24).double() ** -2.9).tolist() if settings["schedule"] == "snr" else None
    operator, t = SpectralForcing(32, 8, power=power, **settings), torch.linspace(0, 1, 101)
    expected = operator.cutoff(t)
    torch.testing.assert_close(operator.cuda().cutoff(t.cuda()).cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 2e-6), ("high", 5e-3)])
def test_spectral_forcing_in_float32_and_tf32(precision, tolerance):
    """TF32 cut off to 10 bits, not rounded, would be 3e-3."""
    operator, z, t = SpectralForcing(256), normals(1, 4, 3, 256, 256), torch.tensor([0.1, 0.4, 0.7, 1.0])
    expected = operator(z, t)
    torch.set_float32_matmul_precision(precision)
    error = operator.cuda()(z.cuda(), t.cuda()).cpu() - expected
    assert error.square().mean().sqrt() < tolerance * expected.square().mean().sqrt()


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 5e-4), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_golden_samples(dtype, tolerance):
    """In bf16 a CPU is 0.015 off in the mean."""
    denoiser = small_denoiser(autocast_dtype=dtype).cuda()
    velocity = guided(denoiser.velocity, torch.tensor([1, 5, 9], device="cuda"), 10, 2.9, (0.1, 1.0))
    images = sample(velocity, normals(13, 3, 3, 32, 32).cuda(), uniform_grid(6), "heun").cpu()
    difference = (images - torch.from_numpy(GOLDEN["sample_heun"])).abs()
    assert difference.max() < tolerance if dtype is None else difference.mean() < tolerance


def test_a_step_that_is_not_finite_touches_nothing():
    denoiser = small_denoiser().cuda()
    optimizer, ema = build_optimizer(denoiser, 0.1), EMA(denoiser, 0.9)
    before = [p.detach().clone() for p in denoiser.parameters()]
    for p in denoiser.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    ema.update(denoiser, optimizer.found_inf)
    assert all(torch.equal(p, b) for p, b in zip(denoiser.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ema.averages.values(), before, strict=True))


@pytest.mark.parametrize("mode", ["off", "block"])
def test_training_does_not_wait_for_the_device_between_logs(tmp_path, monkeypatch, mode):
    """Synchronising calls are errors from the forward pass of a step to the sums for the log: all of a step. Not in the
    first one, in which blocks are compiled and tables come to the device."""
    steps = []

    def begin(*args, real=engine_jit._forward_backward):
        torch.cuda.set_sync_debug_mode("error" if steps else "default")
        return real(*args)

    def end(*args, real=Window.add):
        real(*args)
        torch.cuda.set_sync_debug_mode("default")
        steps.append(args[1])

    monkeypatch.setattr(engine_jit, "_forward_backward", begin)
    monkeypatch.setattr(Window, "add", end)
    try:
        train(tmp_path / "run", device="cuda", log_freq=100, compile=mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == [0, 1, 2, 3]


def test_host_copy_is_done_when_it_returns():
    copy = HostCopy()
    for value in (1.0, 2.0):
        there = torch.full((1 << 22,), value, device="cuda")
        here = copy({"x": there})["x"]
        there.zero_()
        assert here.is_pinned() and here.unique().tolist() == [value]


def test_train_resume_and_sample(tmp_path):
    folder = tmp_path / "run"
    for epochs in (1, 2):
        assert main_jit.main(arguments(output_dir=folder, epochs=epochs, device="cuda")) == 0
    alone = tmp_path / "cpu"
    assert main_jit.main(arguments(output_dir=alone, epochs=2, device="cpu")) == 0
    for a, b in zip(read_log(folder), read_log(alone), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)  # bf16 against float32; on a CPU 6e-5
    assert main_jit.main(flags(resume=folder, sample=True, labels="0-3", num_per_class=2, device="cuda")) == 0


@pytest.mark.parametrize("compile", ["off", "block", "model"])
@pytest.mark.parametrize(
    "how", [{}, {"activation_checkpointing": True}, {"parallel": "fsdp"}, {"pad_swiglu": True}], ids=str
)
def test_what_makes_it_fast_or_small_does_not_change_the_loss(tmp_path, compile, how):
    settings = {"device": "cuda", "spectral_residual": "time_label"}
    runs = (
        train(tmp_path / "run", **settings, **how, compile=compile),
        train(tmp_path / "plain", **settings, compile="off"),
    )
    for a, b in zip(*map(read_log, runs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_attention_is_in_bf16_on_a_gpu(monkeypatch):
    product, seen = F.scaled_dot_product_attention, []

    def spy(q, k, v, **kwargs):
        seen.append(q.dtype)
        return product(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    denoiser = small_denoiser(autocast_dtype=torch.bfloat16).cuda()
    denoiser.velocity(torch.zeros(1, 3, 32, 32, device="cuda"), torch.zeros(1, device="cuda"), torch.tensor([0]).cuda())
    assert set(seen) == {torch.bfloat16}
