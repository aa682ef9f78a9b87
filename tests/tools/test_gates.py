"""The gates of a spectral residual: their values, their picture, and the command."""

import pytest
import torch

from spectral_ops.residual import SpectralResidual
from tests.conftest import TINY_MODEL, read_log, train
from tools import gates as tool
from util.evaluation.gates import TIMES, compute_gates

pytestmark = pytest.mark.usefixtures("tiny")


def network(mode):
    torch.manual_seed(0)
    operator = {"spectral_residual": lambda dim, side: SpectralResidual(dim, side, mode, 0.7)}
    return TINY_MODEL(input_size=16, num_classes=3, block_operators=operator)


@pytest.mark.parametrize("mode", ["time", "time_label", "static"])
def test_gates_are_those_of_the_blocks(mode):
    net = network(mode)
    found = compute_gates(net)
    assert found["low"].shape == found["high"].shape == (len(net.blocks), TIMES)
    t_emb = net.t_embedder(found["t"][7:8]).expand(3, -1)
    expected = net.blocks[2].spectral_residual.gates(t_emb, net.y_embedder(torch.arange(3)))
    for name, gate in zip(("low", "high"), expected, strict=True):
        gate = gate.detach().expand(3)
        torch.testing.assert_close(found[name][2, 7], gate.mean(), rtol=1e-5, atol=1e-6)
        if mode == "time_label":
            torch.testing.assert_close(found[f"{name}_spread"][2, 7], gate.std(correction=0), rtol=1e-4, atol=1e-6)
    assert ("low_spread" in found) == (mode == "time_label")


def test_training_and_the_command_draw_the_same_gates(tmp_path, capsys):
    folder = train(tmp_path / "run", epochs=1, spectral_residual="time_label")
    (line,) = read_log(folder, "gates")
    assert (folder / "gates.png").stat().st_size > 1000
    assert tool.main([str(folder)]) == 0 and "gates.png" in capsys.readouterr().out
    assert read_log(folder, "gates")[1] == line


def test_without_a_residual_there_are_no_gates(trained, capsys):
    assert compute_gates(TINY_MODEL(input_size=16, num_classes=3)) is None
    assert tool.main([str(trained)]) == 2
    assert "was trained without --spectral_residual" in capsys.readouterr().err
