"""What training takes: parameters, arithmetic, memory and time. Nothing is trained or written.

    python main_jit.py --dry_run ...                       a run: a few of its steps are timed
    python -m util.profile --models JiT-2B --gpus 8 16     memory of models: the table of docs/large_models.md

Bytes on each of W GPUs, for P parameters:
    state         24 P: weights 4, gradients 4, AdamW's moments 8, two EMAs 8; with fsdp each parameter's rows / W
    gathered      fsdp: 4 (6 P_block + 2 P_outside): weights, gradients, buffer of two blocks; the former two outside
    activations   what autograd saves, counted on tensors without memory; recomputed: inputs of the blocks, what lies
                  outside of them, and one block. Gradients of activations: of one block
"""

import argparse
import time
from itertools import product
from math import prod
from statistics import mean, median
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from denoiser import Denoiser, TimeSampler
from model_jit import JiT, JiT_models
from spectral_ops.resolution import LevelTimes
from util.build import build_denoiser, build_network, describe_operators
from util.config import resolve
from util.log import duration

RESERVE = 4e9  # bytes for CUDA's context, NCCL, workspaces and fragmentation, beside what follows: an assumption
GPU_BYTES = {"80 GB": 80e9, "141 GB": 141e9}
UNTIMED, TIMED = 3, 7  # steps of a dry run


def forward_flops(net: JiT, level: int = 0) -> int:
    """Count the operations of the matrix products in a forward pass of one image, two per multiply-add.

    `level` is that of the image's resolution (spectral_ops/resolution.py).
    """
    size = net.input_size >> level
    condition = () if net.schedule_embedder is None else (torch.zeros(1, 2),)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, net.in_channels, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64), *condition)
    return counter.get_total_flops()


def count_flops(model: str, img_size: int, level: int = 0, **arguments: Any) -> int:
    """Count the operations of a model by its name, on tensors without memory."""
    with torch.device("meta"):
        return forward_flops(JiT_models[model](input_size=img_size, levels=level, **arguments), level)


def levels_of(time_sampler: TimeSampler) -> tuple[int, ...]:
    """Return the levels of resolution that a run's images have in turn."""
    return time_sampler.levels if isinstance(time_sampler, LevelTimes) else (0,)


def mean_flops(trainer: Any) -> float:
    """Return the operations of a forward pass of one image in training, the mean over levels of resolution."""
    levels = levels_of(trainer.time_sampler)
    with torch.device("meta"):
        net = build_network(trainer.config)
        flops = {level: forward_flops(net, level) for level in set(levels)}
    return mean(flops[level] for level in levels)


