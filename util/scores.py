"""The numbers themselves: gathered features in, values out, by torch-fidelity's functions where it has them.

N  generated images      M  real images whose features a reference file holds      F  features of one stream
"""

import numpy as np
import torch
from torch import Tensor

from util.features import DigitPixels, MetricError

IS_SPLITS, FIDELITY_SEED = 10, 2020  # torch-fidelity's defaults, as are the next two lines
PRC_NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
PRC_ROWS = 1000  # rows of the distance matrix at a time: 1000 x 50,000 are 200 MB
DIGITS_HELD_OUT, DIGITS_SEED = 597, 0  # of 1797 real digits, 1200 train the classifier whose accuracy is reported


def frechet_distance(features: Tensor, statistics: dict[str, np.ndarray]) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features.

        d = |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2))

    Both steps are torch-fidelity's functions. The statistics of `features` are computed in the type that they
    come in, as torch-fidelity does with float32, and then cast to float64.

    Args:
        features: (N, F) on the CPU, N >= 2.
        statistics: mu (F,) and sigma (F, F) in float64.
    Raises: MetricError if the distance cannot be computed or is not finite.
    Source: Heusel et al. 2017, arXiv:1706.08500, equation 6.
    """
    from torch_fidelity import metric_fid

    ours = metric_fid.fid_features_to_statistics(features)
    ours = {key: np.asarray(value, dtype=np.float64) for key, value in ours.items()}
    try:
        distance = metric_fid.fid_statistics_to_metric(ours, statistics, False)[metric_fid.KEY_METRIC_FID]
    except np.linalg.LinAlgError as error:
        raise MetricError(f"The Fréchet distance could not be computed: {error}.") from error
    if not np.isfinite(distance):
        raise MetricError(f"The Fréchet distance is {distance}: the features or the reference are too large.")
    return distance


def inception_score(logits: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) of the Inception Score over 10 splits, exp(E_x KL(p(y|x) || p(y))), torch-fidelity's.

    Args:
        logits: (N, 1008) in index order: which images share a split depends on it.
    Source: Salimans et al. 2016, arXiv:1606.03498.
    """
    from torch_fidelity import metric_isc

    out = metric_isc.isc_features_to_metric(logits, splits=IS_SPLITS, shuffle=True, rng_seed=FIDELITY_SEED)
    return out[metric_isc.KEY_METRIC_ISC_MEAN], out[metric_isc.KEY_METRIC_ISC_STD]


def precision_recall(generated: Tensor, real: Tensor, rows: int = PRC_ROWS) -> tuple[float, float]:
    """Improved precision and recall (P, R), with k = 3 and by torch-fidelity's function in its chunked form.

        r_k(y, Y) = distance from y in Y to its k-th nearest other point of Y
        P = share of generated x with |x - y| <= r_k(y, real) for some real y;   R the same with the sets exchanged

    Args:
        generated: (N, F), N >= 4, on the CPU.
        real: (M, F), M >= 4, on the CPU.
        rows: how many rows of the distance matrices exist at a time; it does not change the result.
    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 to 3.
    """
    from torch_fidelity import metric_prc

    out = metric_prc.prc_features_to_metric(
        generated,
        real,
        prc_neighborhood=PRC_NEIGHBOURS,
        prc_batch_size=rows,
        save_cpu_ram=True,
        verbose=False,
    )
    return out[metric_prc.KEY_METRIC_PRECISION], out[metric_prc.KEY_METRIC_RECALL]


def kid_subset_size(generated: int, real: int) -> int:
    """Images in each subset of KID: 1000, or as many as there are."""
    return min(KID_SUBSET_SIZE, generated, real)


def kernel_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) of the Kernel Inception Distance over 100 random subsets, torch-fidelity's.

        MMD^2 between X and Y, unbiased, with the kernel k(x, y) = (x . y / F + 1)^3; may be slightly negative

    Args:
        generated: (N, F), N >= 2, on the CPU.
        real: (M, F), M >= 2, on the CPU.
    Source: Binkowski et al. 2018, arXiv:1801.01401, section 4.
    """
    from torch_fidelity import metric_kid

    out = metric_kid.kid_features_to_metric(
        generated,
        real,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=kid_subset_size(len(generated), len(real)),
        rng_seed=FIDELITY_SEED,
        verbose=False,
    )
    return out[metric_kid.KEY_METRIC_KID_MEAN], out[metric_kid.KEY_METRIC_KID_STD]


class DigitClassifier:
    """A support vector machine on the 64 numbers of DigitPixels, fitted to scikit-learn's 1797 real digits.

    The real digits go through the images of the training set, so that real and generated ones take the same path.
    `held_out_accuracy` is that of the same kind of classifier, fitted to 1200 digits of a fixed permutation and
    tested on the other 597: what perfect generation would about reach.

    Args:
        img_size: pixels per side of the generated images, at least 8.
    """

    def __init__(self, img_size: int):
        from util.data import build_dataset

        dataset = build_dataset("digits", None, img_size, "train")
        images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
        x = DigitPixels()(torch.stack(images))["digit_8x8"].numpy()  # (1797, 64)
        y = np.array(labels)  # (1797,)
        order = np.random.RandomState(DIGITS_SEED).permutation(len(y))
        held_out, rest = order[:DIGITS_HELD_OUT], order[DIGITS_HELD_OUT:]
        self.held_out_accuracy = float(self._new().fit(x[rest], y[rest]).score(x[held_out], y[held_out]))
        self.model = self._new().fit(x, y)

    @staticmethod
    def _new():
        from sklearn.svm import SVC

        return SVC(kernel="rbf", C=10.0, gamma=0.001)

    def agreement(self, features: Tensor, labels: Tensor) -> float:
        """Share of the features (N, 64) whose predicted class is that of `labels` (N,)."""
        return float((self.model.predict(features.numpy()) == labels.cpu().numpy()).mean())
