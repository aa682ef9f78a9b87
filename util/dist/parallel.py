"""One model on many ranks: a replica on each (DDP), or a shard of every tensor on each (fully_shard, FSDP2).

With `fsdp` parameters, gradients, EMA weights and AdamW's moments are DTensors, of which a rank holds some rows. The
network is sharded block by block: a block's weights are gathered before it computes, forward and backward, and freed
afterwards. Gradients are reduced at each backward pass, accumulated microbatches included: else each rank would hold
whole gradients in between. Weights are gathered in float32 and autocast casts them, as it does with DDP, so that both
compute the same; torch's MixedPrecisionPolicy would also round norms and embeddings.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parallel import DistributedDataParallel

from util.dist.context import DistContext, error_on_all_ranks


# ---- replicas --------------------------------------------------------------------------------------------------------


def wrap_ddp(denoiser: nn.Module, ctx: DistContext) -> nn.Module:
    """Wrap the denoiser in DDP if there are several ranks."""
    if ctx.world_size == 1:
        return denoiser
    device_ids = [ctx.device.index] if ctx.device.type == "cuda" else None
    model = DistributedDataParallel(
        denoiser, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    _settle_buckets(model, denoiser, ctx)
    return model


def _settle_buckets(model: DistributedDataParallel, denoiser: nn.Module, ctx: DistContext) -> None:
    """Let DDP order its buckets now, by a backward pass that changes nothing.

    DDP does so after its first pass, and with three and more ranks the order decides how sums are rounded. Left to the
    first step, that step of a resumed run would be rounded differently than in a run without interruption.
    """
    net = denoiser.net
    levels, image = range(1 + len(net.levels)), (net.in_channels, net.input_size, net.input_size)  # an image for each
    x, t = (torch.full((len(levels), *shape), 0.5, device=ctx.device) for shape in (image, ()))
    with torch.compiler.set_stance("force_eager"):  # these images are not worth a compilation
        model(x, torch.zeros_like(t, dtype=torch.int64), t, x, tuple(levels)).backward()
    denoiser.zero_grad()


def no_sync(model: nn.Module) -> AbstractContextManager:
    """For all microbatches of a step but the last: DDP does not reduce the gradients yet."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def assert_equal_replicas(ctx: DistContext, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise a UserError on all ranks if the bits of a float32 tensor, summed as integers, differ from those of rank 0.

    Args:
        states: {"model": {parameter: tensor}, "ema1": ...}, with the same keys in the same order on all ranks.
    """
    if ctx.world_size == 1:
        return
    named = {f"{state}.{name}": tensor for state, tensors in states.items() for name, tensor in tensors.items()}
    sums = torch.stack([tensor.detach().view(torch.int32).sum() for tensor in named.values()])  # int64
    gathered = [torch.empty_like(sums) for _ in range(ctx.world_size)]
    dist.all_gather(gathered, sums)
    found = []
    for rank, other in enumerate(gathered):
        wrong = [name for name, differs in zip(named, (other != gathered[0]).tolist(), strict=True) if differs]
        if wrong:
            found.append(f"rank {rank} differs from rank 0 in {wrong[0]} ({len(wrong)} of {len(named)} tensors)")
    if found:
        raise error_on_all_ranks(
            f"Model replicas diverged: {'; '.join(found)}. The memory or device of a node may be faulty: resume from "
            "the last checkpoint, and without that node if it happens again."
        )


# ---- shards ----------------------------------------------------------------------------------------------------------


def build_sharded(build: Callable[[], nn.Module], ctx: DistContext) -> nn.Module:
    """Return what `build` returns, sharded, on the rank's device, with uninitialised parameters.

    Buffers are whole and as built. No rank ever holds all parameters. Requires the process group.
    """
    with _parameters_on_meta():
        denoiser = build()
    buffers = {name: buffer.clone() for name, buffer in denoiser.named_buffers()}
    mesh = init_device_mesh(ctx.device.type, (ctx.world_size,))
    for block in denoiser.net.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(denoiser.net, mesh=mesh, reshard_after_forward=False)
    denoiser.to_empty(device=ctx.device)
    for name, buffer in denoiser.named_buffers():
        buffer.copy_(buffers[name])
    return denoiser


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register inside the block have a shape but no memory; buffers are as usual."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def init_sharded(denoiser: nn.Module, build: Callable[[], nn.Module], ctx: DistContext) -> None:
    """Give a sharded denoiser the parameters of the one that `build` returns on rank 0, to the bit.

    Rank 0 holds all of them in host memory meanwhile (29 GB for JiT-7B) and sends one after the other.
    """
    source = build().state_dict() if ctx.is_main else {}
    set_model_state_dict(denoiser, source, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in module.modules())


def local_shard(tensor: Tensor) -> Tensor:
    """Return the rows of a DTensor that this rank holds, as a view; a plain tensor is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients, the same plain 0-dim tensor on all ranks, without waiting for the device."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Hold all weights on each rank inside the block, so that ranks may run different numbers of forward passes.

    Entering it is a collective; for a module without shards nothing happens. Do not enter it in inference mode: what is
    gathered there could not be trained with afterwards.
    """
    shards = [m for m in module.modules() if isinstance(m, FSDPModule)]  # the network, then its blocks
    for block in shards[1:]:
        block.set_reshard_after_forward(False, recurse=False)
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
        for block in shards[1:]:
            block.set_reshard_after_forward(True, recurse=False)
