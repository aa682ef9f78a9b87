"""Shared by the tests: a model and a data set so small that a whole run takes about a second.

The fixture `tiny` registers the model as TINY. All of its weights are random: the real initialisation, which starts as
the zero function, would hide differences within a few steps.
"""

import hashlib
import json
import os
import time
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

import main_jit
from model_jit import JiT, JiT_models
from tools.measure_spectrum import measure
from util.checkpoint.files import NAME
from util.config import resolve
from util.data import loader
from util.data.datasets import Digits, build_dataset, of_classes
from util.data.spectrum_file import save_spectrum
from util.dist.context import DistContext

TINY = "JiT-Test/8"
ONE = DistContext()  # a single process on the CPU
FEW = 40  # images; with the global batch of ARGS two steps an epoch
SECRET = "0123456789abcdef0123456789abcdef01234567"


class RandomJiT(JiT):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)


TINY_MODEL = partial(
    RandomJiT,
    patch_size=8,
    hidden_size=32,
    depth=4,
    num_heads=2,
    bottleneck_dim=8,
    in_context_len=2,
    in_context_start=1,
)


class FewDigits(Digits):
    """The first FEW digits."""

    def __init__(self, img_size: int, channels: int | None = None):
        super().__init__(img_size)
        self._images, self.labels = self._images[:FEW], self.labels[:FEW]
        self.name, self.in_memory, self.channels = "digits", True, channels or 3


few_digits = lru_cache(FewDigits)


def spectrum_of_digits(path: Path, img_size: int = 16) -> Path:
    """Write a spectrum file of the first FEW digits. Return its path."""
    spectrum = measure(few_digits(img_size), np.arange(FEW))
    spectrum.meta["split"] = "train"
    save_spectrum(spectrum, path)
    return path


def few(name, data_path, img_size, split="train", channels=None, labels_file=None):
    """Stand in for build_dataset: of the digits the first FEW, other data sets as they are."""
    if name == "digits":
        images = few_digits(img_size, channels)
        return images if labels_file is None else of_classes(images, labels_file)
    return build_dataset(name, data_path, img_size, split, channels, labels_file)


def register(patch: pytest.MonkeyPatch) -> None:
    """Add the model TINY, and let training on the digits use the first FEW."""
    patch.setitem(JiT_models, TINY, TINY_MODEL)
    patch.setattr(loader, "build_dataset", few)


def arguments(**changes) -> list[str]:
    """Flags of a run with TINY, changed; None leaves a flag out, True and False are switches."""
    settings = {
        "dataset": "digits",
        "model": TINY,
        "img_size": 16,
        "batch_size": 16,
        "epochs": 2,
        "warmup_epochs": 0.5,
        "lr": 1e-3,
        "ema_decay1": 0.9,
        "ema_decay2": 0.5,
        "log_freq": 1,
        "num_sampling_steps": 2,
        "wandb_num_vis": 2,
        "wandb_mode": "disabled",
        "online_eval": False,
        "device": "cpu",
    }
    return flags(**{**settings, **changes})


def flags(**settings) -> list[str]:
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def train(folder: Path, code: int = 0, **changes) -> Path:
    assert main_jit.main(arguments(output_dir=folder, **changes)) == code
    return folder


CLOCK = ("time", "images_per_s", "data_wait")


def read_log(folder: Path, event: str = "train") -> list[dict]:
    """The lines of one event in a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines if line["event"] == event]


def raw(folder: Path) -> dict:
    """The content of a run's checkpoint, read without the code that is tested."""
    return torch.load(folder / NAME, weights_only=False)


def config_of(folder: Path):
    """The configuration of a run's checkpoint."""
    return resolve({}, vars(raw(folder)["args"]), training=False)


def differences(a, b, path: str = "") -> list[str]:
    """Where two nested structures of tensors and plain values differ in a single bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) and a.dtype == b.dtype else [path]
    if isinstance(a, dict):
        if not isinstance(b, dict) or list(a) != list(b):
            return [path]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


STATE = ("model", "model_ema1", "model_ema2", "optimizer", "epoch")


def state_differences(a: Path, b: Path) -> list[str]:
    """Differences between the checkpoints of two runs in all that training changes."""
    a, b = raw(a), raw(b)
    return differences({k: a[k] for k in STATE}, {k: b[k] for k in STATE})


def listing(*folders: Path) -> dict[str, str]:
    """Every file and folder below `folders`, with what is in it."""
    found = {}
    for path in (p for folder in folders for p in sorted(folder.rglob("*"))):
        found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def smooth_images(n: int, seed: int, contrast: float, size: int = 32) -> torch.Tensor:
    """uint8 (n, 3, size, size): blobs and noise whose strengths differ from image to image."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=g)
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    noise = torch.randn(n, 3, size, size, generator=g) * torch.rand(n, 1, 1, 1, generator=g) * 0.3
    return (((images - 0.5) * contrast + noise + 0.5) * 255).clamp(0, 255).round().to(torch.uint8)


def as_torchrun(rank: int, size: int, port: int) -> None:
    """Set the environment that torchrun gives a worker; the store behind the port is the agent's."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, TORCHELASTIC_USE_AGENT_STORE="True")


class Payload:
    """An object whose unpickling creates a folder."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def run_on(ranks: int, work, folder, calls: int) -> None:
    """Run `work(rank, folder, ports)` on that many ranks, which make a process group `calls` times."""
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(calls)]
    processes = torch.multiprocessing.spawn(work, (folder, [s.port for s in stores]), nprocs=ranks, join=False)
    end = time.monotonic() + 180
    while not processes.join(1):  # raises what a process has raised
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"{ranks} processes did not finish in 180 s")


@contextmanager
def tiny_runs():
    """Register TINY and FEW digits inside the block, on one thread: more threads round sums differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            register(patch)
            yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    """TINY and FEW digits, on one thread."""
    with tiny_runs():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run of two epochs. Read it, do not write to it."""
    with tiny_runs():
        return train(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A state dict of torch-fidelity's Inception with random weights that let features vary between images."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            fan_in = layer.weight[0].numel()
            layer.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        elif isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the plain average of what it sees next
    network.train()
    network(smooth_images(8, 99, 1.0))  # sets the running statistics, so that signals keep their size
    network.eval()
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty torch hub cache, no variable, and a download that fails at once."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, so that what would be written by default is seen."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
