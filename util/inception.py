"""torch-fidelity's Inception, the network of FID, IS, KID, precision and recall, and how its weights are found.

B  images in a batch, uint8 (B, 3, H, W); the network resizes them to 299 x 299 itself
"""

import os
import pickle
import re
import socket
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor

from util.extractor import Extractor, MetricError, file_sha256, load_tensors

INCEPTION_VARIABLE = "INCEPTION_WEIGHTS"


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
        load_tensors(path)
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


class InceptionV3(Extractor):
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
