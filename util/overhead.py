"""What the spectral residual costs: parameters, and floating-point operations of one image through the network.

python -m util.overhead

Operations are those of torch.utils.flop_counter: two for each multiply-add of linear layers, convolutions, attention's
products and the blur. What works on single values is not counted (norms, softmax, rotations, the sum of the
correction), nor is Spectral Forcing. The blur counts 50 for each value, as the 5x5 convolution that it is defined as;
"executed" counts 4 * side, for the two matrix products that compute it.

Shapes: N = side^2 patch tokens, D width, L blocks.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_jit import JiT, JiT_models
from util import cpu_layers

SMALL, LARGE = (32, 10), (256, 1000)  # pixels and classes


@dataclass(frozen=True)
class Overhead:
    """Of a plain network, and what the correction adds to it."""

    side: int
    parameters: int
    flops: int
    extra_parameters: int
    extra_flops: int  # with the blur as a convolution
    extra_flops_executed: int


def flops_of(net: JiT) -> int:
    """Of a forward pass of one image. The counter knows plain products, and none of the CPU's own kernels."""
    x = torch.zeros(1, 3, net.input_size, net.input_size)
    plain = cpu_layers.switched_off(), sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain[0], plain[1], FlopCounterMode(display=False) as counter:
        net(x, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def overhead(model: str, img_size: int, class_num: int, mode: str = "time") -> Overhead:
    """Of the correction with gates from `mode`."""
    with FakeTensorMode():  # shapes without memory
        plain, corrected = (
            JiT_models[model](input_size=img_size, num_classes=class_num, spectral_residual=name)
            for name in ("off", mode)
        )
        flops, executed = flops_of(plain), flops_of(corrected) - flops_of(plain)
    parameters, with_ = (sum(p.numel() for p in net.parameters()) for net in (plain, corrected))
    side = img_size // plain.patch_size
    values = side**2 * plain.pos_embed.shape[-1] * len(plain.blocks)  # N D L
    as_defined = executed + (2 * 25 - 2 * 2 * side) * values
    return Overhead(side, parameters, flops, with_ - parameters, as_defined, executed)


def table(img_size: int | None, class_num: int | None) -> str:
    """All models whose patch divides the image, at 32 pixels up to JiT-S and 256 above where no size is given."""
    lines = [
        f"{'model':<12}{'pixels':>8}{'tokens':>8}{'parameters':>16}{'added':>12}{'%':>7}"
        f"{'GFLOP':>10}{'added %':>9}{'executed %':>12}"
    ]
    for name in JiT_models:
        pixels, classes = SMALL if name.startswith(("JiT-Demo", "JiT-Ti", "JiT-S")) else LARGE
        pixels, classes = img_size or pixels, class_num or classes
        if pixels % JiT_models[name].keywords["patch_size"]:
            continue
        o = overhead(name, pixels, classes)
        lines.append(
            f"{name:<12}{pixels:>8}{o.side**2:>8}{o.parameters:>16,}{o.extra_parameters:>12,}"
            f"{100 * o.extra_parameters / o.parameters:>7.2f}{o.flops / 1e9:>10.3f}"
            f"{100 * o.extra_flops / o.flops:>9.2f}{100 * o.extra_flops_executed / o.flops:>12.2f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m util.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--img_size", type=int, help="pixels along a side (default: 32 up to JiT-S, 256 above)")
    parser.add_argument("--class_num", type=int, help="classes (default: 10 up to JiT-S, 1000 above)")
    args = parser.parse_args(argv)
    print(table(args.img_size, args.class_num))
    return 0


if __name__ == "__main__":
    sys.exit(main())
