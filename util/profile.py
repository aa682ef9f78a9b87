"""What a run takes: parameters, arithmetic, memory and time. Nothing is trained or written for good.

    python main_jit.py --dry_run ...                       of a run: a few of its steps are timed
    python -m util.profile --models JiT-2B --gpus 8 16     memory of models: the table of docs/large_models.md

Bytes on each of W GPUs, for P parameters, with B images per microbatch:

    state         24 P, with fsdp 24 ceil(rows / W) / rows of each parameter: weights 4, gradients 4, AdamW's moments 8,
                  two EMAs 8
    gathered      fsdp: 4 (6 P_block + 2 P_outside): weights, gradients and a buffer of two blocks, and of what lies
                  outside of the blocks weights and gradients
    activations   what autograd saves, counted on tensors without memory; with checkpointing the inputs of the blocks
                  and one block. Its gradients while they are computed: one block
    reserve       RESERVE for CUDA's context, NCCL, workspaces and fragmentation: an assumption
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from denoiser import Denoiser
from model_jit import JiT_models
from spectral_forcing import SpectralForcing
from util.log import duration

RESERVE = 4e9
GPU_BYTES = {"80 GB": 80e9, "141 GB": 141e9}
UNTIMED, TIMED = 3, 7  # steps of a dry run


def count_flops(model: str, img_size: int, **arguments: Any) -> int:
    """Count the operations of matrix products in a forward pass of one image, two per multiply-add."""
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net = JiT_models[model](input_size=img_size, **arguments)
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, img_size, img_size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd saves: in all, outside of the blocks with the blocks' inputs, inside the largest block."""

    total: int
    outside: int
    block: int


def count_saved(denoiser: Denoiser, images: int) -> Saved:
    """Run a forward pass and count what autograd saves for the backward pass, each storage once."""
    net, device = denoiser.net, denoiser.net.pos_embed.device
    own = {t.untyped_storage()._cdata for t in (*denoiser.parameters(), *denoiser.buffers())}
    outside: dict[int, int] = {}  # storage -> bytes
    blocks: list[dict[int, int]] = [{} for _ in net.blocks]
    place, alive, handles = [outside], [], []

    def note(tensor: Tensor, found: dict[int, int]) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
            alive.append(storage)  # so that no other storage gets its number
        return tensor

    def enter(i: int, arguments: tuple) -> None:
        place[0] = blocks[i]
        for tensor in arguments:
            note(tensor, outside)

    for i, block in enumerate(net.blocks):
        handles.append(block.register_forward_pre_hook(lambda _, arguments, i=i: enter(i, arguments)))
        handles.append(block.register_forward_hook(lambda *_: place.__setitem__(0, outside)))
    x = torch.zeros(images, 3, net.input_size, net.input_size, device=device)
    y, t = torch.zeros(images, dtype=torch.int64, device=device), torch.full((images,), 0.5, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: note(tensor, place[0]), lambda tensor: tensor):
        denoiser(x, y, t, x)
    for handle in handles:
        handle.remove()
    total = {key: value for part in (outside, *blocks) for key, value in part.items()}
    inside = [sum(value for key, value in part.items() if key not in outside) for part in blocks]
    return Saved(sum(total.values()), sum(outside.values()), max(inside))


