"""An operator before a network that somebody else wrote: what the network sees is filtered, the sampler's z is not.

    attach(transformer, SpectralForcing(time_convention="sigma"))

Where it goes in is found by the names of the arguments of `forward`. In a plain function it is one call:
`lambda z, t: function(operator(z, t), t)`.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

NAME = "spectral_ops"  # of the hook in diffusers' registry

Operator = Callable[[Tensor, Tensor], Tensor]


class Argument:
    """An argument of a function, by its name or its position."""

    def __init__(self, function: Callable, which: str | int):
        names = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        if isinstance(which, str):
            self.name, self.position = which, names.index(which) if which in names else None
        else:
            self.name, self.position = names[which] if which < len(names) else None, which

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


class FilterInput:
    """A forward pre-hook that applies an operator(z, t) to the image among the arguments of a call."""

    def __init__(self, operator: Operator, image: Argument, time: Argument):
        self.operator, self.image, self.time = operator, image, time

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        seen = self.operator(self.image.find(args, kwargs), self.time.find(args, kwargs))
        return self.image.replace(seen, args, kwargs)


class Attachment:
    """What `attach` returns: `detach()` takes the operator out again, as does the end of a `with` block."""

    def __init__(self, detach: Callable[[], None]):
        self._detach: Callable[[], None] | None = detach

    def detach(self) -> None:
        if self._detach is not None:
            self._detach()
            self._detach = None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(module: nn.Module, operator: Operator, image: str | int = 0, time: str | int = 1) -> Attachment:
    """Let `module` see operator(z, t) in the place of z, until `detach()` of what is returned, or as a `with` block.

    Parameters and state dict of the module stay as they are: neither holds the operator. It works before or after
    torch.compile, DDP, and fully_shard. Modules of diffusers get a hook of diffusers, which goes with its others.

    Args:
        module: called as module(..., z, ..., t, ...).
        operator: (z, t) -> z, such as a SpectralForcing with the `time_convention` of the module.
        image, time: z and t among the arguments of the module's `forward`, by name or position.

    Raises:
        ValueError: the module has no such argument, or has an operator already.
    """
    arguments = [Argument(module.forward, which) for which in (image, time)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
    for argument in arguments:
        if argument.position is None and not takes_any:
            known = ", ".join(inspect.signature(module.forward).parameters)
            raise ValueError(f"{type(module).__name__}.forward takes {known}, and no {argument.name}.")
    hook = FilterInput(operator, *arguments)
    diffusers = sys.modules.get("diffusers")  # a module of diffusers cannot be there without it
    if diffusers is not None and isinstance(module, diffusers.ModelMixin):
        return _attach_to_diffusers(module, hook)
    if any(isinstance(other, FilterInput) for other in module._forward_pre_hooks.values()):
        raise ValueError(f"This {type(module).__name__} sees its input through an operator already.")
    return Attachment(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)


def _attach_to_diffusers(module: nn.Module, hook: FilterInput) -> Attachment:
    from diffusers.hooks import HookRegistry, ModelHook

    class DiffusersHook(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
            return hook(module, args, kwargs)

    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(NAME) is not None:
        raise ValueError(f"This {type(module).__name__} sees its input through an operator already.")
    registry.register_hook(DiffusersHook(), NAME)
    return Attachment(lambda: registry.remove_hook(NAME, recurse=False))
