"""Count what a GPU would run for a transformer block in training, on a machine without one. One JSON line.

    python -m benchmarks.kernels --model JiT-B/16 --img_size 256 --batch_size 64 [--inductor combo_kernels=True]
    python -m benchmarks.kernels --whole                                                        the network as one graph

Inductor writes its Triton kernels from shapes and types alone. So tensors without memory are enough for it to say how
many kernels it makes and how many bytes each reads and writes, in bf16 autocast. What it cannot say is how long they
take: caches serve some of the bytes, and a small kernel costs a launch. Attention is one call of unknown traffic here.

Shapes: B batch, n tokens, D width, h heads, d = D/h; q, k, v (B, h, n, d).
"""

import argparse
import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from benchmarks.common import emit
from benchmarks.step import inductor_option
from model_jit import JiT_models

H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132)
CALL = re.compile(r"^\s+(?:.+ = )?(?:(triton_\w+)\.run|(?:extern_kernels|torch\.ops)\.([\w.]+))\(", re.MULTILINE)
TRAFFIC = re.compile(r"'kernel_num_gb': ([\d.e+-]+).*?def (triton_\w+)\(", re.DOTALL)


@torch.library.custom_op("benchmarks::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stand for attention, whose kernel comes from a library."""
    raise NotImplementedError


@torch.library.custom_op("benchmarks::attention_backward", mutates_args=())
def attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


attention.register_fake(lambda q, k, v: torch.empty_like(q.transpose(1, 2).contiguous()).transpose(1, 2))
attention_backward.register_fake(lambda g, q, k, v, out: tuple(torch.empty_like(out) for _ in range(3)))
attention.register_autograd(
    lambda ctx, g: attention_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let Inductor write code for an H100 within the block; no code may run there."""
    ours: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda._get_device_properties": lambda *_: H100,
        "torch.cuda._exchange_device": lambda *_: 0,
        "torch.cuda._maybe_exchange_device": lambda *_: 0,
        "torch._subclasses.fake_tensor.init_gpu_context": lambda *_: None,
        "torch._inductor.scheduler.has_triton": lambda: True,
        "torch.utils._triton.triton_hash_with_backend": lambda: "",
    }
    with ExitStack() as stack:
        for name, value in ours.items():
            stack.enter_context(mock.patch(name, value, create=True))
        yield


class Written(Exception):
    """Inductor has written its code, which is the argument."""


def written_code(graph: torch.fx.GraphModule, inputs: list[Any], backward: bool) -> str:
    """Return the code that Inductor writes for a graph of ATen operations, whose inputs are on a CPU, for a GPU."""

    def stop(lowering: GraphLowering) -> None:
        raise Written(lowering.codegen()[0].value)

    graph, mode = copy.deepcopy(graph), FakeTensorMode()
    with pretended_gpu(), mode, torch.no_grad(), V.set_fake_mode(mode):
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        context = torch._guards.tracing(torch._guards.TracingContext(mode))
        with context, mock.patch.object(GraphLowering, "_compile_to_module", stop):
            try:
                compile_fx.compile_fx_inner(graph, inputs, is_backward=backward)
            except Exception as error:  # Inductor wraps it
                found = getattr(error, "inner_exception", error)
                if not isinstance(found, Written):
                    raise
                return found.args[0]
    raise RuntimeError("Inductor wrote no code.")


def partition(graph: torch.fx.GraphModule, inputs: Any, **arguments: Any) -> Any:
    """Divide a graph into forward and backward pass as torch.compile does."""
    joint_graph_passes(graph)
    return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **arguments)


def count(code: str) -> dict[str, Any]:
    """Return the launches in a piece of Inductor's code and the traffic of its kernels in GB, each and in all."""
    traffic = {name: round(float(gb), 4) for gb, name in TRAFFIC.findall(code)}
    calls = [kernel or library for kernel, library in CALL.findall(code[code.index("def call") :])]
    kernels = [name for name in calls if name.startswith("triton_")]
    each = [[name, traffic.get(name)] for name in kernels]
    numbers = {"kernels": len(kernels), "library_calls": len(calls) - len(kernels)}
    known = all(gb is not None for _, gb in each)  # Inductor does not say it of combined kernels
    return {**numbers, "gb": round(sum(gb for _, gb in each), 3) if known else None, "each": each}


def count_training(block: nn.Module, make_inputs: Callable[[], tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Return `count` of the forward and the backward pass of a module in bf16 autocast."""
    found: dict[str, dict[str, Any]] = {}

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any], name: str) -> Any:
        found[name] = count(written_code(graph, inputs, name == "backward"))
        return make_boxed_func(graph.forward)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        forward, backward = (partial(compiler, name=name) for name in ("forward", "backward"))
        decompositions = select_decomp_table()
        return aot_module_simplified(graph, inputs, forward, backward, partition, decompositions)

    torch._dynamo.reset()
    opaque = mock.patch("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v))
    with opaque, FakeTensorMode(allow_non_fake_inputs=True), inductor_config.patch(profile_bandwidth=True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = torch.compile(block, backend=backend, dynamic=False)(*make_inputs())
        out.backward(torch.empty_like(out))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="JiT-B/16", choices=JiT_models)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--whole", action="store_true", help="the whole network as one graph, instead of a block")
    parser.add_argument("--inductor", nargs="+", type=inductor_option, metavar="NAME=VALUE", default=[])
    args = parser.parse_args()
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = JiT_models[args.model](input_size=args.img_size)
    block, (n, half), context = net.blocks[-1], net.rope_cos.shape, net.in_context_len
    width = net.pos_embed.shape[-1]

    def images() -> tuple[Any, ...]:
        x = torch.empty(args.batch_size, net.in_channels, args.img_size, args.img_size)
        return x, torch.empty(args.batch_size), torch.empty(args.batch_size, dtype=torch.int64)

    def tokens() -> tuple[Any, ...]:
        c, t_emb, y_emb = (torch.empty(args.batch_size, width, requires_grad=True) for _ in range(3))
        x = torch.empty(args.batch_size, context + n, width, requires_grad=True)
        return x, c, torch.empty(context + n, half), torch.empty(context + n, half), t_emb, y_emb, context

    with inductor_config.patch(dict(args.inductor)):
        found = count_training(net, images) if args.whole else count_training(block, tokens)
    emit("kernels", torch.device("cpu"), {**vars(args), **found})


if __name__ == "__main__":
    main()
