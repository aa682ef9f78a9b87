"""The numbers against closed forms and naive implementations. N generated and M real images, F features."""

import numpy as np
import pytest
import torch

from util import scores
from util.scores import frechet_distance, inception_score, kernel_distance, kid_subset_size, precision_recall


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
    distance = frechet_distance(features, {"mu": mu_2, "sigma": basis * b @ basis.T})
    expected = ((mu_1 - mu_2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    own = {"mu": x.double().mean(dim=0).numpy(), "sigma": np.cov(x.double().numpy(), rowvar=False)}
    assert abs(frechet_distance(x, own)) < 1e-6


def test_inception_score_of_confident_and_of_constant_predictions():
    """One-hot predictions that fill C classes evenly in every split score C; equal predictions score 1."""
    constant = torch.zeros(100, 8)
    assert inception_score(constant) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    classes = torch.empty(100, dtype=torch.int64)
    order = np.random.RandomState(2020).permutation(100)  # the shuffle of torch-fidelity
    classes[torch.from_numpy(order)] = torch.arange(100) % 5
    mean, std = inception_score(torch.nn.functional.one_hot(classes, 8) * 100.0)
    assert (mean, std) == (pytest.approx(5, rel=1e-6), pytest.approx(0, abs=1e-5))


# --- precision and recall -------------------------------------------------------------------------------------------


def clouds(n: int, m: int, shift: float, width: float, f: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated (n, f), narrower by `width` and shifted, and real (m, f)."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, f, generator=g) * width + shift, torch.randn(m, f, generator=g)


def naive_share(points, centres, k: int = 3) -> float:
    """Share of the points inside a ball around some centre, whose radius is that of its k-th nearest other centre."""
    inside = 0
    radii = [
        sorted(np.linalg.norm(c - d) for j, d in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)
    ]
    for p in points:
        inside += any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
    return inside / len(points)


@pytest.mark.parametrize(("shift", "width"), [(0.0, 1.0), (0.8, 0.6), (0.0, 0.3)])
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


def test_precision_and_recall_at_the_extremes():
    x, y = clouds(30, 30, 100.0, 1.0)
    assert precision_recall(x, y) == (0, 0)
    assert precision_recall(x, x.clone()) == (1, 1)
    copies = y[:1] + 1e-4 * torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    assert precision_recall(copies, y) == (1, pytest.approx(1 / 30))  # good images, but always the same


# --- KID ------------------------------------------------------------------------------------------------------------


def test_kid_of_whole_sets_equals_the_unbiased_estimate():
    """Where a subset is the whole set, each of the 100 gives the same value, and no deviation."""
    x, y = clouds(12, 12, 0.5, 1.0)

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    x, y, n = x.double().numpy(), y.double().numpy(), len(x)
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    between = sum(kernel(a, b) for a in x for b in y) / n**2
    mean, std = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert mean == pytest.approx(within - 2 * between, rel=1e-9) and std == pytest.approx(0, abs=1e-12)
    assert mean > 0.01


def test_kid_of_one_distribution_is_about_zero():
    x, y = clouds(600, 500, 0.0, 1.0)
    mean, std = kernel_distance(x, y)
    far, _ = kernel_distance(x + 0.5, y)
    assert abs(mean) < 0.02 < far and std < 0.02


def test_kid_subsets(monkeypatch):
    assert [kid_subset_size(*sizes) for sizes in ((50_000, 10_000), (500, 10_000), (50_000, 20))] == [1000, 500, 20]
    monkeypatch.setattr(scores, "KID_SUBSET_SIZE", 10)
    assert kernel_distance(*clouds(30, 20, 0.5, 1.0))[1] > 0  # subsets differ
