"""Noise schedules of single images, for training times and for a network that is conditioned on them.

If the times of an image come from its own schedule, some images are seen more often than others at each t. A network
that is conditioned on (lambda_0, lambda_1) of the schedule learns the velocity given both numbers, and sampling along
a drawn schedule passes in the two of that schedule. For the variant `logsnr` this is exact: the density of t depends on
them alone. An image's schedule follows from its FIT (spectral_ops/schedule.py); generated images draw a FIT.

Shapes: B images x (B, 3, H, W) in [-1, 1]; logsnr_range (B, 2), the two numbers; D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_ops.schedule import GlobalTimeSampler, TightSchedule
from spectral_ops.spectrum import image_fits, rapsd


class ImageSchedules(nn.Module):
    """x -> the tight schedules of its images, without parameters and without state-dict entries.

    `level` is the mean pixel of each channel over the data set, (3,), in [-1, 1].
    """

    def __init__(self, img_size: int, level: Sequence[float], delta: float, noise_scale: float = 1.0):
        super().__init__()
        self.settings = {"img_size": img_size, "delta": delta, "noise_scale": noise_scale}
        self.mean_pixel = tuple(level)
        self.register_buffer("level", torch.tensor(self.mean_pixel, dtype=torch.float64), persistent=False)

    def _apply(self, fn, recurse=True):
        """Make the buffer anew: `to_empty` leaves it uninitialised, and it stays in float64."""
        super()._apply(fn, recurse)
        self.level = torch.tensor(self.mean_pixel, dtype=torch.float64, device=self.level.device)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, variant: str = "logsnr") -> TightSchedule:
        fits = image_fits(rapsd(x), x.double().mean((2, 3)), self.level, self.settings["img_size"])  # (B, 4)
        return TightSchedule.of_fits(fits, variant=variant, **self.settings)


@dataclass(frozen=True)
class InstanceTimeSampler:
    """Training times from the schedule of each image, uniform with probability `uniform_mix`.

    examples: FIT (N, 4) of images of the data set; the mean of their densities stands for that of all images.
    """

    schedules: ImageSchedules
    variant: str
    uniform_mix: float
    examples: Tensor

    def for_images(self, x: Tensor) -> GlobalTimeSampler:
        """Return the sampler for a batch x (B, C, H, W)."""
        return GlobalTimeSampler(self.schedules(x, self.variant), self.uniform_mix)

    def sample(self, rng) -> Tensor:
        raise TypeError("instance times need images: call for_images(x).sample(rng)")

    def cdf(self, t: Tensor) -> Tensor:
        """Return the probability of a time below t for a random image: (M,) in [0, 1] -> float64 (M,)."""
        schedules = TightSchedule.of_fits(self.examples, variant=self.variant, **self.schedules.settings)
        times = GlobalTimeSampler(schedules, self.uniform_mix)
        return torch.stack([times.cdf(time.expand(len(self.examples))).mean() for time in t])


class ScheduleEmbedder(nn.Module):
    """logsnr_range (B, 2) -> (B, D): a linear map, zero at first, of cosines and sines of both numbers.

    The angles are lambda times 2^-6 to 2, so that differences below 1 are resolved over the range of images, -8 to 12.
    Construction draws no random number: the other weights of a network are the same with it and without.
    """

    frequencies = 32

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, 4 * self.frequencies))

    def forward(self, logsnr_range: Tensor) -> Tensor:
        omega = torch.linspace(-6, 1, self.frequencies, device=logsnr_range.device).exp2()
        angle = logsnr_range.float()[..., None] * omega  # (B, 2, 32)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).flatten(1)  # (B, 128)
        return F.linear(features.to(self.weight.dtype), self.weight)
