"""A CUDA device that computes nothing: shapes, types and devices of tensors on it are right, and there are no values.

Code that runs on it shows what it would do wrong on a GPU: tensors of both devices in one operation, a type that an
operation refuses, a shape, and each place where the host waits for the device. Tensors on the CPU are as ever.

torch's fake tensors do all of this but for three things. Its autograd engine wants a thread for each device, so
`backward` goes through the graph here. Autocast wants to see a GPU. And it may be meant to read from the device: where
that is allowed, what is read is 1, and -1 of integers.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from util.spectrum import rings_on

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default)
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default)


class Waits(Exception):
    """The host waits for the device. As with torch.cuda.set_sync_debug_mode, copies that block do so either way."""


def on_device(x: object) -> bool:
    return isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda")


def value_read(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else -1 if dtype.is_signed else 1


class FakeCuda(TorchDispatchMode):
    """Operations with tensors on the device are done without values, all others as ever. Above torch's FakeTensorMode.

    Attributes:
        may_wait: whether the host may wait for the device. Else that raises `Waits`.
        waited: what for, so far.
    """

    def __init__(self, may_wait: bool):
        super().__init__()
        self.may_wait, self.waited = may_wait, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if not any(on_device(x) for x in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if waits(func, args, kwargs):
            if not self.may_wait:
                raise Waits(f"{func} waits for the device")
            self.waited.append(str(func))
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            return value_read(torch.bool if func is aten.equal.default else args[0].dtype)
        if func is aten.copy_.default and not on_device(args[0]):
            with unset_fake_temporarily():
                return args[0].fill_(value_read(args[0].dtype))
        if func is aten._fused_sgd_.default:  # of which torch has no version without values
            return fused_sgd(*args, **kwargs)
        return tree_map_only(FakeTensor, on_its_device, func(*args, **kwargs))


def on_its_device(x: FakeTensor) -> Tensor:
    """A result; a real tensor where it is on the CPU."""
    if x.device.type != "cpu":
        return x
    with unset_fake_temporarily():
        return torch.full(x.shape, value_read(x.dtype), dtype=x.dtype)


def waits(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    """Reading a value, asking how many there are, copying from or to the host, as index or otherwise."""
    if func in READS:
        return True
    if func in COPIES:
        source, target = (args[0], kwargs.get("device")) if func is COPIES[0] else (args[1], args[0])
        blocks = not kwargs.get("non_blocking", len(args) > 2 and args[2])
        return blocks and target is not None and on_device(source) != on_device(target)
    indices = [i for i in args[1] if i is not None] if func in INDEXED else []
    return any(on_device(i) != on_device(args[0]) for i in indices)


def fused_sgd(parameters, gradients, buffers, *, found_inf=None, **settings) -> None:
    same = [
        (p.shape, p.dtype, p.device) == (g.shape, g.dtype, g.device) for p, g in zip(parameters, gradients, strict=True)
    ]
    if not all(same) or buffers or (found_inf is not None and found_inf.device != parameters[0].device):
        raise RuntimeError("_fused_sgd_ without momentum takes lists of tensors alike, and found_inf beside them")


def _as_input(gradient: Tensor, node: Node, i: int) -> Tensor:
    """As torch's engine hands it to input `i` of a node: summed over what was broadcast, in the type of the input."""
    about = node._input_metadata[i]
    if gradient.device != about.device:
        raise RuntimeError(f"{node.name()} expects a gradient on {about.device}, not on {gradient.device}")
    return gradient.sum_to_size(about.shape).to(about.dtype)


def backward(loss: Tensor) -> None:
    """`loss.backward()`."""
    number = object()  # by which activation checkpointing knows that it is still the same call
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch._C, "_current_graph_task_id", lambda: number)
        _through_the_graph(loss)


def _through_the_graph(loss: Tensor) -> None:
    """Each node after all that it gets gradients from."""
    users: dict[Node, int] = defaultdict(int)
    found = [loss.grad_fn]
    for node in found:  # grows meanwhile
        for following, _ in node.next_functions:
            if following is not None:
                if following not in users:
                    found.append(following)
                users[following] += 1
    arrived: dict[Node, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = arrived.pop(node, None)
        if hasattr(node, "variable"):  # a leaf
            leaf, (gradient,) = node.variable, given
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            continue
        results = (None,) * len(node.next_functions) if given is None else node(*given)
        results = results if isinstance(results, tuple) else (results,)
        for (following, i), gradient in zip(node.next_functions, results, strict=True):
            if following is None:
                continue
            if gradient is not None:
                slots = arrived.setdefault(following, [None] * len(following._input_metadata))
                gradient = _as_input(gradient, following, i)
                slots[i] = gradient if slots[i] is None else slots[i] + gradient
            users[following] -= 1
            if users[following] == 0:
                ready.append(following)


@contextmanager
def fake_cuda(may_wait: bool = False) -> Iterator[FakeCuda]:
    """Within the block there is such a device; it shows in no function of torch.cuda but `current_stream`."""
    engine, before = torch.Tensor.backward, torch.__future__.get_overwrite_module_params_on_conversion()
    rings_on.cache_clear()
    with (
        pytest.MonkeyPatch.context() as patch,
        FakeTensorMode(allow_non_fake_inputs=True),
        FakeCuda(may_wait) as device,
    ):
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        stream = SimpleNamespace(synchronize=lambda: None)  # which only a checkpoint does, and that may wait
        patch.setattr(torch.cuda, "current_stream", lambda: stream)
        patch.setattr(torch.Tensor, "backward", lambda loss: (backward if on_device(loss) else engine)(loss))
        patch.setattr(torch, "load", unset_fake_temporarily()(torch.load))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield device
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
            rings_on.cache_clear()
