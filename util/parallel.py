"""One network on many processes: a copy on each (DDP), or a part of each tensor on each (fully_shard).

With `fsdp` a process holds its rows of every parameter, and of what belongs to it: gradient, both moments of AdamW,
both averages. The network is sharded block by block: the weights of a block are gathered before it computes, forward
and backward, and freed afterwards; what lies outside of the blocks stays gathered from forward to backward. Gradients
are averaged into the rows at each backward pass, also where passes are accumulated: otherwise each process would hold
whole gradients in between.

Everything is gathered in float32. Under autocast a process casts what it has gathered, as it does without sharding, so
that a run computes the same with either; torch's MixedPrecisionPolicy would also round norms and embeddings.

Optimizer and averages work on the rows alone, as plain tensors: their arithmetic is elementwise.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parallel import DistributedDataParallel

from denoiser import Denoiser
from util.distributed import World

PARALLEL = ("ddp", "fsdp")


def wrap(denoiser: Denoiser, world: World) -> nn.Module:
    """What computes the loss: DDP around the denoiser where there are several copies of it, else the denoiser."""
    if world.size == 1 or is_sharded(denoiser):
        return denoiser
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(
        denoiser, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    _settle_buckets(wrapped, denoiser, world)
    return wrapped


def _settle_buckets(wrapped: DistributedDataParallel, denoiser: Denoiser, world: World) -> None:
    """Let DDP order its buckets now, by a backward pass that changes nothing.

    It does so after its first one, and the order decides how sums over three and more processes are rounded. Left to
    the first step, that step of a run that goes on would be rounded in another way than the same step of one that was
    not interrupted.
    """
    side = denoiser.net.input_size
    x, label = (
        torch.zeros(1, 3, side, side, device=world.device),
        torch.zeros(1, dtype=torch.int64, device=world.device),
    )
    with torch.compiler.set_stance("force_eager"):  # no graph is made for this one image
        wrapped(x, label, torch.full((1,), 0.5, device=world.device), x).backward()
    denoiser.zero_grad()


def accumulating(forward: nn.Module) -> AbstractContextManager:
    """For the passes of a step before its last: DDP leaves the gradients of each process as they are."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


def checkpoint_activations(denoiser: Denoiser) -> None:
    """Keep the input of each block alone for the backward pass, which computes the block a second time."""
    for block in denoiser.net.blocks:
        block.recomputed = True


# ---- a network in shards ---------------------------------------------------------------------------------------------


def build_sharded(build: Callable[[], Denoiser], world: World) -> Denoiser:
    """What `build` returns, sharded, on the device of the process; its parameters are not initialised.

    Buffers are whole and as built. No process ever has the memory of all parameters. Needs the process group.
    """
    with _parameters_without_memory():
        denoiser = build()
    buffers = {name: buffer.clone() for name, buffer in denoiser.named_buffers()}
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in denoiser.net.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(denoiser.net, mesh=mesh, reshard_after_forward=False)
    denoiser.to_empty(device=world.device)
    for name, buffer in denoiser.named_buffers():
        buffer.copy_(buffers[name])
    return denoiser


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters that are registered within have a shape and no values: they are on the meta device."""

    def forget(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(forget)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def initialise(denoiser: Denoiser, build: Callable[[], Denoiser], world: World) -> None:
    """Give a sharded denoiser the parameters of what `build` returns on rank 0.

    They are those of a run that is not sharded, to the bit, and cost rank 0 the memory of all of them on the host
    (29 GB for JiT-7B) until they are sent, one after the other.
    """
    source = dict(build().named_parameters()) if world.main else {}
    for name, parameter in denoiser.named_parameters():
        whole = torch.empty(parameter.shape, device=world.device)
        if world.main:
            whole.copy_(source.pop(name))
        if world.size > 1:
            dist.broadcast(whole, src=0)
        local(parameter).copy_(own_rows(parameter, whole))


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in module.modules())


def local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: its rows, or the parameter itself where it is not sharded.

    The rows are the same object at each call, and writing to it changes the parameter.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    with torch.no_grad():
        return parameter.to_local()


def local_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: local(parameter) for name, parameter in module.named_parameters()}


def own_rows(parameter: Tensor, whole: Tensor) -> Tensor:
    """The part of `whole`, of the parameter's shape in all, that belongs to this process: a view."""
    if not isinstance(parameter, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return whole[offset[0] : offset[0] + shape[0]] if shape[0] else whole[:0]


def gradients(module: nn.Module) -> list[Tensor]:
    """Those that this process holds, of all parameters; the optimizer finds them at `local(parameter)`."""
    parameters = list(module.parameters())
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            local(parameter).grad = local(parameter.grad)
    return [local(parameter).grad for parameter in parameters]


def total_norm(module: nn.Module) -> Tensor:
    """Norm of the gradients of all parameters, the same on all processes; does not wait for the device."""
    norm = torch.nn.utils.get_total_norm(gradients(module))
    if not is_sharded(module):
        return norm
    square = norm.square()
    dist.all_reduce(square)
    return square.sqrt()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block every process holds all weights, and may compute with them as often as it likes, on its own.

    Entering it is a collective where the module is sharded; else nothing happens. Do not enter it in inference mode:
    what is gathered there could not be trained with afterwards.
    """
    shards = [m for m in module.modules() if isinstance(m, FSDPModule)]  # the network, then its blocks
    blocks = shards[1:]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
