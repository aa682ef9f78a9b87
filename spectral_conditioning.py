"""Schedules of single images: training times of their own, and a network that is told which schedule a sample has.

Times of an image's own schedule tilt the data that the network sees at each t. A network that is told (lambda_0,
lambda_1) of that schedule learns the velocity given both, and sampling along a drawn schedule tells it the same. With
the variant `logsnr` this is exact, since the two numbers are then all that the density of t depends on; with the others
what the rest of the spectrum adds to it is left out.

An image's schedule is that of its FIT (spectral_schedule), from which generated images draw theirs: sampling asks the
network at the times that it was trained at.

Shapes: B images x (B, 3, H, W) in [-1, 1]; bounds (B, 2), the two numbers; D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_schedule import TightSchedule, TrainingTimes
from util.spectrum import rapsd
from util.spectrum_file import image_fits


class ImageSchedules(nn.Module):
    """x -> the tight schedules of its images, without parameters and without state-dict entries.

    Args:
        level: mean pixel of each channel over the data set, (3,), in [-1, 1].
        delta, noise_scale: as in TightSchedule.
    """

    def __init__(self, img_size: int, level: Sequence[float], delta: float, noise_scale: float = 1.0):
        super().__init__()
        self.settings = {"img_size": img_size, "delta": delta, "noise_scale": noise_scale}
        self.register_buffer("level", torch.tensor(level, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, variant: str = "logsnr") -> TightSchedule:
        fits = image_fits(rapsd(x), x.double().mean((2, 3)), self.level, self.settings["img_size"])  # (B, 4)
        return TightSchedule.of_fits(fits, variant=variant, **self.settings)

    def extra_repr(self) -> str:
        return f"level={self.level.tolist()}, {self.settings}"


@dataclass(frozen=True)
class InstanceTimes:
    """Density of training times: that of the schedule of each image, uniform with probability `uniform_mix`.

    examples: FIT (N, 4) of images of the data set; the mean of their densities stands for that of all images.
    """

    schedules: ImageSchedules
    variant: str
    uniform_mix: float
    examples: Tensor

    def of_images(self, x: Tensor) -> TrainingTimes:
        return TrainingTimes(self.schedules(x, self.variant), self.uniform_mix)

    def draw(self, seed: int, step: int, position: Tensor) -> Tensor:
        raise TypeError("times of their own are drawn for images: of_images(x).draw(seed, step, position)")

    def cdf(self, t: Tensor) -> Tensor:
        """Probability of a time below t, for an image at random: (M,) in [0, 1] -> float64 (M,)."""
        schedules = TightSchedule.of_fits(self.examples, variant=self.variant, **self.schedules.settings)
        times = TrainingTimes(schedules, self.uniform_mix)
        return torch.stack([times.cdf(time.expand(len(self.examples))).mean() for time in t])


class ScheduleEmbedder(nn.Module):
    """bounds (B, 2) -> (B, D): a linear map of cosines and sines of both numbers.

    The angles are lambda times 2^-6 to 2, so that the ranges of images, about -8 to 12, are told apart to less than 1.
    Making it draws no random number: the other weights of a network are then the same with it and without.
    """

    frequencies = 32

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, 4 * self.frequencies))

    def forward(self, bounds: Tensor) -> Tensor:
        omega = torch.linspace(-6, 1, self.frequencies, device=bounds.device).exp2()
        angle = bounds.float()[..., None] * omega  # (B, 2, 32)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).flatten(1)  # (B, 128)
        return F.linear(features.to(self.weight.dtype), self.weight)
