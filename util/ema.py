"""Exponential moving averages of the weights; of a sharded module's, the rows that this process holds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from util.parallel import gathered, is_sharded, local_parameters


class EMA:
    """Average of every parameter of a module, started as a copy: ema <- decay * ema + (1 - decay) * p.

    Buffers are not averaged; a state dict takes them from the module.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.averages = {name: p.detach().clone() for name, p in local_parameters(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, suppress: Tensor | None = None) -> None:
        """One step. Where `suppress`, a scalar on the device, is 1, the average stays.

        It is the step of gradient descent a <- a - lr (wd a - p) with lr = 1 - decay and weight decay wd = 1, for which
        torch has one kernel for all tensors, and one that can be suppressed on the device.
        """
        torch._fused_sgd_(
            *(list(self.averages.values()), list(local_parameters(module).values()), []),
            **{"lr": 1 - self.decay, "weight_decay": 1.0, "maximize": True, "found_inf": suppress},
            **{"momentum": 0.0, "dampening": 0.0, "nesterov": False, "is_first_step": False},
        )

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state dict with the averages in the place of its parameters."""
        return {name: self.averages.get(name, value) for name, value in module.state_dict().items()}

    @torch.no_grad()
    def copy_from(self, state: dict[str, Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(state[name])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Within the block the module computes with the averages; all processes enter it together."""
        self._swap(module)
        try:
            with gathered(module):
                yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        """Averages and parameters change places; the rows of a sharded module stay where they are, and are copied."""
        in_place = is_sharded(module)
        for name, parameter in local_parameters(module).items():
            average = self.averages[name]
            if in_place:
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)
            else:
                parameter.data, self.averages[name] = average, parameter.data
