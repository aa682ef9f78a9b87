"""Arithmetic by formula against the published figures and against a count of what torch executes: util/flops.py."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_jit import JiT, JiT_models
from spectral_forcing import SpectralForcing
from tests.golden_inputs import SMALL
from util import cpu_layers
from util.flops import forward_flop, operator_flop, training_flop


@pytest.mark.parametrize(("model", "gflop"), [("JiT-B/32", 15.2), ("JiT-B/16", 50.5), ("JiT-700M", 79.3)])
def test_published_figures(model, gflop):
    with torch.device("meta"):
        net = JiT_models[model](input_size=256)
    assert forward_flop(net) / 1e9 == pytest.approx(gflop, rel=2e-3)
    assert training_flop(net) == 3 * forward_flop(net)


@pytest.mark.parametrize("in_context", [{}, {"in_context_len": 0}])
def test_network_against_a_count(in_context):
    net = JiT(**{**SMALL, **in_context})
    with cpu_layers.switched_off(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 3, 32, 32), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert counter.get_total_flops() == 2 * forward_flop(net)


@pytest.mark.parametrize("window", [None, 8])
def test_operator_against_a_count(window):
    operator = SpectralForcing(32, window)
    with cpu_layers.switched_off(), FlopCounterMode(display=False) as counter:
        operator(torch.zeros(2, 3, 32, 32), torch.zeros(2))
    assert counter.get_total_flops() == 2 * operator_flop(operator)
    assert operator_flop(SpectralForcing(256)) / 1e9 == pytest.approx(0.40, abs=0.005)
