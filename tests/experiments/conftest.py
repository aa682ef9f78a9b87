"""Shared by the tests of studies: a stand-in for CIFAR-10 and for features, and results in a folder of the test."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
import torch.nn.functional as F

from experiments import data, run, samples, studies


class Pixels:
    """Stands in for the feature network: the mean of each channel in each quarter of an image."""

    def __call__(self, images):
        return {"effnet_lite0": F.adaptive_avg_pool2d(images.float(), 2).flatten(1)}


@cache
def smooth_images():
    """Random images uint8 (5200, 3, 32, 32) in three correlated channels, and classes."""
    rng = np.random.RandomState(0)
    k = np.maximum(np.hypot(*np.mgrid[:32, :32]), 1)
    grey = scipy.fft.idctn(rng.randn(5200, 1, 32, 32) / k, axes=(2, 3), norm="ortho")
    colour = scipy.fft.idctn(rng.randn(5200, 3, 32, 32) / k, axes=(2, 3), norm="ortho")
    images = torch.from_numpy(np.clip(128 + 400 * grey + 100 * colour, 0, 255).astype(np.uint8))
    return images, torch.arange(5200) % 10


@cache
def random_moments():
    """Mean and std of latents (5200, 1, 2, 4, 8, 8) that fall with frequency, and classes."""
    rng = np.random.RandomState(1)
    k = np.maximum(np.hypot(*np.mgrid[:8, :8]), 1)
    mean = scipy.fft.idctn(rng.randn(5200, 4, 8, 8) / k, axes=(2, 3), norm="ortho")
    moments = np.stack([mean, np.full_like(mean, 0.1)], axis=1)[:, None]
    return torch.from_numpy(moments.astype(np.float16)), torch.arange(5200) % 10


@pytest.fixture
def cifar10_of_noise(monkeypatch):
    """A stand-in for CIFAR-10 and its latents, which may not be here."""
    monkeypatch.setattr(data.Cifar10Latents, "_load", staticmethod(lambda split: random_moments()))
    monkeypatch.setattr(data.Cifar10, "_load", staticmethod(lambda split: smooth_images()))
    monkeypatch.setattr(data.Photographs, "pictures", {"train": 200, "test": 30})
    monkeypatch.setattr(samples, "EffNetLite0", Pixels)
    caches = [data.open_data, data.dct_ring_power, data.fft_ring_power]
    caches += [samples.extractor, samples.real_features, samples.real_spectrum]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Results and output in a folder of the test, and runs in this process."""
    monkeypatch.setattr(run, "REPOSITORY", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda n, *settings: ThreadPoolExecutor(1))
    return tmp_path


TOY = studies.Study("?", ("power2", "cifar10"), (16,), ("plain", "linear"), seeds=(0, 1, 2), steps=(2,), images=4)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
