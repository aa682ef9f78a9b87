"""How a network samples: z on its way from noise to an image, what the network sees of it, and what it predicts.

Shapes: M times that are kept, B images (B, C, H, W), K rings of frequency.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import main_jit
from denoiser import Denoiser, one_minus
from sampler import Velocity
from spectral_ops.spectrum import rapsd
from tools.explorer.runs import COLOURS
from tools.export import load_denoiser
from tools.hub import SpectralJiT
from util.config import check, resolve
from util.data.images import quantise
from util.dist.context import DistContext
from util.evaluation.generate import own_t_eps, sample_batch, sampling_mode, start_noise
from util.evaluation.images import rgb
from util.evaluation.plots import new_figure
from util.resume import load_for_inference
from util.rng import CounterRNG
from util.schedules import SampleSchedules


@dataclass(frozen=True)
class Trajectory:
    t: Tensor  # (M, 1), or (M, B) if each image has its own sampling grid
    z: Tensor  # (M, B, C, H, W)
    seen: Tensor  # the same after the input operator
    predicted: Tensor  # x that the velocity at z points to, guidance included
    x: Tensor  # (B, C, H, W): the images
    labels: tuple[int, ...]  # the classes of the B images


def load_network(path: Path, ema: str, device: torch.device) -> tuple[Denoiser, Any]:
    """Return denoiser and configuration of what `find_networks` has found.

    Raises:
        UserError: weights that are damaged or of another network.
    """
    folder, name = (path, None) if path.is_dir() and path.suffix != ".dcp" else (path.parent, path.name)
    if path.suffix == ".safetensors":
        denoiser, config = load_denoiser(path, device)
    elif name is None and not any(folder.glob("checkpoint-*")):
        model = SpectralJiT.from_pretrained(path, device=device)
        denoiser, config = model.denoiser, model.config
    else:
        given = {"resume": str(folder), "ema": ema} | ({"checkpoint": name} if name else {})
        config, checkpoint = load_for_inference(given, "sample")
        check(config, evaluates=False)
        denoiser = main_jit.load_denoiser(config, checkpoint, DistContext(device=device))
    return denoiser, replace(config, data_path=None)


def with_settings(config: Any, settings: dict[str, Any]) -> Any:
    """Return the configuration with other settings of sampling. UserError for those that cannot work."""
    config = resolve(settings, config.as_dict(), training=False)
    check(config, evaluates=False)
    return config


def follow(
    denoiser: Denoiser,
    config: Any,
    labels: Sequence[int],
    columns: int = 6,
    on_step: Callable[[float], Any] = lambda t: None,
) -> Trajectory:
    """Sample images of the classes `labels` as `main_jit.py --sample` does, and keep what happens at `columns` times.

    With v the velocity of the solver, guidance included, the prediction is z + max(1 - t, t_eps) v. Without guidance
    it is what a network that predicts x gives out.

    Args:
        on_step: is called with t before each evaluation of the network; what it raises ends the computation.

    Raises:
        UserError: images that are not finite; a spectrum file that is missing.
    """
    device = next(denoiser.parameters()).device
    index, y = range(len(labels)), torch.tensor(labels, device=device)
    schedules = SampleSchedules.from_config(config)
    grid, _ = schedules.times(config.num_sampling_steps, CounterRNG(config.seed, 0, torch.tensor(index)), y.cpu())
    grid, t_eps = grid.float().reshape(len(grid), -1), own_t_eps(config, schedules)  # (S + 1, 1 or B)
    steps = torch.linspace(0, config.num_sampling_steps - 1, min(columns, config.num_sampling_steps)).round().long()
    wanted, kept = {tuple(grid[i].tolist()) for i in steps}, {}

    def watch(velocity: Velocity) -> Velocity:
        def recorded(z: Tensor, t: Tensor) -> Tensor:
            on_step(float(t.min()))
            v = velocity(z, t)
            if (key := tuple(t.tolist())) in wanted:  # Heun's guess comes first, and is replaced
                kept[key] = t, z, v
            return v

        return recorded

    with sampling_mode(denoiser):
        x = sample_batch(denoiser, config, index, schedules, y, start_noise(config, index).to(device), watch)
        states = [state for _, state in sorted(kept.items())]
        operator = denoiser.input_operator or (lambda z, t: z)
        seen = [operator(z, t.to(device)) for t, z, _ in states]
        bound = denoiser.noisy_images.t_eps if t_eps is None else t_eps
        bound = 0.0 if config.pred_param == "v" else bound
        predicted = [z + one_minus(t.to(device), bound) * v for t, z, v in states]
    t, z, _ = zip(*states, strict=True)
    pictures = (torch.stack(part).cpu() for part in (z, seen, predicted))
    return Trajectory(torch.stack(t), *pictures, x.cpu(), tuple(labels))


NAMES = {"z": "z", "seen": "what the network sees", "predicted": "prediction $\\hat x$"}


def draw(trajectory: Trajectory, image: int, power: tuple[float, float]) -> Figure:
    """Draw z, seen and prediction of one image at each time, and below them their power spectra P_k.

    `power` are the ends of the axis of power, so that two figures can be compared.
    """
    t = trajectory.t[:, min(image, trajectory.t.shape[1] - 1)]
    figure = new_figure(1.3 * (len(t) + 1) + 0.8, 6.2)
    axes = figure.subplots(4, len(t) + 1, height_ratios=(1, 1, 1, 1.35))
    for (name, about), line in zip(NAMES.items(), axes, strict=False):
        pictures = rgb(quantise(getattr(trajectory, name)[:, image])).permute(0, 2, 3, 1)
        for ax, picture in zip(line, pictures, strict=False):
            ax.imshow(picture.numpy(), interpolation="nearest")
        line[0].set_ylabel(about.replace("the network sees", "the\nnetwork sees"))
        for ax in line:
            ax.set(xticks=[], yticks=[])
    axes[0, -1].imshow(rgb(quantise(trajectory.x[image : image + 1]))[0].permute(1, 2, 0).numpy())
    for ax in axes[1:3, -1]:
        ax.set_axis_off()
    for column, ax in enumerate(axes[3]):
        last = column == len(t)
        axes[0, column].set_title("t = 1: image" if last else f"t = {t[column]:.2f}")
        for (name, about), colour, dashes in zip(NAMES.items(), COLOURS, ("-", "--", "-"), strict=False):
            if not last:
                spectrum = rapsd(getattr(trajectory, name)[column, image : image + 1])[0]
                ax.plot(spectrum, color=colour, linestyle=dashes, linewidth=1.6, label=about)
        ax.plot(rapsd(trajectory.x[image : image + 1])[0], color="black", linewidth=1, linestyle=":", label="image")
        ax.set(yscale="log", ylim=power, xlabel="cycles per image")
        ax.grid(alpha=0.3)
        if column:
            ax.tick_params(labelleft=False)
    axes[3, 0].set_ylabel("power $P_k$")
    handles, labels = axes[3, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def power_range(trajectory: Trajectory, image: int = 0) -> tuple[float, float]:
    """Return the ends of an axis of power on which z, predictions and image fit; what the operator removes may not."""
    parts = torch.cat([trajectory.z[:, image], trajectory.predicted[:, image], trajectory.x[image : image + 1]])
    power = rapsd(parts)
    return max(float(power.min()) / 2, 1e-6), float(power.max()) * 2
