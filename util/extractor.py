"""What all feature extractors share: the check of the input, safe loading of weights, the form of the output.

B  images in a batch, uint8 (B, 3, H, W), RGB 0..255        F  features of one stream
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from util.errors import UserError


class MetricError(UserError):
    """A metric that was asked for cannot be computed. The message is one sentence for the user."""


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: Path) -> dict:
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


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within the block float32 matrix products are float32's also on a GPU, whatever training has asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Extractor:
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
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), without_tf32():
            features = self._features(images.to(self.device))
        return {stream: features[stream].float().cpu() for stream in self.streams}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError
