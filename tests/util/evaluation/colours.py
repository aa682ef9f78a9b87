"""Extractors that stand in for the networks: mean and standard deviation of each colour, made in a moment."""

from dataclasses import replace

import numpy as np
import torch

from spectral_ops.spectrum import grey_spectrum
from util.evaluation.features import SPATIAL, Extractor
from util.evaluation.metrics import METRICS
from util.evaluation.reference import Moments, save_reference

DIM, SIZE = 6, 32
noise = torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
level = torch.linspace(60, 200, 40)[:, None, None, None] * torch.tensor([1.0, 0.7, 0.4])[:, None, None]
REAL = (level + 15 * noise + 20 * noise[:, :1, :1]).clamp(0, 255).round().to(torch.uint8)  # brighter and brighter


class Colours(Extractor):
    """In the place of Inception."""

    name, sha256, streams = "inception", "abc", {"inception_2048": DIM}

    def _features(self, images):
        x = images.float() / 255  # (B, 3, H, W)
        return dict.fromkeys(self.streams, torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1))  # (B, 6)


class SpatialColours(Colours):
    """With another stream in the place of sFID's."""

    streams = {**Colours.streams, SPATIAL: DIM}  # noqa: RUF012

    def _features(self, images):
        features = super()._features(images)
        return {**features, SPATIAL: 2 * features["inception_2048"].flip(1)}


class OtherColours(Colours):
    """In the place of EfficientNet-Lite0."""

    name, streams = "effnet_lite0", {"effnet_lite0": DIM}


def use_colours(patch) -> None:
    """Replace the networks in METRICS."""
    for name, metric in METRICS.items():
        if metric.stream in ("inception_2048", "effnet_lite0"):
            fake = Colours if metric.stream == "inception_2048" else OtherColours
            patch.setitem(METRICS, name, replace(metric, extractor=fake))


def meta(**changes) -> dict:
    values = {
        "dataset": "digits",
        "split": "train",
        "img_size": SIZE,
        "crop": "none",
        "extractor": "inception",
        "extractor_sha256": "abc",
        "num_images": 50,
        "heldout_images": 10,
        "date": "2026-01-01",
    }
    return values | changes


def extras(network=Colours) -> dict[str, np.ndarray]:
    """The optional arrays of a reference file of REAL."""
    features = network()(REAL)[next(iter(network.streams))].numpy()
    return {"features": features, "grey_spectrum": grey_spectrum(REAL).mean(dim=0).numpy()}


def write_reference(path, network=Colours, **more):
    """Write a reference file of REAL with the optional arrays `more`. Return its path."""
    moments = Moments(DIM)
    moments.update(network()(REAL)[next(iter(network.streams))])
    save_reference(path, {**moments.finish(), **more}, meta(extractor=network.name))
    return path
