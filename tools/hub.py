"""A trained model as it travels: a folder, or a repository of the Hugging Face hub, with settings, weights and a card.

    config.json          what decides the model's function, operators included, and how its run samples
    model.safetensors    weights of the network and of its operators
    README.md            the model card; samples.png beside it, if the run has drawn these weights' samples

from tools.hub import SpectralJiT
model = SpectralJiT.from_pretrained("output/demo/hub")      # or "user/name"
images = model.sample([3, 1, 4], cfg=1.5)                   # uint8 (3, 3, H, W)

Shapes: B images (B, 3, H, W), H = W; t, y (B,).
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from util.build import autocast_dtype, build_denoiser, denoiser_settings
from util.checkpoint.published import load_weights, read_safetensors, write_safetensors
from util.config import check, config_class, resolve
from util.dist.context import DistContext
from util.errors import UserError
from util.evaluation.generate import generate_all
from util.io import write_json
from util.log import warn
from util.schedules import spectrum_warnings

CONFIG, WEIGHTS, CARD, SAMPLES = "config.json", "model.safetensors", "README.md", "samples.png"
LIBRARY, TAGS = "spectral-jit", ("diffusion", "flow-matching", "image-generation", "pixel-space")
# Settings of sampling that a run's own are the default of; those of one call are not kept.
SAMPLING = ("cfg", "interval_min", "interval_max", "sampling_method", "num_sampling_steps", "sampling_grid")
SAMPLING += ("spectral_variant", "spectral_delta", "sample_t_eps")
OF_A_CALL = ("gen_bsz", "spectrum_file", "vae", "vae_tiled")


def hub_settings(config: Any) -> dict[str, Any]:
    """Return what config.json holds: what decides the model's function, and how it is sampled by default."""
    settings = denoiser_settings(config) | {name: getattr(config, name) for name in (*SAMPLING, "precision")}
    if config.latents:  # without the folder on this machine
        vae = config.latents["vae"]
        name = Path(vae["name"]).name if Path(vae["name"]).is_absolute() else vae["name"]
        settings["latents"] = config.latents | {"vae": vae | {"name": name}}
    trained_with = {} if config.spectrum_sha256 is None else {"spectrum_sha256": config.spectrum_sha256}
    return settings | trained_with


class SpectralJiT(nn.Module, ModelHubMixin, library_name=LIBRARY, tags=list(TAGS)):
    """A denoiser (network, operators and prediction) with `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Args:
        config: the content of a config.json; the weights are fresh.
        device: as in `main_jit.py --sample`, the network computes in bf16 on CUDA and in float32 on a CPU; weights
            stay in float32.

    Raises:
        UserError: settings of another project, or that do not fit together.
    """

    def __init__(self, config: dict[str, Any], device: str | torch.device = "cpu"):
        super().__init__()
        if "model" not in config:
            raise UserError(f"{CONFIG} names no model of this project: tools.export --format hub writes one that does.")
        if unknown := sorted(config.keys() - {field.name for field in dataclasses.fields(config_class())}):
            raise UserError(f"{CONFIG} has settings that this version does not know: {', '.join(unknown[:5])}.")
        self.settings, self.folder = dict(config), None
        self.config = resolve({}, config, training=False)
        check(self.config, evaluates=False)
        self.denoiser = build_denoiser(self.config)
        self.to(device).eval()

    def _apply(self, fn: Any, recurse: bool = True) -> "SpectralJiT":
        """Follow the module to its device, and compute there as `main_jit.py --sample` does."""
        super()._apply(fn, recurse)
        self.denoiser.autocast_dtype = autocast_dtype(self.config, self.device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, z: Tensor, t: Tensor, y: Tensor, logsnr_range: Tensor | None = None) -> Tensor:
        """Return the velocity (B, 3, H, W) at z and t in [0, 1] for classes y; class_num stands for "no class".

        logsnr_range (B, 2) is for a network that is conditioned on schedules.
        """
        return self.denoiser.velocity(z, t, y, logsnr_range=logsnr_range)

    def sample(self, labels: Sequence[int], seed: int = 0, **settings: Any) -> Tensor:
        """Return images uint8 (len(labels), 3, H, W) of the classes `labels`, in host memory.

        Image i depends on the weights, the settings, the seed, labels[i] and i. With the same ones it is, up to
        rounding, that of `main_jit.py --sample`.

        Args:
            settings: flags of `main_jit.py --sample`, such as cfg=1.5 or num_sampling_steps=20 (default: those of
                config.json); also gen_bsz, the images of a batch, and spectrum_file.

        Raises:
            UserError: labels or settings that the model does not have, or images that are not finite.
        """
        if unknown := settings.keys() - {*SAMPLING, *OF_A_CALL}:
            known = ", ".join(("seed", *SAMPLING, *OF_A_CALL))
            raise UserError(f"{', '.join(sorted(unknown))}: no setting of sampling; there are {known}.")
        if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(isinstance(y, int) for y in labels):
            raise UserError(f"The labels {labels!r} must be a list of class numbers, such as [3, 1, 4].")
        if wrong := [label for label in labels if not 0 <= label < self.config.class_num]:
            raise UserError(f"The labels {wrong} are no classes; the classes are 0 to {self.config.class_num - 1}.")
        config = resolve({"seed": seed, **settings}, self.config.as_dict(), training=False)
        if needs_spectrum(config) and config.spectrum_file is None:
            raise UserError("The noise schedules of this model need its data set's spectrum: give spectrum_file=PATH.")
        ctx = DistContext(device=self.device)
        warn([*check(config, evaluates=False), *spectrum_warnings(config)], ctx)
        return generate_all(self.denoiser, config, labels, ctx)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> "SpectralJiT":
        """Load a folder, or the model user/name of the hub; `kwargs` are those of ModelHubMixin, and `device`.

        Raises:
            UserError: no such model, or files that are not of this project or do not fit.
        """
        try:
            return super().from_pretrained(name, **kwargs)
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            where = "cannot be loaded" if Path(name).is_dir() else "is no folder, and no model that the hub gives"
            raise UserError(f"{name} {where}: {reason}") from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: dict[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ) -> "SpectralJiT":
        folder = Path(model_id)
        if not folder.is_dir():
            where = {"revision": revision, "cache_dir": cache_dir, "token": token}
            how = {"force_download": force_download, "local_files_only": local_files_only}
            folder = Path(snapshot_download(model_id, allow_patterns=[CONFIG, WEIGHTS, CARD, SAMPLES], **where, **how))
        if config is None:
            raise UserError(f"{model_id} has no {CONFIG}: it is no model that tools.export --format hub wrote.")
        model = cls(config, device)
        load_weights(model.denoiser, read_safetensors(folder / WEIGHTS)["model"], folder / WEIGHTS)
        model.folder = folder
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write settings and weights, and the card and samples that the model was loaded with."""
        write_json(save_directory / CONFIG, self.settings)
        write_safetensors(save_directory / WEIGHTS, self.denoiser.state_dict(), {"format": "pt"})
        for name in (CARD, SAMPLES):
            if self.folder and (self.folder / name).is_file() and not (save_directory / name).exists():
                shutil.copyfile(self.folder / name, save_directory / name)


def needs_spectrum(config: Any) -> bool:
    """Whether the sampling schedules follow from the spectrum of the data set."""
    return config.sampling_grid != "uniform" or config.schedule_delta is not None
