"""Distances between two sets of features, as pure functions on arrays; nothing here knows images.

Sources: FID, Heusel et al. 2017 (arXiv:1706.08500); KID, Binkowski et al. 2018 (arXiv:1801.01401);
precision and recall, Kynkäänniemi et al. 2019 (arXiv:1904.06991); density and coverage, Naeem et al.
2020 (arXiv:2002.09797); CMMD, Jayasumana et al. 2024 (arXiv:2401.09603).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = [
    "check_covariance",
    "factor_of_covariance",
    "factor_of_features",
    "frechet_distance",
    "frechet_terms",
    "gaussian_mmd",
    "kernel_distance",
    "precision_recall_density_coverage",
]

# Below this ratio of the smallest to the largest eigenvalue, rounding errors of a squared matrix would
# show in the roots of its eigenvalues.
_WELL_CONDITIONED = 1e-12
# Rows that are compared with each other at once: float64 copies and distances of some 60 MB, however
# many images there are.
_CHUNK = 1024
# Squared distances nearer to each other than this share of a squared norm are equal: they are computed
# as |x|^2 + |y|^2 - 2xy, and the last digits depend on which block a pair falls into.
_TIE = 1e-12


FEWEST_FOR_KID, FEWEST_FOR_PRDC = 4, 6
"""The fewest images for a measure: two in half of a side; one more than neighbours."""


def frechet_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """Return the squared Fréchet distance of two normal distributions.

    ``|m1 - m2|^2 + tr C1 + tr C2 - 2 tr sqrt(C1 C2)``, in float64, for covariances of any rank.

    Args:
        mean1: ``[D]``.
        covariance1: ``[D, D]``.
        mean2: ``[D]``.
        covariance2: ``[D, D]``.

    Raises:
        ValueError: A value is not finite, shapes do not fit, or a matrix is no covariance.
    """
    return sum(
        frechet_terms(
            np.asarray(mean1, dtype=np.float64),
            factor_of_covariance(covariance1),
            np.asarray(mean2, dtype=np.float64),
            factor_of_covariance(covariance2),
        )
    )


def frechet_terms(
    mean1: np.ndarray, factor1: np.ndarray, mean2: np.ndarray, factor2: np.ndarray
) -> tuple[float, float]:
    """Return the mean term and the covariance term, whose sum is the distance.

    With covariances ``F1' F1`` and ``F2' F2``, the trace of the root of their product is the nuclear
    norm of ``F1 F2'``, which needs no matrix root and is exact for any rank.

    Args:
        mean1: float64 ``[D]``.
        factor1: float64 ``[R1, D]``, see :func:`factor_of_features`.
        mean2: float64 ``[D]``.
        factor2: float64 ``[R2, D]``.
    """
    if mean1.shape != mean2.shape:
        raise ValueError(f"the two means have different shapes: {mean1.shape} and {mean2.shape}")
    for name, mean in (("first", mean1), ("second", mean2)):
        if not np.isfinite(mean).all():
            raise ValueError(f"the {name} mean holds values that are not finite")
    difference = mean1 - mean2
    traces = np.vdot(factor1, factor1) + np.vdot(factor2, factor2)
    # Never negative but for the last digits of a float64.
    covariance_term = max(float(traces - 2 * _nuclear_norm(factor1 @ factor2.T)), 0.0)
    return float(difference @ difference), covariance_term


def factor_of_features(features: np.ndarray) -> np.ndarray:
    """Return F with ``F' F`` the covariance (ddof 1) of features: float64, both ``[N, D]``.

    Raises:
        ValueError: There are fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least two images, got {len(features)}")
    features = np.asarray(features, dtype=np.float64)
    factor: np.ndarray = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return factor


