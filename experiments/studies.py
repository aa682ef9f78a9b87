"""The studies: arms x data x patch x seed x steps x lr, and the question that each one answers.

    python -m experiments.run cifar10 --processes 2

Arms are in experiments/arms.py, data in experiments/data.py, all other settings of a run in experiments/train.py. The
number that decides was chosen before the runs: the mean over held-out images of excess or loss, weighted by the default
density of training times, against the arm `plain` with the same seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from experiments.train import Run

SEEDS = (0, 1, 2)
CUTOFFS = ("power", "snr1", "snr0.3", "snr0.1", "snr0.03", "budget0.001", "budget0.003", "budget0.01", "budget0.03")


@dataclass(frozen=True)
class Study:
    """The runs are all combinations of the fields below `question`."""

    question: str
    data: tuple[str, ...]
    patches: tuple[int, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS
    steps: tuple[int, ...] = (600,)
    lr: tuple[float, ...] = (3e-3,)
    images: int = 256  # held out
    samples: int = 0  # images to draw and measure, instead of the loss
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"ema": 0.99})  # what else decides the samples
    device: str = "cpu"

    def runs(self, quick: bool = False) -> list[Run]:
        """Return the runs, seeds last; with `quick` few steps and one seed, to see that everything works."""
        combinations = product(self.seeds, self.steps, self.lr, self.data, self.patches, self.arms)
        shared: dict[str, Any] = {"images": self.images}
        if self.samples:
            shared |= {"samples": self.samples, "label_drop": 0.1, **self.sampling}
        runs = [Run(d, p, a, seed, steps, lr, **shared) for seed, steps, lr, d, p, a in combinations]
        if not quick:
            return runs
        few = [
            replace(run, seed=0, steps=5, images=16, samples=min(run.samples, 10), sampling_steps=(5,)) for run in runs
        ]
        return list(dict.fromkeys(few))


STUDIES = {
    "cifar10": Study(
        "On photographs: which cutoff lowers the held-out loss, and is it more than a change of scale?",
        data=("cifar10",),
        patches=(16, 8),
        arms=("plain", "scale", "linear", *CUTOFFS, "wiener", "residual", "budget_residual"),
        images=1000,
    ),
    "synthetic": Study(
        "Where the best denoiser is known: for which data and patch does Spectral Forcing bring networks nearer to it?",
        data=("power2", "floor", "noise", "essential"),
        patches=(16, 8),
        arms=("plain", "scale", "linear", "budget0.03"),
    ),
    "cifar10_patch4": Study(
        "Is Spectral Forcing on a par at fine patches?",
        data=("cifar10",),
        patches=(4,),
        arms=("plain", "linear"),
        images=1000,
    ),
    "cifar10_scale": Study(
        "Does it help to keep what the network sees at unit variance, or to hide more?",
        data=("cifar10",),
        patches=(16, 8),
        arms=("plain", "unit", "linear", "linear_unit", "snr0.1", "snr0.1_unit", "budget0.1"),
        images=1000,
    ),
    "cifar10_lr": Study(
        "Does the verdict depend on the learning rate?",
        data=("cifar10",),
        patches=(16, 8),
        arms=("plain", "linear", "budget0.03"),
        seeds=(0,),
        lr=(1e-3, 6e-3),
        images=1000,
    ),
    "cifar10_long": Study(
        "Does the gain survive training?",
        data=("cifar10",),
        patches=(16,),
        arms=("plain", "linear", "budget0.03"),
        steps=(2400,),
        images=1000,
    ),
    "cifar10_samples": Study(  # half of the times are uniform: near t = 1 the default density trains nothing
        "Do samples improve, with guidance and EMA chosen alike for each arm?",
        data=("cifar10",),
        patches=(8,),
        arms=("half", "linear_half", "budget_half", "residual_half"),
        samples=500,
    ),
    "residual_long": Study(
        "Does the correction of blocks pay after more training?",
        data=("cifar10",),
        patches=(8,),
        arms=("plain", "residual"),
        steps=(2400,),
        images=1000,
    ),
    "cifar10_longest": Study(
        "Does the gain survive ten times as much training?",
        data=("cifar10",),
        patches=(16,),
        arms=("plain", "linear", "budget0.03"),
        steps=(6000,),
        images=1000,
    ),
    "resolution": Study(
        "Does it pay not to compute what the noise hides? At equal steps.",
        data=("cifar10",),
        patches=(4, 8),
        arms=("plain", "linear", "levels", "linear_levels"),
        images=1000,
    ),
    "resolution_time": Study(  # 800 steps take about as long as 600 without levels: networks so small have other costs
        "The same, with the steps that fit into the same time.",
        data=("cifar10",),
        patches=(4, 8),
        arms=("levels", "linear_levels"),
        steps=(800,),
        images=1000,
    ),
    "resolution_longer": Study(  # about the operations of 600 steps without levels
        "The same, with the steps that the saved operations pay for.",
        data=("cifar10",),
        patches=(4, 8),
        arms=("levels", "linear_levels"),
        steps=(1200,),
        images=1000,
    ),
    "resolution_kinds": Study(
        "Layers of each level's own or shared ones, one level or two, which SNR?",
        data=("cifar10",),
        patches=(4,),
        arms=("levels_shared", "two_levels", "levels0.01", "levels0.2"),
        images=1000,
    ),
    "resolution_delta": Study(  # about the operations of 600 steps without levels
        "A larger SNR saves more: is it ahead with the steps that the saved operations pay for?",
        data=("cifar10",),
        patches=(4,),
        arms=("levels0.2",),
        steps=(1800,),
        images=1000,
    ),
    "resolution_lr": Study(
        "Does the verdict on levels depend on the learning rate?",
        data=("cifar10",),
        patches=(4,),
        arms=("plain", "levels"),
        seeds=(0,),
        lr=(1e-3, 6e-3),
        images=1000,
    ),
    "resolution_samples": Study(  # beside cifar10_samples
        "Are samples with levels as good, at equal steps and at equal operations?",
        data=("cifar10",),
        patches=(8,),
        arms=("levels_half", "linear_levels_half"),
        steps=(600, 1100),
        samples=500,
    ),
    "resolution_samples_fine": Study(  # guidance 2 and the last weights were the best for all at patch 8
        "The same at fine patches, with more sampling steps.",
        data=("cifar10",),
        patches=(4,),
        arms=("half", "linear_half"),
        samples=500,
        sampling={"cfgs": (2.0,), "sampling_steps": (25, 50)},
    ),
    "resolution_samples_fine_levels": Study(  # about the operations of 600 steps without levels
        "The same with levels, with the steps that the saved operations pay for.",
        data=("cifar10",),
        patches=(4,),
        arms=("levels_half", "linear_levels_half"),
        steps=(1000,),
        samples=500,
        sampling={"cfgs": (2.0,), "sampling_steps": (25, 50)},
    ),
    "resolution_photographs": Study(
        "On images of 64 pixels, with three sizes?",
        data=("photographs",),
        patches=(8,),
        arms=("plain", "linear", "levels", "two_levels", "linear_two_levels"),
    ),
    "resolution_photographs_longer": Study(  # about the operations of 600 steps without levels
        "The same, with the steps that the saved operations pay for.",
        data=("photographs",),
        patches=(8,),
        arms=("levels", "two_levels", "linear_two_levels"),
        steps=(1500,),
    ),
    "latents": Study(
        "In the latent space of a small VAE: does the filter help there, and the correction of blocks?",
        data=("cifar10_latents",),
        patches=(2,),
        arms=("plain", "linear", "budget0.03", "residual"),
        images=1000,
    ),
    "synthetic_patch4": Study(
        "Does the same hold at fine patches, where the best denoiser is known?",
        data=("power2", "floor", "noise", "essential"),
        patches=(4,),
        arms=("plain", "scale", "linear", "budget0.03"),
    ),
    "gpu": Study(  # with --processes 8; no data to fetch
        "Does the gain survive 20,000 steps, at coarse and at fine patches?",
        data=("noise", "essential"),
        patches=(16, 4),
        arms=("plain", "linear"),
        seeds=(0,),
        steps=(20_000,),
        device="cuda",
    ),
    "synthetic_long": Study(
        "Does the gain survive training, where the best denoiser is known?",
        data=("power2", "floor", "noise", "essential"),
        patches=(16,),
        arms=("plain", "linear", "budget0.03"),
        steps=(2400,),
    ),
    "synthetic_long_patch8": Study(
        "Does it survive at patch 8, where power falls with frequency?",
        data=("power2", "floor"),
        patches=(8,),
        arms=("plain", "linear", "budget0.03"),
        steps=(2400,),
    ),
}
