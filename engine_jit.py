"""What happens between a checkpoint and the next: an epoch of training; sampling and evaluation by their names here.

Shapes: B images of a micro-batch on one process; images (B, 3, H, W).
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from denoiser import Denoiser, Density, draw, random_flip
from util import watch
from util.data import to_float
from util.distributed import World, all_reduce_mean
from util.ema import EMA
from util.errors import NonFiniteError
from util.evaluation import evaluate
from util.flags import DEFAULTS
from util.generation import Sampling, generate, generate_all
from util.learning_rate import learning_rate
from util.loader import Waiting, positions
from util.logger import RunLog, progress
from util.parallel import accumulating, local_parameters, total_norm
from util.window import Window, finite_or_none

__all__ = [
    "Recipe",
    "Sampling",
    "Training",
    "build_optimizer",
    "evaluate",
    "generate",
    "generate_all",
    "parameter_groups",
    "stop_if_non_finite",
    "train_one_epoch",
]


@dataclass(frozen=True)
class Recipe:
    """How a run trains: settings that no epoch changes."""

    epochs: int
    steps_per_epoch: int
    accum_iter: int
    peak_lr: float
    min_lr: float
    warmup_epochs: float
    lr_schedule: str
    density: Density
    label_drop_prob: float
    null_class: int
    flip: bool
    dropout: bool
    seed: int
    log_freq: int
    grad_clip: float | None = None

    def lr(self, step: int) -> float:
        return learning_rate(
            step, self.steps_per_epoch, self.epochs, self.warmup_epochs, self.peak_lr, self.min_lr, self.lr_schedule
        )


@dataclass(frozen=True)
class Training:
    """The state that training changes."""

    denoiser: Denoiser
    forward: nn.Module  # the denoiser itself (which may be sharded), or DDP around it
    optimizer: torch.optim.Optimizer
    emas: tuple[EMA, EMA]
    window: Window


def parameter_groups(denoiser: Denoiser) -> tuple[list[str], list[str]]:
    """Names of the parameters without weight decay, which are vectors and biases, and of those with it."""
    no_decay, decay = [], []
    for name, parameter in denoiser.named_parameters():
        (no_decay if parameter.dim() == 1 or name.endswith(".bias") else decay).append(name)
    return no_decay, decay


def build_optimizer(
    denoiser: Denoiser,
    weight_decay: float,
    betas: tuple[float, float] = (DEFAULTS["beta1"], DEFAULTS["beta2"]),
) -> torch.optim.AdamW:
    """AdamW over what this process holds; group 0 has no weight decay (`parameter_groups`)."""
    mine = local_parameters(denoiser)
    no_decay, decay = ([mine[name] for name in names] for names in parameter_groups(denoiser))
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def train_one_epoch(
    training: Training,
    loader: DataLoader,
    epoch: int,
    first_step: int,
    recipe: Recipe,
    world: World,
    log: RunLog,
    after_step: Callable[[int], None],
) -> None:
    """One pass over the data, `recipe.steps_per_epoch` steps, or what is left of it from `first_step` on.

    Steps are counted from 0 over the whole run. Time, noise, label drop and flips of an image are functions of (seed,
    step, its position in the global batch), so the number of processes and of accumulated passes does not change them.
    A loss or gradient that is not finite on any process suppresses that update of weights, averages and optimizer on
    all of them, on the device; the host learns of it when it next logs (on a CPU at once).

    Args:
        after_step: called with the number of steps that are done.

    Raises:
        NonFiniteError: on all processes alike, naming step and learning rate.
    """
    training.denoiser.train()
    window = training.window
    batches = Waiting(loader)
    steps = range(first_step, (epoch + 1) * recipe.steps_per_epoch)
    bar = progress(steps, world, len(steps), f"epoch {epoch + 1}/{recipe.epochs}", "step")
    for step in bar:
        lr = recipe.lr(step)
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        loss, images = _forward_backward(training, batches, step, recipe, world)
        norm = total_norm(training.denoiser)
        if recipe.grad_clip is not None:
            parameters = local_parameters(training.denoiser).values()
            torch.nn.utils.clip_grads_with_norm_(parameters, recipe.grad_clip, norm)
        suppress = (~torch.isfinite(loss + norm)).float()
        training.optimizer.found_inf = suppress  # fused AdamW leaves everything as it is where this is 1
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.denoiser.zero_grad()
        for ema in training.emas:
            ema.update(training.denoiser, suppress)
        window.add(step, loss, suppress, images)

        logs = (step + 1) % recipe.log_freq == 0 or step == steps[-1]
        if logs or world.device.type == "cpu":
            stop_if_non_finite(window, recipe)
        if logs:
            values = {
                "epoch": epoch,
                **window.read(),
                "data_wait": round(batches.share(), 4),
                "lr": lr,
                "grad_norm": finite_or_none(float(norm)),
            }
            _report(values, step, bar, recipe, log)
            window.reset()
        after_step(step + 1)


def _forward_backward(
    training: Training, batches: Iterator, step: int, recipe: Recipe, world: World
) -> tuple[Tensor, int]:
    """Gradients of one global batch. Returns its mean loss (on the device, the same everywhere) and its size."""
    if recipe.dropout:  # dropout's masks alone come from torch's generator, set anew for each step and process
        torch.manual_seed(((recipe.seed * 1_000_003 + step) * 65_537 + world.rank) % 2**63)
    total, images = torch.zeros((), device=world.device), 0
    for micro in range(recipe.accum_iter):
        x, y = (part.to(world.device, non_blocking=True) for part in next(batches))
        watch.arrived(f"step {step}" if recipe.accum_iter == 1 else f"step {step}, pass {micro + 1}")
        where = positions(world.rank, world.size, micro, len(x))
        position = torch.arange(where.start, where.stop, device=world.device)
        x = to_float(x)
        if recipe.flip:
            x = random_flip(x, recipe.seed, step, position)
        shape, density = tuple(x.shape[1:]), recipe.density.of_images(x)
        d = draw(recipe.seed, step, position, y, shape, density, recipe.label_drop_prob, recipe.null_class)
        last = micro == recipe.accum_iter - 1
        with nullcontext() if last else accumulating(training.forward):
            loss = training.forward(x, d.y, d.t, d.noise) / recipe.accum_iter
            loss.backward()
        total += loss.detach()
        images += len(x) * world.size
    return all_reduce_mean(total, world), images


def stop_if_non_finite(window: Window, recipe: Recipe) -> None:
    """Wait for the device, and raise a NonFiniteError where more steps in a row were not finite than are tolerated."""
    steps = window.too_many()
    if steps is not None:
        step = steps[0]
        raise NonFiniteError(
            f"the loss or a gradient stopped being finite at step {step} (epoch {step // recipe.steps_per_epoch}), "
            f"learning rate {recipe.lr(step):.3g}"
            f"{f', and {len(steps)} steps in a row were not' if len(steps) > 1 else ''}. That has touched no weight, "
            "and the last checkpoint is as it was. A lower BLR, a longer warm-up or --attn_fp32 are the usual "
            "remedies; --skip_nonfinite tolerates single steps",
            steps,
        )


def _report(values: dict[str, float | None], step: int, bar, recipe: Recipe, log: RunLog) -> None:
    log.record("train", step, values)
    lr, rate = values["lr"], values["images_per_s"]
    loss, norm = (float("nan") if values[name] is None else values[name] for name in ("loss", "grad_norm"))
    skipped = f"  {values['skipped']} steps not finite, skipped" if "skipped" in values else ""
    waits = f"  {values['data_wait']:.0%} of it waiting for data" if values["data_wait"] >= 0.1 else ""
    if hasattr(bar, "set_postfix_str"):
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {rate:.0f} images/s{waits}{skipped}")
    else:
        log.say(
            f"epoch {values['epoch'] + 1}/{recipe.epochs}  step {step + 1}/{recipe.epochs * recipe.steps_per_epoch}  "
            f"loss {loss:.4f}  lr {lr:.2e}  gradient {norm:.3g}  {rate:.0f} images/s{waits}{skipped}"
        )
