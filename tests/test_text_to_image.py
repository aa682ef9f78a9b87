"""docs/text-to-image.md: where the filter goes in a packed text-to-image model. The page's code is run as it stands.

I images, N noisy tokens of all images, P = p p 3 numbers of a patch of p pixels. A grid is (h, w) tokens of an image.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import spectral_forcing
from spectral_forcing import SpectralForcing, dct_matrix, num_rings
from spectral_ops.patches import filter_patches, image_to_patches
from tests.golden_inputs import normals

PAGE = (Path(spectral_forcing.__file__).parent / "docs" / "text-to-image.md").read_text()
PATCH, GRIDS = 4, [(4, 4), (2, 6), (5, 3)]
N, P = sum(h * w for h, w in GRIDS), 3 * PATCH**2
TIMES = torch.tensor([0.1, 0.45, 0.8])
PROMPT = torch.tensor([3, 1, 4, 1]), normals(0, 6, P)  # text, and the patches of a clean image


@pytest.fixture(scope="module")
def page():
    """The names that the page's block defines."""
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    return SimpleNamespace(**names)


class Denoiser(nn.Module):
    """Text, clean patches and noisy patches in one sequence -> x (N, P). It knows nothing of the filter."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Embedding(8, width)
        self.clean, self.noisy = nn.Linear(P, width), nn.Linear(P, width)
        self.condition = nn.Linear(2, width)  # t and noise scale
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, P)

    def forward(self, text, clean, seen, t, grids):
        count = torch.tensor([h * w for h, w in grids])
        condition = self.condition(torch.stack([t, (count / 64).sqrt()], -1)).repeat_interleave(count, 0)  # (N, width)
        sequence = torch.cat([self.text(text), self.clean(clean), self.noisy(seen) + condition])
        return self.head(self.block(sequence[None])[0, -len(seen) :])


def test_filtering_patches_is_filtering_images_before_patchifying():
    """To the bit: only the order of the numbers differs. Batched with others of its size, an image may round apart."""
    sf = SpectralForcing()
    images = [normals(i, 3, h * PATCH, w * PATCH) for i, (h, w) in enumerate(GRIDS)]
    filtered = [sf(image, t) for image, t in zip(images, TIMES, strict=True)]
    for patch, order in ((PATCH, "hwc"), (PATCH, "chw"), (PATCH // 2, "chw")):  # half a token: two cuts of one image
        cut = [(h * PATCH // patch, w * PATCH // patch) for h, w in GRIDS]
        packed = torch.cat([image_to_patches(image, patch, order) for image in images])
        expected = torch.cat([image_to_patches(image, patch, order) for image in filtered])
        assert torch.equal(filter_patches(sf, packed, TIMES, cut, order=order), expected)
    batch = sf(torch.stack([images[0], images[0].flip(-1)]), TIMES[:2])[0]
    torch.testing.assert_close(batch, filtered[0], rtol=1e-5, atol=1e-6)


def test_text_and_clean_images_are_untouched_and_each_noisy_image_is_seen_at_its_own_time(page):
    model, sf, z = Denoiser(), SpectralForcing(), normals(1, N, P)
    inputs = {}
    for name in ("text", "clean", "noisy"):
        getattr(model, name).register_forward_hook(lambda _, args, out, name=name: inputs.update({name: args[0]}))
    v = page.velocity(model, PROMPT, z, TIMES, GRIDS, sf)
    assert torch.equal(inputs["text"], PROMPT[0]) and torch.equal(inputs["clean"], PROMPT[1])
    alone = [
        filter_patches(sf, part, t, [grid])
        for part, t, grid in zip(z.split([h * w for h, w in GRIDS]), TIMES, GRIDS, strict=True)
    ]
    assert torch.equal(inputs["noisy"], torch.cat(alone)) and not torch.allclose(inputs["noisy"], z, atol=0.1)
    assert torch.equal(v, (model(*PROMPT, torch.cat(alone), TIMES, GRIDS) - z) / (1 - page.per_token(TIMES, GRIDS)))


def test_targets_are_raw(page):
    """A network that knows x has no loss; one that answers 0 has the mean of (x / (1 - t))^2, whatever it sees."""
    x, e, sf = normals(2, N, P), normals(3, N, P), SpectralForcing()
    assert page.loss(lambda *_: x, PROMPT, x, e, TIMES, GRIDS, sf) == 0
    zero = page.loss(lambda *_: torch.zeros(N, P), PROMPT, x, e, TIMES, GRIDS, sf)
    torch.testing.assert_close(zero, (x / (1 - page.per_token(TIMES, GRIDS))).square().mean())


def test_the_state_is_raw_and_the_filter_gets_the_shifted_time(page):
    """With the answer x = 0 Euler's method is exact: the state at t is (1 - t) s e, and its filtering is seen."""
    sf, e, shift, steps, seen = SpectralForcing(), normals(4, N, P), 3.0, 4, []

    def zero(text, clean, tokens, t, grids):
        seen.append((tokens, t))
        return torch.zeros_like(tokens)

    end = page.sample(zero, PROMPT, e, GRIDS, steps, shift, sf)
    noise = e * torch.cat([torch.full((h * w, 1), math.sqrt(h * w / 64)) for h, w in GRIDS])
    for k, (tokens, given) in enumerate(seen):
        u = k / steps  # on the even grid
        t = u / (u + shift * (1 - u))
        torch.testing.assert_close(given, torch.full((len(GRIDS),), t))
        torch.testing.assert_close(tokens, filter_patches(sf, (1 - t) * noise, t, GRIDS), rtol=1e-4, atol=1e-5)
        assert u == 0 or not torch.allclose(tokens, filter_patches(sf, (1 - t) * noise, u, GRIDS), atol=1e-2)
    assert len(seen) == steps and end.abs().max() < 1e-5


