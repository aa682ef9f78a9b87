"""Optimizer, learning rate and exponential moving averages (EMA) of the weights.

Everything works on plain and on sharded modules, whose parameters are DTensors.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from util.config import TrainConfig
from util.dist.parallel import local_shard


def parameter_groups(module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the parameters without weight decay (vectors and biases) and of those with it."""
    no_decay, decay = [], []
    for name, parameter in module.named_parameters():
        (no_decay if parameter.dim() == 1 or name.endswith(".bias") else decay).append(name)
    return no_decay, decay


def build_optimizer(module: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Build fused AdamW, whose group 0 has no weight decay. Its learning rate is set at each step.

    Where its attribute `found_inf` is a tensor 1., a step changes nothing: the device decides, the host need not wait.
    """
    parameters = dict(module.named_parameters())
    no_decay, decay = ([parameters[name] for name in names] for names in parameter_groups(module))
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def peak_lr(config: TrainConfig) -> float:
    """Return --lr, or else blr * global_batch / 256 (arXiv 2511.13720, training recipe)."""
    return config.blr * config.global_batch / 256 if config.lr is None else config.lr


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the rate of `step`, counted from 0 over the run: a linear warm-up from 0, then constant or a cosine."""
    peak, total = peak_lr(config), config.epochs * steps_per_epoch
    warmup = config.warmup_epochs * steps_per_epoch if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if config.lr_schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(total - warmup, 1e-12))
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class EMA:
    """Exponential moving average of every parameter of a module: ema <- decay * ema + (1 - decay) * p.

    It starts as a copy. Buffers are not averaged; a state dict takes them from the module.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The local shards of EMA weights and parameters, in the same order."""
        return [local_shard(e) for e in self.shadow.values()], [local_shard(p) for p in self.module.parameters()]

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Average in the current parameters; where `skip` is a tensor 1. on their device, change nothing.

        With `skip` the device decides, at one kernel per tensor instead of one for all.
        """
        shadow, parameters = self._pairs()
        weight = 1 - self.decay if skip is None else [(1 - self.decay) * (1 - skip)] * len(shadow)
        torch._foreach_lerp_(shadow, parameters, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the module's state dict with the EMA weights in place of its parameters."""
        return {name: self.shadow.get(name, value) for name, value in self.module.state_dict().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy the EMA weights from a state dict of the module; of DTensors the local shards are copied."""
        for name, average in self.shadow.items():
            local_shard(average).copy_(local_shard(state[name]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module compute with the EMA weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.module.named_parameters():
            average = self.shadow[name]
            if parameter is local_shard(parameter):
                parameter.data, self.shadow[name] = average, parameter.data
            else:  # sharded parameters keep their storage, which FSDP refers to
                kept = local_shard(parameter).clone()
                local_shard(parameter).copy_(local_shard(average))
                local_shard(average).copy_(kept)
