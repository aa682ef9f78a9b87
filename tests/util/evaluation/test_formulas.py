"""Formulas of metrics: values against closed forms and naive loops.

Shapes: N generated and M real images, F features.
"""

import numpy as np
import pytest
import torch

from util.evaluation.formulas import (
    clip_distance,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def test_frechet_distance_of_commuting_gaussians():
    """Diagonal in one basis: d = |mu_1 - mu_2|^2 + sum_i (sqrt(a_i) - sqrt(b_i))^2, with a_i, b_i the eigenvalues."""
    n, f = 40, 6
    rng = np.random.RandomState(0)
    basis = np.linalg.qr(rng.randn(f, f))[0]  # (F, F)
    white = rng.randn(n, f)
    white = np.linalg.qr(white - white.mean(axis=0))[0] * np.sqrt(n - 1)  # (N, F), zero mean, covariance I
    a, b = np.array([4.0, 1.0, 0.25, 9.0, 0.0, 2.0]), np.array([1.0, 1.0, 4.0, 0.0, 3.0, 2.5])
    mu_1, mu_2 = rng.randn(f), rng.randn(f)
    features = torch.from_numpy(white * np.sqrt(a) @ basis.T + mu_1)
    distance = frechet_distance(features, mu_2, basis * b @ basis.T)
    expected = ((mu_1 - mu_2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance == pytest.approx(expected, rel=1e-6)


def test_inception_score_of_confident_and_of_constant_predictions():
    """One-hot predictions that fill C classes evenly in every split score C; equal predictions score 1."""
    assert inception_score(torch.zeros(100, 8)) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    classes = torch.empty(100, dtype=torch.int64)
    order = np.random.RandomState(2020).permutation(100)  # the shuffle of torch-fidelity
    classes[torch.from_numpy(order)] = torch.arange(100) % 5
    mean, std = inception_score(torch.nn.functional.one_hot(classes, 8) * 100.0)
    assert (mean, std) == (pytest.approx(5, rel=1e-6), pytest.approx(0, abs=1e-5))


def clouds(n: int, m: int, shift: float, width: float, f: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated (n, f), narrower by `width` and shifted, and real (m, f)."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, f, generator=g) * width + shift, torch.randn(m, f, generator=g)


def naive_share(points, centres, k: int = 3) -> float:
    """Share of the points inside a ball around some centre, whose radius is that of its k-th nearest other centre."""
    radii = [
        sorted(np.linalg.norm(c - d) for j, d in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)
    ]
    inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize(("shift", "width"), [(0.8, 0.6), (0.0, 0.3)])
def test_precision_and_recall_equal_a_naive_loop(shift, width):
    generated, real = clouds(37, 52, shift, width)
    precision, recall = precision_recall(generated, real)
    x, y = generated.double().numpy(), real.double().numpy()
    assert precision == pytest.approx(naive_share(x, y)) and recall == pytest.approx(naive_share(y, x))
    assert precision != recall


def test_precision_and_recall_do_not_depend_on_the_chunks():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    generated, real = clouds(203, 151, 0.1, 0.95, f=40)
    whole = calculate_precision_recall_full(generated, real, 3)
    assert 0 < whole[1] < whole[0] < 1
    for rows in (7, 50, 151, 1000):
        assert precision_recall(generated, real, rows) == pytest.approx(whole, abs=1e-7)


def test_precision_and_recall_of_far_equal_and_repeated_images():
    x, y = clouds(30, 30, 100.0, 1.0)
    assert precision_recall(x, y) == (0, 0) and precision_recall(x, x.clone()) == (1, 1)
    copies = y[:1] + 1e-4 * torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    assert precision_recall(copies, y) == (1, pytest.approx(1 / 30))  # good images, but always the same


def test_density_and_coverage_equal_a_naive_loop():
    """Also in chunks, and not the same if the sets are exchanged."""
    generated, real = clouds(37, 52, 0.5, 0.6)
    x, y = generated.double().numpy(), real.double().numpy()
    radii = [sorted(np.linalg.norm(y - a, axis=1))[5] for a in y]  # the first of these is 0, its own
    inside = [[np.linalg.norm(a - b) < r for a in x] for b, r in zip(y, radii, strict=True)]
    expected = np.sum(inside) / (5 * len(x)), np.mean([any(row) for row in inside])
    assert density_coverage(generated, real) == pytest.approx(expected)
    assert density_coverage(generated, real, rows=7) == pytest.approx(expected)
    assert density_coverage(real, generated) != pytest.approx(expected) and 0 < expected[1] < 1


def test_density_and_coverage_of_far_equal_and_repeated_images():
    x, y = clouds(30, 30, 100.0, 1.0)
    assert density_coverage(x, y) == (0, 0)
    density, coverage = density_coverage(y, y.clone())  # a point lies in its own ball and in about k others
    assert 0.8 < density < 1.6 and coverage == 1
    copies = y[:1] + 1e-4 * torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    density, coverage = density_coverage(copies, y)
    assert coverage < 0.5 and density == pytest.approx(coverage * 30 / 5, rel=1e-6)  # each ball has all copies or none


KERNELS = {
    kernel_distance: lambda a, b: (float(a @ b) / len(a) + 1) ** 3,
    clip_distance: lambda a, b: np.exp(-((a - b) ** 2).sum() / (2 * 10**2)),
}


@pytest.mark.parametrize("distance", KERNELS)
def test_kernel_distance_of_whole_sets_equals_the_unbiased_estimate(distance):
    """Where a subset is the whole set, each of the 100 gives the same value, and no deviation."""
    kernel = KERNELS[distance]
    x, y = (10 * z.double().numpy() for z in clouds(12, 12, 0.5, 1.0))
    n = len(x)
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    between = sum(kernel(a, b) for a in x for b in y) / n**2
    mean, std = distance(torch.from_numpy(x), torch.from_numpy(y))
    assert mean == pytest.approx(within - 2 * between, rel=1e-9) and std == pytest.approx(0, abs=1e-9)
    assert mean > 0.01
