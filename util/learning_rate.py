"""Learning rate of each step: linear warm-up, then constant or a cosine (arXiv 2511.13720, training recipe)."""

import math


def peak_lr(lr: float | None, blr: float, global_batch: int) -> float:
    """`lr` where it is given, else blr * global_batch / 256."""
    return blr * global_batch / 256 if lr is None else lr


def learning_rate(
    step: int, steps_per_epoch: int, epochs: float, warmup_epochs: float, peak: float, min_lr: float, schedule: str
) -> float:
    """Rate of step `step`, counted from 0 over the whole run; it is 0 at step 0 where there is a warm-up."""
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if schedule == "constant":
        return peak
    if schedule != "cosine":
        raise ValueError(f"the learning-rate schedule is {schedule!r}: it must be 'constant' or 'cosine'")
    progress = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
