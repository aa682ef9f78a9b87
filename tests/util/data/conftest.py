"""A small image folder, and latents of it, made with a tiny and random VAE of diffusers."""

import math

import pytest
import torch

from tests.conftest import ONE
from tests.util.data.image_files import SIZE, make_folder
from util.data import encode
from util.data.datasets import build_dataset
from util.data.encode import write_latents
from util.data.vae import load_vae

COUNTS = {"a": 6, "b": 7, "c": 5}  # blocks of 5, 5, 5 and 3 images
SHAPE = (2, 2, 4, 8, 8)  # of an item: f = 2
ITEM = 2 * math.prod(SHAPE)  # bytes
CPU = torch.device("cpu")


def random_vae(seed=0, **changes):
    import diffusers  # optional

    torch.manual_seed(seed)
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "sample_size": 16,
        "scaling_factor": 0.7,
        "shift_factor": 0.3,
    }
    return diffusers.AutoencoderKL(**{**settings, **changes}).eval()


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    random_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_vae(vae_folder, CPU)


@pytest.fixture
def small_blocks(monkeypatch):
    """A few images fill several blocks of latents."""
    monkeypatch.setattr(encode, "BLOCK_BYTES", 5 * ITEM + 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """An image folder with two splits."""
    make_folder(tmp_path / "images" / "train", COUNTS, size=(21, 18))
    return make_folder(tmp_path / "images" / "val", {"a": 1, "b": 2, "c": 1}).parent


@pytest.fixture
def out(folder, tmp_path, vae):
    """Finished latents of the training images."""
    write(folder, tmp_path / "latents", vae)
    return tmp_path / "latents" / "train"


def write(folder, out, vae, **options):
    images = build_dataset("imagefolder", folder, SIZE)
    return write_latents(images, vae, out / "train", ONE, **{"batch_size": 2, "num_workers": 0, **options})[0]


def pixels(images, numbers):
    return torch.stack([images[i][0] for i in numbers])


def command(vae_folder, *words):
    flags = ["--vae", vae_folder, "--img_size", SIZE, "--batch_size", 2, "--num_workers", 0, "--device", "cpu"]
    return ["latents", *map(str, (*flags, *words))]
