"""The formulas of the metrics: features in, numbers out. All but two are torch-fidelity's functions.

Shapes: N generated images, M real images, F features of a stream.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from util.data.datasets import Digits
from util.evaluation.features import DigitPixels

ISC = {"splits": 10, "shuffle": True, "rng_seed": 2020}  # torch-fidelity's defaults, and in each report
PRC = {"prc_neighborhood": 3}
KID = {"kid_subsets": 100, "kid_subset_size": 1000, "rng_seed": 2020}
KID_CLIP = {**KID, "kid_kernel": "rbf", "kid_kernel_rbf_sigma": 10}
DENSITY = {"neighbours": 5}


def frechet_distance(features: Tensor, mu: Tensor | np.ndarray, sigma: Tensor | np.ndarray) -> float:
    """Compute the Fréchet distance between the Gaussians fitted to two sets of features.

        d = |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2))

    As in torch-fidelity, the mean of float32 `features` (N, F) is float32, their covariance and all else float64
    (Heusel et al. 2017, arXiv:1706.08500, equation 6).
    """
    from torch_fidelity import metric_fid

    return frechet_of_moments(*metric_fid.fid_features_to_statistics(features).values(), mu, sigma)


def frechet_of_moments(*moments: Tensor | np.ndarray) -> float:
    """Compute the same of mu_1 (F,), sigma_1 (F, F), mu_2, sigma_2."""
    from torch_fidelity import metric_fid

    mu_1, sigma_1, mu_2, sigma_2 = (np.asarray(array, dtype=np.float64) for array in moments)
    pair = {"mu": mu_1, "sigma": sigma_1}, {"mu": mu_2, "sigma": sigma_2}
    return metric_fid.fid_statistics_to_metric(*pair, False)[metric_fid.KEY_METRIC_FID]


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Compute mean and standard deviation over 10 splits of the Inception Score, exp(E_x KL(p(y|x) || p(y))).

    `logits` (N, 1008) are in index order, which decides the splits (Salimans et al. 2016, arXiv:1606.03498).
    """
    from torch_fidelity import metric_isc

    out = metric_isc.isc_features_to_metric(logits, **ISC)
    return out[metric_isc.KEY_METRIC_ISC_MEAN], out[metric_isc.KEY_METRIC_ISC_STD]


def precision_recall(generated: Tensor, real: Tensor, rows: int = 1000) -> tuple[float, float]:
    """Compute improved precision and recall (P, R) of features (N, F) and (M, F), with k = 3.

        r_k(y, Y) = distance from y in Y to its k-th nearest other point of Y
        P = share of generated x with |x - y| <= r_k(y, real) for some real y;   R the same with the sets exchanged

    `rows` of the distance matrices exist at a time: 1000 x 50,000 are 200 MB (Kynkäänniemi et al. 2019,
    arXiv:1904.06991, equations 1 to 3).
    """
    from torch_fidelity import metric_prc

    how = {"prc_batch_size": rows, "save_cpu_ram": True, "verbose": False}
    out = metric_prc.prc_features_to_metric(generated, real, **PRC, **how)
    return out[metric_prc.KEY_METRIC_PRECISION], out[metric_prc.KEY_METRIC_RECALL]


def density_coverage(generated: Tensor, real: Tensor, rows: int = 1000) -> tuple[float, float]:
    """Compute density and coverage (D, C) of features (N, F) and (M, F), with k = 5.

        B(y) = the points nearer to the real y than its k-th nearest other real point
        D = mean over generated x of (number of y with x in B(y)) / k;   C = share of real y with some x in B(y)

    Density counts how many real neighbourhoods an image is in, where precision asks for one; it may exceed 1. Both
    look at the neighbourhoods of real images alone, so that no stray generated one widens them. `rows` of the distance
    matrices exist at a time (Naeem et al. 2020, arXiv:2002.09797).
    """
    k = DENSITY["neighbours"]
    radii = torch.cat([torch.cdist(part, real).kthvalue(k + 1).values for part in real.split(rows)])  # (M,)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for part in generated.split(rows):
        near = torch.cdist(part, real) < radii  # (rows, M)
        inside += near.sum().item()
        covered |= near.any(dim=0)
    return inside / (k * len(generated)), covered.double().mean().item()


def kernel_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Compute mean and standard deviation of the Kernel Inception Distance over 100 random subsets of 1000 images.

        MMD^2 between X and Y, unbiased, with the kernel k(x, y) = (x . y / F + 1)^3; may be slightly negative

    A subset of fewer than 1000 images is all of them (Binkowski et al. 2018, arXiv:1801.01401, section 4).
    """
    return _squared_mmd(generated, real, KID)


def clip_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Compute the same with the kernel k(x, y) = exp(-|x - y|^2 / (2 * 10^2)), for CLIP's embeddings.

    It is not CMMD (Jayasumana et al. 2024, arXiv:2401.09603), which has this kernel, but normalises the embeddings,
    takes all pairs of all images, each image with itself included, and multiplies by 1000.
    """
    return _squared_mmd(generated, real, KID_CLIP)


def _squared_mmd(generated: Tensor, real: Tensor, settings: dict) -> tuple[float, float]:
    from torch_fidelity import metric_kid

    size = min(settings["kid_subset_size"], len(generated), len(real))
    how = settings | {"kid_subset_size": size, "verbose": False}
    out = metric_kid.kid_features_to_metric(generated, real, **how)
    return out[metric_kid.KEY_METRIC_KID_MEAN], out[metric_kid.KEY_METRIC_KID_STD]


@cache
def digit_classifier(img_size: int) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Fit a support vector machine to scikit-learn's 1797 real digits, as images of img_size pixels per side.

    Returns a function from features (n, 64) to classes (n,), and the accuracy of a fit to 1200 digits on the other 597.
    """
    from sklearn.svm import SVC

    images, labels = zip(*Digits(img_size), strict=True)
    x, y = DigitPixels()(torch.stack(images))["digit_8x8"].numpy(), np.array(labels)  # (1797, 64), (1797,)
    test, train = np.split(np.random.RandomState(0).permutation(len(y)), [597])
    model = SVC(kernel="rbf", C=10.0, gamma=0.001)
    accuracy = model.fit(x[train], y[train]).score(x[test], y[test])
    return model.fit(x, y).predict, accuracy


def class_agreement(features: Tensor, labels: Tensor, img_size: int) -> tuple[float, float]:
    """Return the share of images read as the class asked for, and about what perfect generation would reach."""
    predict, accuracy = digit_classifier(img_size)
    return (predict(features.numpy()) == labels.cpu().numpy()).mean(), accuracy
