"""An operator before a network that somebody else wrote: what the network sees is filtered, the sampler's z is not.

    attach(transformer, SpectralForcing(time_convention="sigma"))

Where it goes in is found by the names of the arguments of `forward`. In a plain function it is one call:
`lambda z, t: function(operator(z, t), t)`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

TIMES = ("t", "time", "times", "timestep", "timesteps", "sigma", "sigmas")  # names of the argument

Operator = Callable[[Tensor, Tensor], Tensor]


def innermost(module: nn.Module) -> nn.Module:
    """Return the network within the wrappers of torch.compile, DDP and DataParallel."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        else:
            return module


def named(module: nn.Module) -> list[str]:
    """Return the names of the arguments of `forward`."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


class Argument:
    """An argument of a module's `forward`, by its name or its position. Raises ValueError if there is none."""

    def __init__(self, module: nn.Module, which: str | int):
        parameters = inspect.signature(module.forward).parameters.values()
        names, kinds = named(module), {p.kind for p in parameters}
        if isinstance(which, str):
            self.name, self.position = which, names.index(which) if which in names else None
            known = which in names or inspect.Parameter.VAR_KEYWORD in kinds
        else:
            self.name, self.position = names[which] if 0 <= which < len(names) else None, which
            known = self.name is not None or (which >= 0 and inspect.Parameter.VAR_POSITIONAL in kinds)
        if not known:
            takes = ", ".join(p.name for p in parameters)
            raise ValueError(f"{type(module).__name__}.forward takes {takes}, and no argument {which!r}.")

    def find(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.name in kwargs:
            return kwargs[self.name]
        if self.position is not None and self.position < len(args):
            return args[self.position]
        raise TypeError(f"The network was called without its argument {self.name or self.position!r}.")

    def replace(self, value: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.name in kwargs:
            return args, {**kwargs, self.name: value}
        return (*args[: self.position], value, *args[self.position + 1 :]), kwargs


def image_and_time(module: nn.Module, image: str | int | None, time: str | int | None) -> tuple[Argument, Argument]:
    """Return both arguments of `forward`, by default the one whose name is in TIMES and the first of the others."""
    names = named(module)
    if time is None:
        time = next((name for name in names if name in TIMES), None)
        if time is None:
            takes = ", ".join(names) or "any arguments"
            raise ValueError(f"{type(module).__name__}.forward takes {takes}: say which one is the time.")
    found = Argument(module, time)
    if image is None:
        image = next((name for name in names if name != found.name), 0)
    return Argument(module, image), found


class FilterInput:
    """A forward pre-hook that applies an operator(z, t) to the image among the arguments of a call."""

    def __init__(self, operator: Operator, image: Argument, time: Argument):
        self.operator, self.image, self.time = operator, image, time

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        seen = self.operator(self.image.find(args, kwargs), self.time.find(args, kwargs))
        return self.image.replace(seen, args, kwargs)


class Attachment:
    """What `attach` returns: `detach()`, or the end of a `with` block, takes out again what was attached."""

    def __init__(self, detach: Callable[[], None]):
        self.detach = detach

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(
    module: nn.Module, operator: Operator, image: str | int | None = None, time: str | int | None = None
) -> Attachment:
    """Let `module` see operator(z, t) in the place of z, until `detach()` of what is returned, or as a `with` block.

    The operator is a forward pre-hook. Neither parameters nor state dict hold it, so it is attached again to a module
    that was saved and loaded; copies of the module have one of their own. It works with torch.compile, with DDP, and
    with fully_shard: attach after fully_shard if that casts inputs, and the operator sees them before they are cast.

    Args:
        module: called as module(..., z, ..., t, ...), not by its `forward`.
        operator: (z, t) -> z, such as a SpectralForcing with the `time_convention` of the module, on its device.
        image, time: z and t among the arguments of the module's `forward`, by name or position. By default the time is
            the one that is called so (TIMES), and the image is the first of the others.

    Raises:
        TypeError: no module, or no operator.
        ValueError: the module has no such argument, or has an operator already.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{module!r} is no module. Of a function f, the filtered one is lambda z, t: f(operator(z, t), t)."
        )
    if isinstance(operator, type) or not callable(operator):
        raise TypeError(f"{operator!r} is no operator (z, t) -> z; SpectralForcing() is one.")
    module = innermost(module)
    hook = FilterInput(operator, *image_and_time(module, image, time))
    if _hooks(module):
        raise ValueError(f"This {type(module).__name__} sees its input through an operator already.")
    return Attachment(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)


def detach(module: nn.Module) -> None:
    """Take out the operator that was attached to the module, or to the one that it is a copy of, if there is one."""
    module = innermost(module)
    for key in _hooks(module):
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, FilterInput)]
