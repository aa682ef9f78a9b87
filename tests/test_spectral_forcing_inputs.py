"""What Spectral Forcing takes: images of any size, times of any convention, compilers and functorch.

Shapes: images (B, C, H, W), masks (B, h, w).
"""

import math

import numpy as np
import pytest
import scipy.fft
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import spectral_forcing
from spectral_forcing import TIME_CONVENTIONS, SpectralForcing
from tests.test_spectral_forcing import SPECTRUM, TIMES, assert_same, noise

# --- any input


@pytest.mark.parametrize(("shape", "window"), [((4, 2, 6, 10), None), ((4, 1, 8, 12), 4), ((4, 7, 5, 9), None)])
def test_images_that_are_not_square_are_scipys(shape, window):
    z, (h, w) = noise(*shape), (window, window) if window else shape[-2:]
    out, expected = SpectralForcing(None, window)(z, TIMES), np.empty(shape)
    u, v = np.mgrid[:h, :w]
    r = np.sqrt((u / h) ** 2 + (v / w) ** 2) / np.sqrt(((h - 1) / h) ** 2 + ((w - 1) / w) ** 2)
    for b, i, j in np.ndindex(4, shape[2] // h, shape[3] // w):
        where = (b, slice(None), slice(i * h, (i + 1) * h), slice(j * w, (j + 1) * w))
        modes = scipy.fft.dctn(z[where].double().numpy(), axes=(1, 2), norm="ortho")
        mask = 1 / (1 + np.exp(-30 * (0.05 + 0.95 * float(TIMES[b]) - r)))
        expected[where] = scipy.fft.idctn(modes * mask, axes=(1, 2), norm="ortho")
    assert_same(out, torch.from_numpy(expected))


def test_equal_frequencies_pass_alike_along_both_axes():
    """In cycles per pixel, whatever the shape of the image; a mode of the cosine transform is its own answer."""
    h, w = 8, 32
    place = torch.arange(w, dtype=torch.float64) + 0.5
    for u in range(1, h):  # u / (2 h) cycles per pixel
        down = torch.cos(torch.pi * u * place[:h, None] / h).expand(h, w)
        along = torch.cos(torch.pi * u * place / h).expand(h, w)
        for t in (0.2, 0.6):
            gains = [(SpectralForcing()(x[None], t)[0] * x).sum() / x.square().sum() for x in (down, along)]
            assert float(gains[0]) == pytest.approx(float(gains[1]), rel=1e-9)


def test_frames_of_a_video_are_images():
    operator, video = SpectralForcing(), noise(4, 3, 5, 8, 12)  # (B, C, T, H, W)
    out = operator(video, TIMES)
    for frame in range(5):
        assert_same(out[:, :, frame], operator(video[:, :, frame], TIMES))
    assert operator(video[0], 0.31).shape == (3, 5, 8, 12)


def test_conventions_of_time():
    """Where the signal-to-noise ratio of z is the same, the filter is; and the table tells what z is."""
    z, t = noise(4, 1, 8, 8), torch.tensor([0.02, 0.31, 0.77, 0.99])
    snr = (t / (1 - t)) ** 2
    alphas = torch.linspace(0.999, 0.001, 500)
    steps = torch.tensor([0, 20, 400, 499])
    times = {
        "flow": t,
        "flow_1000": 1000 * t,
        "sigma": 1 - t,
        "sigma_1000": 1000 * (1 - t),
        "edm": snr**-0.5,
    }
    assert set(times) == set(TIME_CONVENTIONS)
    expected = SpectralForcing()(z, t)
    for convention, values in times.items():
        assert_same(SpectralForcing(time_convention=convention)(z, values), expected, 1e-5)
    ddpm = SpectralForcing(time_convention="ddpm", alphas_cumprod=alphas)
    a = alphas[steps].double()
    expected = SpectralForcing()(z, (a / (1 - a)).sqrt() / (1 + (a / (1 - a)).sqrt()))
    assert_same(ddpm(z, steps), expected, 1e-5)
    assert ddpm(z, steps.float()).equal(ddpm(z, steps))
    assert SpectralForcing(time_convention="edm")(z, 0.0).equal(SpectralForcing()(z, 1))  # whole numbers are times, too


@pytest.mark.parametrize(
    ("convention", "times", "sentence"),
    [
        ("flow", [0.2, 700.0], "from 0.2 to 700 are not those of the convention 'flow', which are from 0 to 1"),
        ("flow", [-0.1, 0.5], "from -0.1 to 0.5"),
        ("flow", [math.nan, 0.5], "from nan to nan"),
        ("sigma", [14.6, 0.5], "from 0.5 to 14.6 are not those of the convention 'sigma'"),
        ("sigma_1000", [0.0, 1100.0], "from 0 to 1100 .* from 0 to 1000"),
        ("edm", [-1.0, 80.0], "from -1 to 80 .* from 0 to inf"),
        ("ddpm", [0.0, 3.0], "from 0 to 3 .* from 0 to 2"),
        ("ddpm", [0.2, 0.7], "from 0.2 to 0.7 are no steps"),
    ],
)
def test_times_of_another_convention_are_refused(convention, times, sentence):
    table = [0.9, 0.5, 0.1] if convention == "ddpm" else None
    operator = SpectralForcing(time_convention=convention, alphas_cumprod=table)
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence):
            operator(noise(2, 1, 8, 8), torch.tensor(times))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: f(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 0.5), "torch.uint8; noisy images are floating-point"),
        (lambda f: f(torch.zeros(2, 3, 8, 8), torch.zeros(2, device="meta")), "t is on meta and z on cpu"),
        (lambda f: f(torch.zeros(2, 3, 8, 8), torch.zeros(3)), r"t has the shape \(3,\); .* each of 2 images"),
        (lambda f: f(torch.zeros(2, 3, 1, 8), 0.5), "1x8 pixels"),
        (lambda f: f(torch.zeros(8, 8), 0.5), r"z has the shape \(8, 8\)"),
        (
            lambda f: f(torch.zeros(4, 16, 48), TIMES),
            r"\(4, 16, 48\); \(B, ..., H, W\) was expected \(tokens: filter_pat",
        ),
        (lambda f: SpectralForcing(None, 4)(torch.zeros(2, 3, 8, 10), 0.5), "8x10 .* windows of 4"),
        (lambda f: SpectralForcing(time_convention="karras"), "'karras' must be one of flow, .* edm, ddpm"),
        (lambda f: SpectralForcing(time_convention="ddpm"), "needs alphas_cumprod"),
        (lambda f: SpectralForcing(time_convention="ddpm", alphas_cumprod=[1.5]), "needs alphas_cumprod"),
        (lambda f: SpectralForcing(time_convention="ddpm", alphas_cumprod=[1e-4, 0.02]), "fall from 1 towards 0"),
        (lambda f: SpectralForcing(alphas_cumprod=[0.9]), "is for the time convention 'ddpm', not 'flow'"),
        (lambda f: SpectralForcing(schedule="power", alpha=2.0), "'power' counts cycles per image"),
    ],
)
def test_input_that_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(SpectralForcing())


