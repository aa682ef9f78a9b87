"""Kernels and bytes that Inductor would need on a GPU, where they are known."""

import json
import sys

import torch
from torch import nn

from benchmarks import kernels


class Chain(nn.Module):
    """A product between two pieces of elementwise arithmetic."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(512, 512, bias=False)

    def forward(self, x):
        return self.linear(torch.sin(x)).float().exp()


def test_traffic_is_that_of_the_arithmetic():
    with kernels.FakeTensorMode(allow_non_fake_inputs=True):
        chain = Chain()
    forward = kernels.count_training(chain, lambda: (torch.empty(1024, 512, requires_grad=True),))["forward"]
    x, weight = 1024 * 512, 512 * 512
    expected = sorted([6 * x, 6 * weight, 6 * x])  # sin: float32 to bf16; cast of the weight; exp: bf16 to float32
    assert sorted(round(gb * 1e9) for _, gb in forward["each"]) == [round(n / 1e5) * 100_000 for n in expected]
    assert (forward["kernels"], forward["library_calls"]) == (3, 1)


def test_a_block_has_its_products_and_fuses_the_rest(monkeypatch, capsys):
    def line(*options):
        argv = ["kernels", "--model", "JiT-Demo/8", "--img_size", "32", "--batch_size", "4", *options]
        monkeypatch.setattr(sys, "argv", argv)
        kernels.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found, combined = line(), line("--inductor", "combo_kernels=True")
    assert (
        found["forward"]["library_calls"] == 6
    )  # adaLN, qkv, attention, its projection, two of the feed-forward layer
    assert found["backward"]["library_calls"] == 11  # two for each product, and attention
    assert combined["forward"]["kernels"] < found["forward"]["kernels"] < 30
    assert combined["forward"]["library_calls"] == 6
