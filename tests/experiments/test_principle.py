"""What hiding costs in principle, without training."""

import pytest
import torch

from experiments import data, principle, synthetic
from spectral_forcing import SpectralForcing

pytestmark = pytest.mark.usefixtures("cifar10_of_noise")
N = synthetic.SIZE


def test_nothing_is_lost_where_nothing_is_hidden_and_all_where_all_is():
    variance, second = data.open_data("power2").mode_power()
    times = torch.tensor([0.2, 0.6])
    found = principle.readings(SpectralForcing(N, c_min=9.0, c_max=9.0), variance, second, times)
    for name in ("hard", "gain1", "gain10"):
        torch.testing.assert_close(found[name], found["least"])
    torch.testing.assert_close(
        found["least"], data.open_data("power2").least_loss(times) / (1 - times.double()) ** 2, rtol=0.3, atol=0
    )  # the class is unknown here, and its mean part of the variance
    closed = principle.readings(SpectralForcing(N, c_min=-9.0, c_max=-9.0), variance, second, times)
    torch.testing.assert_close(closed["hard"], variance.mean() / (1 - times.double()) ** 2)
    torch.testing.assert_close(closed["gain1"], closed["hard"], rtol=1e-6, atol=0)


def test_rounding_to_a_mantissa():
    x = torch.tensor([1.0, 1 + 2**-8, 1 + 2**-7, 3.14159, -1e-30], dtype=torch.float64)
    torch.testing.assert_close(principle.round_to(x, 8), x.to(torch.bfloat16).double(), rtol=0, atol=0)
    torch.testing.assert_close(principle.round_to(x, 24), x.float().double(), rtol=0, atol=0)
    torch.testing.assert_close(principle.round_to(x, 11)[:4], x.half().double()[:4], rtol=0, atol=0)


def test_costs_agree_with_values_that_are_known():
    """Linear cutoff, power 1/k: 79% of the noise is hidden, and 0.02% and 0.79% are lost in float32 and bf16."""
    found = principle.costs("power1", "linear")
    assert found["hidden_noise"] == pytest.approx(0.79, abs=0.005)
    assert found["lost_percent"]["float32"] == pytest.approx(0.02, abs=0.002)
    assert found["lost_percent"]["bf16"] == pytest.approx(0.79, rel=0.1)
    assert found["lost_percent"]["hard"] == pytest.approx(4.2, rel=0.1)
    assert principle.costs("power2", "linear")["lost_percent"]["hard"] == pytest.approx(0.49, rel=0.1)
