"""Agreement of a CUDA device with the CPU, and what only such a device can show: `make test-gpu`."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import main_jit
from benchmarks import sampler, step
from benchmarks.graph import WARM_UP
from engine_jit import Trainer
from experiments.run import do
from experiments.train import Run
from sampler import guided, sample, uniform_grid
from spectral_forcing import SpectralForcing
from tests.conftest import flags, read_log, spectrum_of_digits, train
from tests.golden_inputs import GOLDEN, normals, small_denoiser
from util import rng
from util.dist.context import find_context
from util.rng import CounterRNG

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
        for draw, tolerance in ((CounterRNG.normal, 1e-6), (CounterRNG.uniform, 0.0)):
            for n in (1, 1000):
                on_cpu, on_gpu = (draw(CounterRNG(3, 5, i), "noise", n) for i in (index, index.cuda()))
                torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=10 * tolerance, atol=tolerance)
    finally:
        rng.use_compiler(False)


@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 2e-6), ("high", 5e-3)])
def test_spectral_forcing_in_float32_and_tf32(precision, tolerance):
    """TF32 cut off to 10 bits, not rounded, would be 3e-3."""
    operator, z, t = SpectralForcing(256), normals(1, 4, 3, 256, 256), torch.tensor([0.1, 0.4, 0.7, 1.0])
    expected = operator(z, t)
    torch.set_float32_matmul_precision(precision)
    error = operator.cuda()(z.cuda(), t.cuda()).cpu() - expected
    assert error.square().mean().sqrt() < tolerance * expected.square().mean().sqrt()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("convention", ["flow", "ddpm"])
def test_spectral_forcing_of_any_size_with_times_of_any_convention(convention, compiled):
    """An operator that stayed on the CPU serves images on the GPU; times out of range are refused in its first call."""
    table = torch.linspace(0.99, 0.01, 10) if convention == "ddpm" else None
    operator = SpectralForcing(time_convention=convention, alphas_cumprod=table)
    z, t = normals(1, 3, 4, 12, 20), torch.tensor([0, 1, 1] if convention == "flow" else [2, 9, 0])
    expected = operator(z, t)
    on_gpu = torch.compile(operator, fullgraph=True) if compiled else operator
    torch.testing.assert_close(on_gpu(z.cuda(), t.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="are not those of the convention"):
        SpectralForcing(time_convention=convention, alphas_cumprod=table)(z.cuda(), 700 + t.cuda())


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 5e-4), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_golden_samples(dtype, tolerance):
    """In bf16 a CPU is 0.015 off in the mean."""
    denoiser = small_denoiser(autocast_dtype=dtype).cuda()
    velocity = guided(denoiser.velocity, torch.tensor([1, 5, 9], device="cuda"), 10, 2.9, (0.1, 1.0))
    images = sample(velocity, normals(13, 3, 3, 32, 32).cuda(), uniform_grid(6), "heun").cpu()
    difference = (images - torch.from_numpy(GOLDEN["sample_heun"])).abs()
    assert difference.max() < tolerance if dtype is None else difference.mean() < tolerance


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"])
def test_attention_backends_agree(monkeypatch, backend):
    """In bf16, the type of queries, keys and values under autocast; loss and gradients, relative to the largest."""
    attention, seen, results = F.scaled_dot_product_attention, [], []
    spy = lambda q, k, v, **kwargs: seen.append(q.dtype) or attention(q, k, v, **kwargs)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for kernel in (SDPBackend.MATH, getattr(SDPBackend, backend)):
        denoiser = small_denoiser(autocast_dtype=torch.bfloat16).cuda()
        x, noise, t = normals(1, 4, 3, 32, 32).cuda(), normals(2, 4, 3, 32, 32).cuda(), torch.full((4,), 0.4).cuda()
        with sdpa_kernel(kernel):
            loss = denoiser(x, torch.tensor([0, 3, 9, 10]).cuda(), t, noise)
            results.append([loss, *torch.autograd.grad(loss, list(denoiser.parameters()))])
    assert set(seen) == {torch.bfloat16}
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 5e-2 * b.abs().max() + 1e-6


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """Flags of a run with levels of resolution."""
    path = spectrum_of_digits(tmp_path_factory.mktemp("spectrum") / "digits.npz")
    return {"resolution_schedule": "spectrum", "spectrum_file": path}


@pytest.mark.parametrize("resolution", ["off", "spectrum"])
@pytest.mark.parametrize("mode", ["off", "block"])
def test_training_does_not_wait_for_the_device_between_logs(tmp_path, monkeypatch, levels, mode, resolution):
    """Synchronising calls are errors within a step but the first, in which blocks and tables are made."""
    steps = []

    def train_step(self, batches, step, real=Trainer.train_step):
        torch.cuda.set_sync_debug_mode("error" if steps else "default")
        try:
            return real(self, batches, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            steps.append(step)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    train(tmp_path / "run", device="cuda", log_freq=100, compile=mode, **(levels if resolution == "spectrum" else {}))
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("resolution", ["off", "spectrum"])
def test_training_resumes_and_agrees_with_a_cpu(tmp_path, levels, resolution):
    folder, settings = tmp_path / "run", levels if resolution == "spectrum" else {}
    for epochs in (1, 2):
        train(folder, epochs=epochs, device="cuda", **settings)
    alone = train(tmp_path / "cpu", epochs=2, **settings)
    for a, b in zip(read_log(folder), read_log(alone), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)  # bf16 against float32
    assert main_jit.main(flags(resume=folder, sample=True, labels="0-3", num_per_class=2, device="cuda")) == 0


@pytest.mark.parametrize("compile", ["off", "block", "model"])
@pytest.mark.parametrize("how", [{}, {"activation_checkpointing": True}, {"parallel": "fsdp"}], ids=str)
def test_compilation_recomputation_and_sharding_do_not_change_the_loss(tmp_path, compile, how):
    settings = {"device": "cuda", "spectral_residual": "time_label"}
    fast = train(tmp_path / "run", **settings, **how, compile=compile)
    for a, b in zip(*map(read_log, (fast, train(tmp_path / "plain", **settings, compile="off"))), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


@pytest.mark.parametrize("compile", ["off", "block"])
def test_recorded_steps_and_velocities_agree(monkeypatch, capsys, compile):
    settings = {"model": "JiT-Demo/8", "img_size": 16, "batch_size": 8, "device": "cuda", "compile": compile}
    losses = []
    for graph in (False, True):
        torch.manual_seed(0)  # of the images
        trainer = step.Steps(settings, WARM_UP + 5, find_context("cuda"), graph).trainer
        losses.append(torch.stack([loss for _, (loss, _) in trainer.metrics.unread]))
    torch.testing.assert_close(*losses, rtol=2e-3, atol=0)
    argv = ["x", "--graph", "--model", "JiT-Demo/8", "--img_size", "16", "--gen_bsz", "4", "--num_sampling_steps", "8"]
    monkeypatch.setattr("sys.argv", [*argv, "--compile", compile])
    images, generate = [], sampler.generate
    monkeypatch.setattr(sampler, "generate", lambda *args: images.append(batch := list(generate(*args))) or batch)
    sampler.main()
    for ((_, x),) in images:
        assert (x.int() - images[0][0][1].int()).abs().max() <= 1


def test_a_run_of_a_study_agrees_with_a_cpu():
    settings = Run("noise", 16, "linear", 0, steps=20, images=16, times=4)
    tables = [torch.tensor(do(settings, torch.device(device))["excess"]) for device in ("cpu", "cuda")]
    torch.testing.assert_close(*tables, rtol=0.05, atol=1e-4)
