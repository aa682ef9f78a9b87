"""What Spectral Forcing costs in principle, without training: the best linear denoiser that sees only s = SF_t(z).

For a mode of variance P, mask M and noise (1 - t)^2 the least possible error of x is P (1 - t)^2 / (t^2 P + (1 - t)^2).
In exact arithmetic nothing is lost, since M > 0. Four readings of what is lost in practice, as the error of a mode:

    float32         s is computed in float32: noise r^2 is added to it, and that of z grows to (1 - t)^2 + (r / M)^2
    tf32, bf16      s is rounded to such numbers before the first layer; likewise
    gain1, gain10   the mask is undone by a factor of at most 1, or 10, where 1 / M would be right
    hard            modes with M < 1/2 are not seen: the error is P

Losses are errors divided by max(1 - t, t_eps)^2, weighted by the default density of training times.

    python -m experiments.principle     a JSON line for each spectrum and cutoff: experiments/results/principle.jsonl

Shapes: T times, n x n modes, A colour axes.
"""

import json
import sys

import torch
from torch import Tensor

from experiments import studies
from experiments.arms import ARMS, input_operator
from experiments.data import open_data
from experiments.train import density
from spectral_forcing import SpectralForcing, dct_matrix, separable_transform
from util.io import REPOSITORY, provenance, replacing
from util.rng import CounterRNG

TIMES, T_EPS = 200, 0.05
DATA = ("power1", "power2", "power3", "floor", "noise", "cifar10")
CUTOFFS = ("linear", *studies.CUTOFFS)
MANTISSA = {"tf32": 11, "bf16": 8}  # bits, the hidden one included


def round_to(x: Tensor, bits: int) -> Tensor:
    """Round float64 numbers to a mantissa of so many bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**bits).round(), exponent - bits)


def rounding_power(operator: SpectralForcing, second_moment: Tensor, times: Tensor) -> dict[str, Tensor]:
    """Return the power r^2 (T,) of rounding in a mode of s, measured on Gaussian images with a second moment (n, n)."""
    n, index = operator.img_size, torch.arange(16)
    x, e = (CounterRNG(0, step, index).normal("validation", n * n).double().view(-1, n, n) for step in (0, 1))
    found, dct = {name: [] for name in ("float32", *MANTISSA)}, dct_matrix(n)
    for t in times:
        z = separable_transform(dct.T, t * second_moment.sqrt() * x + (1 - t) * e)[:, None]  # (16, 1, n, n)
        s = operator(z, t)
        found["float32"].append((operator(z.float(), t.float()) - s).square().mean())
        for name, bits in MANTISSA.items():
            found[name].append((round_to(s, bits) - s).square().mean())
    return {name: torch.stack(values) for name, values in found.items()}


def readings(operator: SpectralForcing, variance: Tensor, second_moment: Tensor, times: Tensor) -> dict[str, Tensor]:
    """Return the least possible loss and that of each reading, mean over modes and axes: {name: (T,)}.

    `variance` and `second_moment` (A, n, n) are of the modes of x.
    """
    t = times.double()[:, None, None, None]
    noise, power, mask = (1 - t).square(), variance[None], operator.mask(times.double())[:, None]  # (T, A, n, n)
    seen = t.square() * power + noise  # variance of z
    least = power * noise / seen
    errors = {"least": least, "hard": torch.where(mask < 0.5, power, least)}
    for name, added in rounding_power(operator, second_moment.mean(0), times.double()).items():
        coarse = noise + added[:, None, None, None] / mask.square()
        errors[name] = power * coarse / (t.square() * power + coarse)
    for bound in (1, 10):
        factor = (bound * mask).clamp_max(1) * t * power / seen  # of z, where t P / (t^2 P + (1 - t)^2) would be right
        errors[f"gain{bound}"] = power - 2 * factor * t * power + factor.square() * seen
    divisor = (1 - times.double()).clamp_min(T_EPS).square()
    return {name: error.mean((1, 2, 3)) / divisor for name, error in errors.items()}


def costs(data: str, arm: str) -> dict[str, object]:
    """Return what the cutoff of an arm costs on a data set: in all, by t, and how much noise it hides."""
    times, weight = (torch.arange(TIMES) + 0.5) / TIMES, density(TIMES)
    operator = input_operator(ARMS[arm], data)
    losses = readings(operator, *open_data(data).mode_power(), times)
    least, hidden = losses.pop("least"), 1 - operator.mask(times.double()).square().mean((1, 2))
    lost = {
        name: float(100 * ((loss - least) * weight).sum() / (least * weight).sum()) for name, loss in losses.items()
    }
    tenths = {name: (100 * (loss / least - 1)).view(10, -1).mean(1).tolist() for name, loss in losses.items()}
    return {
        "data": data,
        "arm": arm,
        "lost_percent": {name: float(f"{value:.4g}") for name, value in lost.items()},
        "lost_percent_by_tenth_of_t": {name: [float(f"{v:.4g}") for v in values] for name, values in tenths.items()},
        "hidden_noise": round(float((hidden * weight).sum()), 4),
    }


def main() -> int:
    path = REPOSITORY / "experiments" / "results" / "principle.jsonl"
    lines = [costs(data, arm) for data in DATA for arm in CUTOFFS]
    about = provenance(torch.device("cpu"))
    with replacing(path) as file:
        file.write("".join(json.dumps(line | about) + "\n" for line in lines).encode())
    for line in lines:
        print(line["data"], line["arm"], line["hidden_noise"], line["lost_percent"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
