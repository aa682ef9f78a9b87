"""Agreement with the published computation on fixed inputs (tests/golden/README.md)."""

import pytest
import torch

from model_jit import JiT_models
from sampler import guided, sample, uniform_grid
from spectral_forcing import SpectralForcing
from tests.golden_inputs import GOLDEN, SHAPES, normals, small_denoiser

PUBLISHED = {
    **{"JiT-B/8": 130_607_040, "JiT-B/16": 131_123_712, "JiT-B/32": 133_190_400},
    **{"JiT-L/16": 458_877_664, "JiT-L/32": 461_534_176, "JiT-H/16": 952_514_368, "JiT-H/32": 956_055_616},
    **{"JiT-700M": 688_228_816, "JiT-2B": 2_062_233_966, "JiT-7B": 7_321_257_952},
}


def assert_golden(a: torch.Tensor, name: str, tolerance: float) -> None:
    torch.testing.assert_close(a, torch.from_numpy(GOLDEN[name]), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("n", "window"), [(16, 16), (32, 8)])
def test_spectral_forcing(n, window):
    z = normals(7, 4, 3, n, n)
    assert_golden(SpectralForcing(n, window)(z, torch.tensor([0, 0.25, 0.7, 1.0])), f"sf_{n}_{window}", 1e-5)


@pytest.mark.parametrize(("sf", "name"), [(True, "jit_small_sf"), (False, "jit_small_base")])
@torch.no_grad()
def test_network(sf, name):
    x, t, y = normals(11, 3, 3, 32, 32), torch.tensor([0.05, 0.5, 0.95]), torch.tensor([0, 3, 10])
    denoiser = small_denoiser(sf)
    assert_golden(denoiser.predict(x, t, y), name, 1e-4)
    assert_golden(denoiser.net.pos_embed, "pos_embed_small", 1e-6)


@pytest.mark.parametrize(
    ("name", "steps", "interval"), [("sample_heun", 6, (0.1, 1.0)), ("sample_heun25_edges", 25, (0.2, 0.8))]
)
@torch.no_grad()
def test_sampler(name, steps, interval):
    velocity = guided(small_denoiser().velocity, torch.tensor([1, 5, 9]), 10, 2.9, interval)
    assert_golden(sample(velocity, normals(13, 3, 3, 32, 32), uniform_grid(steps), "heun"), name, 2e-4)


@torch.no_grad()
def test_loss():
    x, e = torch.tanh(normals(17, 3, 3, 32, 32)), normals(19, 3, 3, 32, 32)
    loss = small_denoiser()(x, torch.tensor([1, 5, 9]), torch.tensor([0.1, 0.6, 0.98]), e)
    torch.testing.assert_close(loss, torch.tensor(GOLDEN["loss_x"]).float().reshape(()), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        net = JiT_models[name](input_size=256)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("entry", SHAPES)
def test_published_state_dict_keys_and_shapes(entry):
    """Keys, shapes and order; the linear layout of `proj1` is the same numbers reshaped."""
    name, layout = entry.split("|")
    with torch.device("meta"):
        net = JiT_models[name]()
    ours, published = {k: list(v.shape) for k, v in net.state_dict().items()}, dict(SHAPES[entry]["keys"])
    if layout == "sf":
        rows, *columns = ours["x_embedder.proj1.weight"]
        assert published.pop("x_embedder.proj1.weight") == [rows, columns[0] * columns[1] * columns[2]]
        del ours["x_embedder.proj1.weight"]
    assert ours == published
    assert SHAPES[entry]["params"] == sum(p.numel() for p in net.parameters())
    trained = [n for n, _ in net.named_parameters()]
    assert trained == [k for k in SHAPES[entry]["keys"] if k != "pos_embed"]