def training_bytes(
    model: str, img_size: int, gpus: int, parallel: str, recompute: bool, dtype: torch.dtype | None = torch.bfloat16
) -> tuple[float, float]:
    """Return the bytes on each GPU without any image, RESERVE included, and what each image adds."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = Denoiser(JiT_models[model](input_size=img_size), SpectralForcing(img_size), autocast_dtype=dtype)
        one, two = count_saved(denoiser, 1), count_saved(denoiser, 2)
    shards = gpus if parallel == "fsdp" else 1
    shapes = [tuple(p.shape) for p in denoiser.parameters()]
    fixed = RESERVE + 24 * sum(-(-shape[0] // shards) * prod(shape[1:]) for shape in shapes)
    if parallel == "fsdp":
        blocks = [sum(p.numel() for p in block.parameters()) for block in denoiser.net.blocks]
        fixed += 4 * (6 * max(blocks) + 2 * (sum(map(prod, shapes)) - sum(blocks)))
    kept = [saved.outside + saved.block if recompute else saved.total for saved in (one, two)]
    image = kept[1] - kept[0]
    return fixed + kept[0] - image, image + two.block - one.block


def dry_run(trainer: Any) -> str:
    """Time a few training steps of a run and return what the rest of it will take, as lines of text."""
    config, ctx, images = trainer.config, trainer.ctx, trainer.config.global_batch
    memory = training_bytes(
        config.model,
        config.img_size,
        ctx.world_size,
        config.parallel,
        config.activation_checkpointing,
        trainer.denoiser.autocast_dtype,
    )
    memory = memory[0] + memory[1] * config.batch_size - (0 if ctx.device.type == "cuda" else RESERVE)
    flops = 3 * count_flops(config.model, config.img_size, num_classes=config.class_num) * images  # backward: twice
    epoch, within = divmod(trainer.step, trainer.steps_per_epoch)
    trainer.sampler.set_epoch(epoch, within)
    batches, seconds = iter(trainer.loader), []
    ahead = getattr(trainer.loader, "num_workers", 0) * (getattr(trainer.loader, "prefetch_factor", None) or 0)
    untimed = UNTIMED + ahead // config.accum_iter  # the first steps use up what the workers have read ahead
    remaining = trainer.total_steps - trainer.step
    trainer.denoiser.train()
    for step in islice(range(trainer.step, (epoch + 1) * trainer.steps_per_epoch), untimed + TIMED):
        start = time.perf_counter()
        trainer.train_step(batches, step)
        if ctx.device.type == "cuda":
            torch.cuda.synchronize(ctx.device)
        seconds.append(time.perf_counter() - start)
    timed = seconds[untimed:] or seconds[-1:]
    median = statistics.median(timed)
    rows = {
        "model": f"{config.model} at {config.img_size} px, {sum(p.numel() for p in trainer.denoiser.parameters()):,} "
        "parameters",
        "arithmetic": f"{flops / 1e12:.3g} TFLOP per step",
        "memory, calculated": f"{memory / 1e9:.3g} GB on each of {ctx.world_size}, batch size {config.batch_size}",
        "first step": f"{seconds[0]:.3g} s",
        "step": f"{median:.3g} s ({min(timed):.3g} to {max(timed):.3g}), {images / median:.4g} images/s, "
        f"{flops / median / 1e12:.3g} TFLOP/s",
        "training": f"about {duration(remaining * median)} for {remaining} steps, without samples and evaluations",
    }
    if ctx.device.type == "cuda":
        rows["memory, measured"] = f"{torch.cuda.max_memory_allocated(ctx.device) / 1e9:.3g} GB"
        rows["GPU hours"] = f"about {remaining * median * ctx.world_size / 3600:.4g}"
    width = max(map(len, rows))
    return "\n".join(["dry run: nothing was written", *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of training, as a Markdown table.")
    parser.add_argument("--models", nargs="+", default=["JiT-700M", "JiT-2B", "JiT-7B"], choices=JiT_models)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 16, 64])
    parser.add_argument("--img_size", type=int, default=256)
    args = parser.parse_args()
    print("| model | parallel | GPUs | recomputed | fixed, GB | each image, MB |", *(f"{n} |" for n in GPU_BYTES))
    print("|---" * (6 + len(GPU_BYTES)) + "|")
    for model in args.models:
        for parallel, gpus in [("ddp", 1), *(("fsdp", w) for w in args.gpus)]:
            for recompute in (False, True):
                fixed, image = training_bytes(model, args.img_size, gpus, parallel, recompute)
                fit = [max(0, int((size - fixed) // image)) for size in GPU_BYTES.values()]
                words = [model, parallel, str(gpus), "yes" if recompute else "no", f"{fixed / 1e9:.1f}"]
                print("|", " | ".join([*words, f"{image / 1e6:.0f}", *map(str, fit)]), "|")


if __name__ == "__main__":
    main()
