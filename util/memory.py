"""What training needs in the memory of a GPU, calculated from the real shapes of a model; nothing is trained.

    python -m util.memory                                                        the table of docs/large_models.md
    python -m util.memory --models JiT-B/16 --gpus 1 4 --img_size 256            others

Bytes on each of W GPUs, for P parameters, with B images per GPU and forward pass:

    state         24 P, with fsdp 24 ceil(rows / W) / rows of each parameter:
                  weights 4, gradients 4, AdamW's moments 8, two averages 8
    gathered      fsdp: 4 (6 P_block + 2 P_outside): weights and whole gradients of two blocks (the one that computes,
                  and the next that is fetched or the last that is sent), a buffer for each; of what lies outside of
                  the blocks weights and gradients
    copies        the weights in bf16 that autocast keeps for the backward pass; recomputed: of one block
    activations   B times what the backward pass needs of an image; recomputed: B times the inputs of all blocks, what
                  lies outside of them, and one block
    gradients     B times one block again: of its activations, while they are computed
    reserve       RESERVE for CUDA's context, NCCL, workspaces and fragmentation: an assumption

P_block is the largest block. Copies and activations are counted, not estimated: a forward pass runs on tensors that
have a shape and no memory, and what autograd saves is added up, each storage once.
"""

import argparse
import sys
from dataclasses import dataclass
from math import prod

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from denoiser import Denoiser
from model_jit import JiT_models
from spectral_forcing import SpectralForcing
from util import cpu_layers
from util.parallel import PARALLEL

RESERVE = 4e9
SIZES = {"80 GB": 80e9, "141 GB": 141e9}
STATE = 24  # bytes for each parameter


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept for the backward pass of one batch.

    Attributes:
        total: without activation checkpointing.
        recomputed: with it, between forward and backward.
        block: within the largest block, apart from its inputs.
    """

    total: int
    recomputed: int
    block: int


def count(denoiser: Denoiser, images: int) -> Kept:
    """Run a forward pass and add up what is saved, each storage once, without parameters and buffers."""
    net, device = denoiser.net, denoiser.net.pos_embed.device
    own = {t.untyped_storage()._cdata for t in (*denoiser.parameters(), *denoiser.buffers())}
    outside: dict[int, int] = {}  # storage -> bytes
    inside: list[dict[int, int]] = [{} for _ in net.blocks]
    inputs: dict[int, int] = {}  # of all blocks
    place, alive, handles = [outside], [], []

    def note(tensor: torch.Tensor, there: dict[int, int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            there[storage._cdata] = storage.nbytes()
            alive.append(storage)  # so that no other one gets its number

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        note(tensor, place[0])
        return tensor

    def enter(i: int, arguments: tuple) -> None:
        place[0] = inside[i]
        for tensor in arguments:
            note(tensor, inputs)

    def leave(*_) -> None:
        place[0] = outside

    for i, block in enumerate(net.blocks):
        handles.append(block.register_forward_pre_hook(lambda _, arguments, i=i: enter(i, arguments)))
        handles.append(block.register_forward_hook(leave))
    x = torch.zeros(images, 3, net.input_size, net.input_size, device=device)
    y, t = torch.zeros(images, dtype=torch.int64, device=device), torch.full((images,), 0.5, device=device)
    as_on_a_gpu = cpu_layers.switched_off()
    with as_on_a_gpu, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoiser(x, y, t, x)
    for handle in handles:
        handle.remove()
    everything = {key: value for part in (outside, *inside) for key, value in part.items()}
    blocks = [sum(value for key, value in part.items() if key not in inputs) for part in inside]
    return Kept(sum(everything.values()), sum((outside | inputs).values()), max(blocks))


@dataclass(frozen=True)
class Memory:
    """What a model needs, in bytes, but for what depends on the number of GPUs; `image` is for each, `fixed` in all."""

    shapes: tuple[tuple[int, ...], ...]
    block: int  # parameters of the largest block
    outside: int  # parameters outside of the blocks
    fixed: Kept
    image: Kept

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    def state(self, shards: int) -> int:
        """Weights, gradients, moments and averages of the process that holds most of them."""
        return STATE * sum(-(-shape[0] // shards) * prod(shape[1:]) for shape in self.shapes)

    def for_batch(self, gpus: int, parallel: str, recompute: bool) -> tuple[float, float]:
        """Bytes on each GPU: what does not depend on the batch, and what each image adds."""
        sharded = parallel == "fsdp"
        fixed = RESERVE + self.state(gpus if sharded else 1)
        fixed += 4 * (6 * self.block + 2 * self.outside) if sharded else 0
        fixed += self.fixed.recomputed + self.fixed.block if recompute else self.fixed.total
        image = self.image.recomputed + self.image.block if recompute else self.image.total
        return fixed, image + self.image.block


def measure(model: str, img_size: int, dtype: torch.dtype | None = torch.bfloat16) -> Memory:
    """Shapes and counts of a model behind Spectral Forcing, with autocast to `dtype`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = JiT_models[model](input_size=img_size)
        denoiser = Denoiser(net, SpectralForcing(img_size), autocast_dtype=dtype)
        one, two = count(denoiser, 1), count(denoiser, 2)
    image = Kept(two.total - one.total, two.recomputed - one.recomputed, two.block - one.block)
    fixed = Kept(one.total - image.total, one.recomputed - image.recomputed, one.block - image.block)
    inside = [sum(p.numel() for p in block.parameters()) for block in net.blocks]
    shapes = tuple(tuple(p.shape) for p in denoiser.parameters())
    outside = sum(p.numel() for p in net.parameters()) - sum(inside)
    return Memory(shapes, max(inside), outside, fixed, image)


def table(models: list[str], gpus: list[int], img_size: int) -> str:
    """A table in Markdown: bytes, and the largest batch per GPU and pass that fits; 0: not even one image."""
    head = [
        *("model", "parallel", "GPUs", "recomputed", "fixed, GB", "each image, MB"),
        *(f"images on {name}" for name in SIZES),
        "measured, GB",
    ]
    rows = [head, ["---"] * len(head)]
    for model in models:
        needs = measure(model, img_size)
        for parallel in PARALLEL:
            for w in gpus if parallel == "fsdp" else ["any"]:
                for recompute in (False, True):
                    fixed, image = needs.for_batch(1 if w == "any" else w, parallel, recompute)
                    fit = [max(0, int((size - fixed) // image)) for size in SIZES.values()]
                    shown = [f"{fixed / 1e9:.1f}", f"{image / 1e6:.0f}", *map(str, fit), ""]
                    rows.append([model, parallel, str(w), "yes" if recompute else "no", *shown])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["JiT-700M", "JiT-2B", "JiT-7B"], choices=JiT_models)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 16, 64])
    parser.add_argument("--img_size", type=int, default=256)
    args = parser.parse_args(argv)
    print(table(args.models, args.gpus, args.img_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