def check_covariance(covariance: np.ndarray) -> None:
    """Check what is quickly checked of a covariance ``[D, D]``.

    Raises:
        ValueError: It is not square, not finite or not symmetric.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"a covariance must be a square matrix, got shape {covariance.shape}")
    if not np.isfinite(covariance).all():
        raise ValueError("the covariance holds values that are not finite")
    largest = np.abs(covariance).max(initial=0.0)
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-5 * largest:
        raise ValueError("the covariance is not symmetric")


def factor_of_covariance(covariance: np.ndarray) -> np.ndarray:
    """Return F, float64 ``[R, D]`` with R the numerical rank, with ``F' F`` the covariance ``[D, D]``.

    Raises:
        ValueError: It is not square, not finite, not symmetric or has a negative eigenvalue.
    """
    covariance = np.asarray(covariance, dtype=np.float64)
    check_covariance(covariance)
    try:
        lower = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:  # singular, as far as float64 can tell
        pass
    else:
        pivots = np.diagonal(lower) ** 2
        if pivots.min() > 1e-10 * pivots.max():
            return np.ascontiguousarray(lower.T)
    values, vectors = np.linalg.eigh(covariance)
    # Eigenvalues that differ from 0 by rounding only; their roots would not be small.
    noise = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    # A file may hold a covariance that was rounded to float32, which moves eigenvalues by 1e-7.
    if values[0] < -1e-4 * np.abs(values).max():
        raise ValueError(
            f"the covariance has a negative eigenvalue, {values[0]:.3g}; its largest is {values[-1]:.3g}"
        )
    kept = values > noise
    factor: np.ndarray = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    return factor


def _nuclear_norm(matrix: np.ndarray) -> float:
    """Return the sum of the singular values, by the symmetric product where that is accurate."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    if 0 in matrix.shape:
        return 0.0
    squares = np.linalg.eigvalsh(matrix @ matrix.T)
    if squares[0] > _WELL_CONDITIONED * squares[-1]:
        return float(np.sqrt(squares).sum())
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def kernel_distance(
    features1: np.ndarray,
    features2: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 2020,
) -> tuple[float, float]:
    """Return KID and its standard deviation over random subsets.

    The unbiased squared MMD with the kernel ``(x.y / D + 1)^3``, as torch-fidelity computes it and with
    its subsets for the same seed. It may be slightly negative for equal distributions.

    Args:
        features1: ``[N1, D]``, torch-fidelity's `input1`.
        features2: ``[N2, D]``, torch-fidelity's `input2`.
        subsets: How many subsets are drawn of each side.
        subset_size: Images in each; by default 1,000 as in torch-fidelity, and half of the smaller side
            where that has fewer images, for which torch-fidelity asks for a number.
        seed: Seed of the subsets.

    Raises:
        ValueError: A subset would be larger than a side, or smaller than two.
    """
    smaller = min(len(features1), len(features2))
    size = subset_size
    if size is None:
        size = 1000 if smaller >= 1000 else smaller // 2
    if not 2 <= size <= smaller:
        raise ValueError(
            f"KID subsets must have at least 2 images and at most {smaller}, as many as the smaller "
            f"side; got {size}"
        )
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = np.asarray(features1[generator.choice(len(features1), size, replace=False)], np.float64)
        y = np.asarray(features2[generator.choice(len(features2), size, replace=False)], np.float64)
        within = (_kernel_sum(x, x, diagonal=False) + _kernel_sum(y, y, diagonal=False)) / (size - 1)
        values.append((within - 2 * _kernel_sum(x, y) / size) / size)
    return float(np.mean(values)), float(np.std(values))


def _kernel_sum(x: np.ndarray, y: np.ndarray, *, diagonal: bool = True) -> float:
    kernel = (x @ y.T / x.shape[1] + 1) ** 3
    return float(kernel.sum() - (0 if diagonal else np.trace(kernel)))


def gaussian_mmd(features1: np.ndarray, features2: np.ndarray, *, sigma: float = 10.0) -> float:
    """Return the squared maximum mean discrepancy with the kernel ``exp(-|x - y|^2 / (2 sigma^2))``.

    It is the biased estimator, of minimum variance, as the authors of CMMD compute it: means over all
    pairs, those of an image with itself included. At least 0, and 0 for equal sets.

    Args:
        features1: ``[N1, D]``.
        features2: ``[N2, D]``.
        sigma: Bandwidth of the kernel.

    Raises:
        ValueError: A side is empty, or the sides differ in width.
    """
    shapes = features1.shape, features2.shape
    if 0 in shapes[0] + shapes[1] or len(shapes[0]) != 2 or shapes[0][1:] != shapes[1][1:]:
        raise ValueError(f"features must be [N1, D] and [N2, D], got {shapes[0]} and {shapes[1]}")

    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        total = sum(np.exp(squares / (-2 * sigma**2)).sum() for _, _, squares in _blocks(x, y))
        return float(total) / (len(x) * len(y))

    within = mean_kernel(features1, features1) + mean_kernel(features2, features2)
    return max(within - 2 * mean_kernel(features1, features2), 0.0)


