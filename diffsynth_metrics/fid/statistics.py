"""Mean and covariance of features: accumulated in bounded memory, merged exactly, kept in files."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Self

from diffsynth_metrics.fid.distances import (
    check_covariance,
    factor_of_covariance,
    factor_of_features,
    frechet_terms,
)
from diffsynth_metrics.fid.features import FeatureSet

__all__ = [
    "FIDStatistics",
    "compare_statistics",
    "differences_of_making",
    "differences_of_networks",
    "fid_infinity",
]

FEWEST_FOR_INFINITY = 20
"""The fewest images for :func:`fid_infinity`: two in a tenth of them."""

# Folding many rows at once is faster; once there is a matrix, few are left for every reader to add.
_ROWS_KEPT = 256
_ROWS_AT_ONCE = 1024
_TEXTS = ("preprocessing", "weights", "dtype", "extractor")
_KEYS = ("mu", "sigma", "count", "skipped", *_TEXTS)
# What made the features of files that do not say it, such as pytorch-fid's.
_INCEPTION = "inception"


class FIDStatistics:
    """Count, mean and covariance of the features of a set of images, in float64.

    Fewer images than a feature has dimensions are kept as they are, which makes distances exact and
    fast; more are folded into one matrix, so memory does not grow. Shards from several processes or
    machines merge to what one process would have found, and the order of arrival does not matter.

    It is used like the tuple of ``diffsynth.metrics``: ``mean, covariance = statistics``, and
    ``statistics[0]`` is the mean.

    Example:
        >>> total = FIDStatistics.load("shard_0.npz").merge(FIDStatistics.load("shard_1.npz"))
        >>> total.save("all.npz")

    Attributes:
        preprocessing: Name of the preprocessing of the images, or None where it is not known.
        weights: sha256 of the weight file that made the features, or None where it is not known.
        dtype: Dtype of the network that made them, such as ``"float32"``, or None where it is not known.
        extractor: Name of the network that made them: ``"inception"`` is FID's.
        skipped: How many images could not be read and are not counted.
    """

    def __init__(
        self,
        *,
        preprocessing: str | None = None,
        weights: str | None = None,
        dtype: str | None = None,
        extractor: str = _INCEPTION,
        skipped: int = 0,
    ) -> None:
        """Start without images."""
        self.preprocessing = preprocessing
        self.weights = weights
        self.dtype = dtype
        self.extractor = extractor
        self.skipped = skipped
        self._rows: list[np.ndarray] = []  # not folded yet, [n, D] each, together less than D
        self._folded: int | None = 0  # how many images the two below stand for; None: not known
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))  # sum of the outer products of centred features

    @classmethod
    def from_moments(
        cls,
        mean: np.ndarray,
        covariance: np.ndarray,
        count: int | None = None,
        *,
        preprocessing: str | None = None,
        weights: str | None = None,
        dtype: str | None = None,
        extractor: str = _INCEPTION,
        skipped: int = 0,
    ) -> Self:
        """Make statistics of a mean ``[D]`` and a covariance ``[D, D]`` (ddof 1).

        Without `count` they can be compared, and not be merged or updated. With a count of 0 or 1, which
        has no covariance, they can be merged, and the values of the matrix are not looked at.

        Raises:
            ValueError: Shapes do not fit, values are not finite, or the matrix is not symmetric.
        """
        mean, covariance = np.asarray(mean), np.asarray(covariance)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean and covariance must be [D] and [D, D], got {mean.shape} and {covariance.shape}"
            )
        count = None if count is None else operator.index(count)  # NumPy's own integers overflow
        if count is not None and count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        if count in (0, 1):
            covariance = np.zeros(covariance.shape)
        if not np.isfinite(mean).all():
            raise ValueError("the mean holds values that are not finite")
        check_covariance(covariance)
        statistics = cls(
            preprocessing=preprocessing,
            weights=weights,
            dtype=dtype,
            extractor=extractor,
            skipped=skipped,
        )
        statistics._folded = count
        statistics._mean = mean.astype(np.float64)
        statistics._scatter = covariance.astype(np.float64) * (1 if count is None else count - 1)
        return statistics

    @property
    def count(self) -> int | None:
        """How many images were counted, or None for a file that does not say."""
        return None if self._folded is None else self._folded + sum(map(len, self._rows))

    @property
    def dimensions(self) -> int:
        """How many features an image has; 0 before the first image."""
        return self._rows[0].shape[1] if self._rows else len(self._mean)

    @property
    def mean(self) -> np.ndarray:
        """Mean of the features, float64 ``[D]``; a copy."""
        return np.array(self._moments()[1])

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of the features (ddof 1), float64 ``[D, D]``; a copy.

        Raises:
            ValueError: There are fewer than two images.
        """
        count, _, scatter = self._moments()
        if count is None:
            return np.array(scatter)
        self._need_two()
        covariance: np.ndarray = scatter / (count - 1)
        return covariance

    @property
    def features(self) -> np.ndarray | None:
        """The features themselves ``[N, D]``, where they are few enough to be kept, or None."""
        return np.concatenate(self._rows) if self._rows and self._folded == 0 else None

    def update(self, features: np.ndarray) -> Self:
        """Count more images.

        Args:
            features: ``[N, D]``, any floating dtype; N may be 0, as in a shard without images.

        Raises:
            ValueError: The shape does not fit, or a value is not finite.
        """
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f"features must be [N, D], got shape {features.shape}")
        if not np.isfinite(features).all():
            row = int(np.argmin(np.isfinite(features).all(axis=1)))
            raise ValueError(f"the features of image {row} of {len(features)} are not finite")
        self._need_count()
        self._need_dimensions(features.shape[1])
        dimensions = features.shape[1]
        for start in range(0, len(features), dimensions):
            self._rows.append(features[start : start + dimensions].astype(np.float64))
            kept = min(_ROWS_KEPT, dimensions) if self._folded else dimensions
            if sum(map(len, self._rows)) > kept:
                self._folded, self._mean, self._scatter = self._moments()
                self._rows = []
        return self

    def merge(self, other: FIDStatistics) -> Self:
        """Count the images of other statistics as well, exactly, and return these.

        Raises:
            ValueError: One side does not know its count, or they were prepared differently.
        """
        for name in _TEXTS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs and self.count != 0 and other.count != 0:
                raise ValueError(f"statistics with {name} {mine!r} and {theirs!r} cannot be merged")
        self._need_count()
        other._need_count()
        if self.count == 0:
            self.preprocessing, self.weights = other.preprocessing, other.weights
            self.dtype, self.extractor = other.dtype, other.extractor
        if other._folded:
            self._need_dimensions(len(other._mean))
            moments = (self._folded, self._mean, self._scatter)
            theirs = (other._folded, other._mean, other._scatter)
            self._folded, self._mean, self._scatter = _add(moments, theirs)
        for rows in list(other._rows):
            self.update(rows)
        self.skipped += other.skipped
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file that pytorch-fid reads too (``mu`` and ``sigma``).

        The further keys are ``count``, ``preprocessing``, ``weights``, ``dtype``, ``skipped``, and
        ``extractor`` where it is not FID's. A
        shard of one image or none is saved to be merged; its ``sigma`` is NaN, like `numpy.cov`'s.

        Raises:
            ValueError: The name does not end in ``.npz``.
        """
        path = Path(path).expanduser()
        if path.suffix != ".npz":
            raise ValueError(f"statistics are saved to a name that ends in .npz, got {str(path)!r}")
        mean = self.mean
        enough = self.count is None or self.count >= 2
        values = {
            "mu": mean,
            "sigma": self.covariance if enough else np.full((len(mean), len(mean)), np.nan),
            "count": self.count,
            "preprocessing": self.preprocessing,
            "weights": self.weights,
            "dtype": self.dtype,
            "extractor": None if self.extractor == _INCEPTION else self.extractor,
            "skipped": self.skipped,
        }
        known: Any = {name: value for name, value in values.items() if value is not None}
        np.savez(path, **known)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, preprocessing: str | None = None) -> Self:
        """Read an ``.npz`` file with ``mu`` and ``sigma``, of this or another package.

        Args:
            path: The file.
            preprocessing: How its images were prepared, where the file does not say; pytorch-fid's
                own files were prepared as ``"pytorch-fid"``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not an ``.npz`` file, or has no ``mu`` or ``sigma``, or its
                preprocessing is another one.
        """
        path = Path(path).expanduser()
        try:
            with np.load(path, allow_pickle=False) as file:
                # No others: they may be large, such as ADM's images, or objects that are not loaded.
                names = sorted(file.files)
                arrays = {name: file[name] for name in _KEYS if name in names}
        except FileNotFoundError:
            raise
        except Exception as error:  # np.load raises whatever zip, zlib and pickle raise
            raise ValueError(f"{path} is not a readable .npz file: {error}") from error
        if missing := {"mu", "sigma"} - arrays.keys():
            message = f"{path} has no {' and no '.join(sorted(missing))}, only {', '.join(names)}"
            if "arr_0" in names:  # as ADM and numpy.savez call an array without a name
                message += (
                    ". If arr_0 holds the images, uint8 [N, H, W, 3], pass them instead of the file: "
                    f"numpy.load({str(path)!r})['arr_0']"
                )
            raise ValueError(message)
        texts = {name: str(arrays[name]) for name in _TEXTS if name in arrays}
        said = texts.pop("preprocessing", None)
        if said and preprocessing and said != preprocessing:
            raise ValueError(f"{path} was prepared as {said!r}, not {preprocessing!r}")
        try:
            return cls.from_moments(
                arrays["mu"],
                arrays["sigma"],
                int(arrays["count"]) if "count" in arrays else None,
                preprocessing=said or preprocessing,
                skipped=int(arrays["skipped"]) if "skipped" in arrays else 0,
                **texts,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no statistics: {error}") from error

    def mean_and_factor(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean ``[D]`` and F ``[R, D]`` with ``F' F`` the covariance, both float64.

        Raises:
            ValueError: There are fewer than two images.
        """
        self._need_two()
        features = self.features
        if features is not None:
            return features.mean(axis=0), factor_of_features(features)
        count, mean, scatter = self._moments()
        return np.array(mean), factor_of_covariance(scatter / (1 if count is None else count - 1))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the mean and the covariance."""
        return iter((self.mean, self.covariance))

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the mean (0) or the covariance (1)."""
        return (self.mean, self.covariance)[index]

    def __len__(self) -> int:
        """Return 2, for mean and covariance; see ``count`` for the number of images."""
        return 2

    def __repr__(self) -> str:
        """Show what is known, not the arrays."""
        known = f"count={self.count}, preprocessing={self.preprocessing!r}"
        known += f", weights={self.weights[:12]!r}" if self.weights else ""
        known += f", dtype={self.dtype!r}" if self.dtype else ""
        known += f", extractor={self.extractor!r}" if self.extractor != _INCEPTION else ""
        known += f", skipped={self.skipped}" if self.skipped else ""
        return f"FIDStatistics({known})"

    def _moments(self) -> tuple[int | None, np.ndarray, np.ndarray]:
        """Return count, mean and scatter of everything."""
        moments = (self._folded, self._mean, self._scatter)
        if not self._rows:
            return moments
        rows = np.concatenate(self._rows)
        mean = rows.mean(axis=0)
        centred = rows - mean
        return _add(moments, (len(rows), mean, centred.T @ centred))

    def _need_two(self) -> None:
        if self.count is not None and self.count < 2:
            raise ValueError(f"FID needs at least two images on each side, got {self.count}")

    def _need_count(self) -> None:
        if self.count is None:
            raise ValueError(
                "these statistics do not know how many images they stand for, so that nothing can be "
                "added to them; FIDStatistics.from_moments takes count=..."
            )

    def _need_dimensions(self, dimensions: int) -> None:
        if self.count and self.dimensions != dimensions:
            raise ValueError(f"features have {dimensions} dimensions here and {self.dimensions} there")