# --- compilers and functorch

KINDS = {
    "any size": {},
    "windows": {"window_size": 4},
    "snr": {"img_size": 32, "schedule": "snr", "power": SPECTRUM},
    "ddpm": {"time_convention": "ddpm", "alphas_cumprod": [0.9, 0.5, 0.1]},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_one_graph_and_export(settings):
    operator, z = SpectralForcing(**settings), noise(3, 2, 32, 32)
    t = torch.tensor([0, 2, 1]) if "ddpm" in settings.values() else TIMES[:3]
    expected = operator(z, t)
    graph = torch.compile(SpectralForcing(**settings), backend="eager", fullgraph=True)
    assert_same(graph(z, t), expected)
    batch, height, width = (torch.export.Dim(name, min=2, max=512) for name in ("batch", "height", "width"))
    any_size = {2: height, 3: width} if settings.keys().isdisjoint({"img_size", "window_size"}) else {}
    shapes = {0: batch, **any_size}, {0: batch}
    program = torch.export.export(SpectralForcing(**settings), (z, t), dynamic_shapes=shapes)
    assert_same(program.module()(z[:2], t[:2]), expected[:2])
    if any_size:
        other = z[:2, :, :14, :20]
        assert_same(program.module()(other, t[:2]), operator(other, t[:2]))


def test_compiled_for_all_numbers_and_few_sizes():
    """A number as time, as in a loop over steps, and sizes that come and go."""
    counter, z = CompileCounter(), noise(3, 2, 32, 32)
    graph = torch.compile(SpectralForcing(), backend=counter, fullgraph=True)
    for i in range(12):
        assert_same(graph(z, i / 12), SpectralForcing()(z, i / 12))
    assert counter.frame_count <= 2
    for h, w in ((8, 8), (8, 12), (16, 12), (10, 14), (6, 20), (32, 8)):
        graph(z[..., :h, :w], TIMES[:3])
    assert counter.frame_count <= 5


@pytest.mark.slow  # Inductor
def test_compiled_by_inductor():
    operator, z = SpectralForcing(), noise(4, 3, 8, 12)
    assert_same(torch.compile(operator, fullgraph=True)(z, TIMES), operator(z, TIMES))


def test_tables_made_within_transforms_serve_others():
    """None is kept that belongs to a transform, to FakeTensorMode or to inference."""
    z, w = noise(4, 2, 9, 7), noise(4, 2, 9, 7, seed=1)
    expected = SpectralForcing()(z, TIMES)

    def with_fake_tensors():
        with FakeTensorMode():
            assert SpectralForcing()(torch.ones(4, 2, 9, 7), torch.ones(4)).shape == z.shape

    def in_inference_mode():
        with torch.inference_mode():
            SpectralForcing()(z, TIMES)

    transforms = [
        lambda: torch.func.vmap(SpectralForcing())(z[:, None], TIMES),
        lambda: torch.func.grad(lambda z: SpectralForcing()(z, TIMES).sum())(z),
        lambda: torch.func.vmap(torch.func.grad(lambda z, t: SpectralForcing()(z[None], t).sum()))(z, TIMES),
        with_fake_tensors,
        in_inference_mode,
    ]
    for transform in transforms:
        spectral_forcing._TABLES.clear()
        transform()
        leaf = z.clone().requires_grad_()
        out = SpectralForcing()(leaf, TIMES)
        assert out.equal(expected)
        (gradient,) = torch.autograd.grad((out * w).sum(), leaf)
        assert_same(gradient, SpectralForcing()(w, TIMES))