def precision_recall_density_coverage(
    reference: np.ndarray, generated: np.ndarray, *, nearest: int = FEWEST_FOR_PRDC - 1
) -> dict[str, float]:
    """Return ``"precision"``, ``"recall"``, ``"density"`` and ``"coverage"``.

    The ball of an image reaches to its `nearest`-th neighbour on its own side. Precision is the share of
    generated images in any reference ball, recall the share of reference images in any generated
    ball, density how many reference balls hold a generated image (over `nearest`), coverage the share
    of reference balls that hold a generated image.

    An image at the very edge of a ball, as an equal set has them, is inside for precision and recall
    (Kynkäänniemi et al.; torch-fidelity) and outside for density and coverage (Naeem et al.'s ``prdc``),
    as the authors have it.

    Args:
        reference: Features ``[N1, D]``.
        generated: Features ``[N2, D]``.
        nearest: Which neighbour; 5 as in the paper on density and coverage.

    Raises:
        ValueError: A side has not more than `nearest` images.
    """
    if min(len(reference), len(generated)) <= nearest:
        raise ValueError(
            f"precision and recall need more than {nearest} images on each side, got "
            f"{len(reference)} and {len(generated)}"
        )
    reference_radii = _squared_radii(reference, nearest)[:, None]
    generated_radii = _squared_radii(generated, nearest)
    tie = _TIE * max(_largest_square(reference), _largest_square(generated))
    precise = np.zeros(len(generated), dtype=bool)
    recalled, covered = np.zeros((2, len(reference)), dtype=bool)
    held = 0
    for rows, columns, distances in _blocks(reference, generated):
        precise[columns] |= (distances <= reference_radii[rows] + tie).any(axis=0)
        recalled[rows] |= (distances <= generated_radii[columns] + tie).any(axis=1)
        inside = distances < reference_radii[rows] - tie
        covered[rows] |= inside.any(axis=1)
        held += int(inside.sum())
    return {
        "precision": float(precise.mean()),
        "recall": float(recalled.mean()),
        "density": held / nearest / len(generated),
        "coverage": float(covered.mean()),
    }


def _squared_radii(features: np.ndarray, nearest: int) -> np.ndarray:
    """Return the squared distance of each to its `nearest`-th neighbour, ``[N]``."""
    radii = np.empty(len(features))
    for rows, columns, distances in _blocks(features, features):
        if columns.start == 0:
            smallest = np.empty((len(distances), 0))  # of this row of blocks, itself included
        if rows == columns:
            np.fill_diagonal(distances, 0)  # to itself, without rounding
        candidates = np.concatenate([smallest, distances], axis=1)
        kept = min(nearest, candidates.shape[1] - 1)
        smallest = np.partition(candidates, kept, axis=1)[:, : kept + 1]
        radii[rows] = smallest.max(axis=1)
    return radii


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield rows of x, rows of y and the squared distances between them, float64."""
    for row in range(0, len(x), _CHUNK):
        rows = slice(row, min(row + _CHUNK, len(x)))
        some_x = x[rows].astype(np.float64)
        for column in range(0, len(y), _CHUNK):
            columns = slice(column, min(column + _CHUNK, len(y)))
            yield rows, columns, _squared_distances(some_x, y[columns].astype(np.float64))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    distances: np.ndarray = x @ y.T
    distances *= -2
    distances += (x * x).sum(axis=1)[:, None]
    distances += (y * y).sum(axis=1)
    np.maximum(distances, 0, out=distances)
    return distances


def _largest_square(features: np.ndarray) -> float:
    return float(np.einsum("nd,nd->n", features, features, dtype=np.float64).max())