_Moments = tuple[int | None, np.ndarray, np.ndarray]


def _add(first: _Moments, second: _Moments) -> _Moments:
    """Join two sets of count, mean and scatter (Chan, Golub and LeVeque 1979)."""
    count1, mean1, scatter1 = first
    count2, mean2, scatter2 = second
    if not count1:
        return second
    assert count2 is not None
    count = count1 + count2
    shift = mean2 - mean1
    return (
        count,
        mean1 + shift * (count2 / count),
        scatter1 + scatter2 + np.outer(shift, shift) * (count1 * count2 / count),
    )


def compare_statistics(reference: FIDStatistics, generated: FIDStatistics) -> tuple[float, float]:
    """Return the mean term and the covariance term of FID.

    Raises:
        ValueError: A side has fewer than two images, or their features are of different networks.
    """
    if reference.extractor != generated.extractor:
        raise ValueError(
            f"the reference has features of {reference.extractor!r}, and the generated side of "
            f"{generated.extractor!r}: their distance means nothing"
        )
    return frechet_terms(*reference.mean_and_factor(), *generated.mean_and_factor())


def differences_of_making(
    reference: FIDStatistics, generated: FIDStatistics, name: str = "FID"
) -> list[str]:
    """Say in sentences in what the sides were made differently, apart from their images.

    Args:
        reference: One side.
        generated: The other side.
        name: How the sentences call the distance.
    """
    differences = []
    sides = (reference.preprocessing, generated.preprocessing)
    if None in sides and sides != (None, None):
        differences.append(
            f"one side was prepared as {sides[0] or sides[1]!r} and the other does not say how; if it "
            f"was another preprocessing this {name} means nothing. Tell it by "
            "FIDStatistics.load(path, preprocessing=...)"
        )
    elif sides[0] != sides[1]:
        differences.append(
            f"the reference was prepared as {sides[0]!r} and the generated images as {sides[1]!r}: this "
            f"{name} compares resizing methods as well as images"
        )
    return differences + differences_of_networks(reference, generated, name)