def train(steps, loss):
    """A model after some steps on four fixed noisings of one batch, and its losses."""
    model, losses = Denoiser(), []
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x = torch.cat([image_to_patches(normals(5, 3, 1, 1).expand(3, h * PATCH, w * PATCH), PATCH) for h, w in GRIDS])
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(model, PROMPT, x, normals(6 + step % 4, N, P), TIMES.roll(step % 4), GRIDS)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return model.state_dict(), losses


def test_training_with_the_filter_and_without(page):
    """With it the loss falls. Without it the weights are, to the bit, those of a loss that has never heard of it."""

    def plain(model, prompt, x, e, t, grids):
        tt, s = page.per_token(t, grids), page.per_token(page.noise_scale(grids), grids)
        z = tt * x + (1 - tt) * s * e
        width = (1 - tt).clamp_min(page.T_EPS)
        return ((model(*prompt, z, t, grids) - z) / width - (x - z) / width).square().mean()

    weights, losses = train(60, lambda *args: page.loss(*args, SpectralForcing()))
    assert torch.tensor(losses).isfinite().all() and sum(losses[-4:]) < 0.2 * sum(losses[:4])
    without, expected = train(5, page.loss)[0], train(5, plain)[0]
    assert all(torch.equal(without[name], expected[name]) for name in expected) and weights.keys() == expected.keys()


def test_noise_scale_divides_the_power(page):
    """Ring k opens where data of power P_k and the noise s e are equal: t^2 P_k = (1 - t)^2 s^2."""
    n, k = 64, torch.arange(2, 9)
    power = 1e3 * torch.arange(1.0, num_rings(n) + 1).double() ** -2.5
    (s,) = page.noise_scale([(n // PATCH, n // PATCH)])
    t = s / (s + power[k].sqrt())
    sf = SpectralForcing(n, schedule="snr", power=power / s**2)
    assert s == 2 and ((sf.cutoff(t) / sf.radius_per_cycle).floor() == k).all()
    raw = SpectralForcing(n, schedule="snr", power=power)
    assert ((raw.cutoff(t) / raw.radius_per_cycle).floor() > k).all()  # it would open too early


def test_a_scene_at_twice_the_side_needs_the_same_cutoff(page):
    """Its DCT modes have four times the power, and so has the noise."""
    power = []
    for n in (16, 32):
        place = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        scene = torch.outer(torch.cos(3 * torch.pi * place), torch.cos(2 * torch.pi * place))
        power.append((dct_matrix(n) @ scene @ dct_matrix(n).T)[3, 2] ** 2)
    small, large = page.noise_scale([(4, 4), (8, 8)])
    torch.testing.assert_close(power[1] / power[0], (large / small).double() ** 2)