def count_saved(denoiser: Denoiser, images: int) -> tuple[int, int, int]:
    """Return the bytes that autograd saves: in all, outside of the blocks with their inputs, in the largest block."""
    net, device = denoiser.net, denoiser.net.pos_embed.device
    own = {t.untyped_storage()._cdata for t in (*denoiser.parameters(), *denoiser.buffers())}
    saved, inputs, place = {}, {}, -1  # number -> (block or -1, storage); of the blocks, number -> storage; this block

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # kept, so that no other storage gets its number
        if storage._cdata not in own:
            saved.setdefault(storage._cdata, (place, storage))
        return tensor

    def enter(block: int, arguments: tuple[Any, ...] = ()) -> None:
        nonlocal place
        place = block
        storages = [given.untyped_storage() for given in arguments if isinstance(given, torch.Tensor)]
        inputs.update({storage._cdata: storage for storage in storages if storage._cdata not in own})

    handles = [block.register_forward_hook(lambda *_: enter(-1)) for block in net.blocks]
    handles += [b.register_forward_pre_hook(lambda _, x, i=i: enter(i, x)) for i, b in enumerate(net.blocks)]
    x = torch.zeros(images, net.in_channels, net.input_size, net.input_size, device=device)
    y, t = torch.zeros(images, dtype=torch.int64, device=device), torch.full((images,), 0.5, device=device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        denoiser(x, y, t, x)
    for handle in handles:
        handle.remove()
    blocks = [0] * len(net.blocks)
    for block, storage in (found for key, found in saved.items() if key not in inputs and found[0] >= 0):
        blocks[block] += storage.nbytes()
    total = sum(storage.nbytes() for _, storage in saved.values())
    return total, total - sum(blocks) + sum(s.nbytes() for key, s in inputs.items() if key not in saved), max(blocks)


class Memory:
    """Memory of training with a configuration, with autocast to `dtype`; of images at level 0 of resolution."""

    def __init__(self, config: Any, dtype: torch.dtype | None = torch.bfloat16):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            net = build_network(config)
        denoiser = build_denoiser(config, dtype, net)
        denoiser.resolution = None
        with fake:
            self.one, self.two = count_saved(denoiser, 1), count_saved(denoiser, 2)
        self.shapes = [tuple(p.shape) for p in denoiser.parameters()]
        self.blocks = [sum(p.numel() for p in block.parameters()) for block in denoiser.net.blocks]

    def per_gpu(self, gpus: int, parallel: str, recompute: bool) -> tuple[float, float]:
        """Return the bytes on each GPU without any image, RESERVE included, and those that each image adds."""
        shards = gpus if parallel == "fsdp" else 1
        fixed = RESERVE + 24 * sum(-(-shape[0] // shards) * prod(shape[1:]) for shape in self.shapes)
        if parallel == "fsdp":
            fixed += 4 * (6 * max(self.blocks) + 2 * (sum(map(prod, self.shapes)) - sum(self.blocks)))
        one, two = (outside + block if recompute else total for total, outside, block in (self.one, self.two))
        return fixed + 2 * one - two, two - one + self.two[2] - self.one[2]


def dry_run(trainer: Any) -> str:
    """Time a few training steps of a run and return what the rest of it will take, as lines of text."""
    config, ctx, cuda = trainer.config, trainer.ctx, trainer.ctx.device.type == "cuda"
    memory = Memory(config, trainer.denoiser.autocast_dtype)
    fixed, image = memory.per_gpu(ctx.world_size, config.parallel, config.activation_checkpointing)
    net = trainer.denoiser.net
    tokens = [net.in_context_len + (net.pos_embed.shape[1] >> 2 * level) for level in levels_of(trainer.time_sampler)]
    image *= sum(tokens) / len(tokens) / (net.in_context_len + net.pos_embed.shape[1])
    needed = (fixed + image * config.batch_size - (0 if cuda else RESERVE)) / 1e9
    forward = mean_flops(trainer)
    flops, images = 3 * forward * config.global_batch, config.global_batch  # a backward pass costs two forward passes
    epoch, within = divmod(first := trainer.step, trainer.steps_per_epoch)
    ahead = trainer.loader.num_workers * (trainer.loader.prefetch_factor or 0)  # batches that workers have read
    untimed = UNTIMED + -(-ahead // config.accum_iter)
    trainer.sampler.set_epoch(epoch, within)
    batches, seconds, end = iter(trainer.loader), [], (epoch + 1) * trainer.steps_per_epoch
    for step in range(first, min(first + untimed + TIMED, end)):
        start = time.perf_counter()
        float(trainer.train_step(batches, step))  # waits for the device
        seconds.append(time.perf_counter() - start)
    timed = seconds[untimed:] or seconds[-1:]
    typical, left = median(timed), trainer.total_steps - first
    parameters = sum(p.numel() for p in trainer.denoiser.parameters())
    rows = {
        "model": f"{config.model} at {config.img_size} px, {parameters:,} parameters",
        "operators": describe_operators(config),
        "arithmetic": f"{forward / 1e9:.3g} GFLOP per image and forward pass, {flops / 1e12:.3g} TFLOP per step",
        "memory, calculated": f"{needed:.3g} GB on each of {ctx.world_size}, batch size {config.batch_size}",
        "first step": f"{seconds[0]:.3g} s",
        "step": f"{typical:.3g} s ({min(timed):.3g} to {max(timed):.3g}), {images / typical:.4g} images/s, "
        f"{flops / typical / 1e12:.3g} TFLOP/s",
        "steps": f"{left} are left: {config.epochs} epochs of {trainer.steps_per_epoch}, {first} done",
        "training": f"about {duration(left * typical)}, without checkpoints, samples and evaluations",
    }
    if cuda:
        rows["memory, measured"] = f"{torch.cuda.max_memory_allocated(ctx.device) / 1e9:.3g} GB at most"
        rows["GPU hours"] = f"about {left * typical * ctx.world_size / 3600:.4g}"
    return "\n".join(["dry run: nothing was written", *(f"  {name:18}  {text}" for name, text in rows.items())])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the memory that training takes, as a Markdown table.")
    parser.add_argument("--models", nargs="+", default=["JiT-700M", "JiT-2B", "JiT-7B"], choices=JiT_models)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 16, 64])
    parser.add_argument("--img_size", type=int, default=256)
    args = parser.parse_args(argv)
    sizes = " | ".join(f"images on {size}" for size in GPU_BYTES)
    print(f"| model | parallel | GPUs | recomputed | fixed, GB | each image, MB | {sizes} | measured, GB |")
    print("| --- " * (7 + len(GPU_BYTES)) + "|")
    for model in args.models:
        memory = Memory(resolve({"model": model, "img_size": args.img_size}))
        for (parallel, gpus), recompute in product([("ddp", "any"), *(("fsdp", w) for w in args.gpus)], ("no", "yes")):
            fixed, image = memory.per_gpu(1 if gpus == "any" else gpus, parallel, recompute == "yes")
            fit = " | ".join(str(max(0, int((size - fixed) // image))) for size in GPU_BYTES.values())
            print(f"| {model} | {parallel} | {gpus} | {recompute} | {fixed / 1e9:.1f} | {image / 1e6:.0f} | {fit} |  |")


if __name__ == "__main__":
    main()