def differences_of_networks(
    reference: FIDStatistics | FeatureSet, generated: FIDStatistics | FeatureSet, name: str = "FID"
) -> list[str]:
    """Say in sentences in what the networks differed that made the features of the sides.

    Args:
        reference: One side.
        generated: The other side.
        name: How the sentences call the distance.
    """
    differences = []
    if reference.weights and generated.weights and reference.weights != generated.weights:
        differences.append(
            "the two sides' features were made with different weights "
            f"({reference.weights[:12]} and {generated.weights[:12]}): this {name} means nothing"
        )
    if reference.dtype and generated.dtype and reference.dtype != generated.dtype:
        differences.append(
            f"the two sides' features were made by networks in {reference.dtype} and {generated.dtype}: "
            f"the difference in rounding adds to this {name}"
        )
    return differences


def fid_infinity(
    reference: FIDStatistics, features: np.ndarray, *, seed: int = 0, points: int = 15
) -> float:
    """Extrapolate FID to infinitely many generated images (Chong and Forsyth 2020, arXiv:1911.07023).

    FID's bias falls as 1/N: it is computed for random subsets of growing size, and the line through
    these values over 1/N is read at 0. The bias of a finite reference set remains.

    Args:
        reference: Statistics of the reference images.
        features: Features of the generated images, ``[N, D]``.
        seed: Seed of the subsets.
        points: Number of subsets. The largest has all images, the smallest a tenth of them or D (half
            of them at most), because the line is straight only beyond that.

    Raises:
        ValueError: There are fewer than 20 generated images.
    """
    count, dimensions = features.shape
    if count < FEWEST_FOR_INFINITY:
        raise ValueError(
            f"FID_infinity needs at least {FEWEST_FOR_INFINITY} generated images, got {count}"
        )
    generator = np.random.default_rng(seed)
    reference_side = reference.mean_and_factor()
    sizes = np.linspace(max(count // 10, min(count // 2, dimensions)), count, points).astype(int)
    values = []
    for size in sizes:
        chosen = generator.choice(count, size, replace=False)
        subset = FIDStatistics()
        for part in np.array_split(chosen, math.ceil(size / _ROWS_AT_ONCE)):
            subset.update(features[part])
        values.append(sum(frechet_terms(*reference_side, *subset.mean_and_factor())))
    slope_and_intercept = np.polyfit(1 / sizes, values, 1)
    return float(slope_and_intercept[1])
