"""The features of a set of images, for distances that mean and covariance are not enough for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Self

__all__ = ["FeatureSet"]

_TEXTS = ("extractor", "preprocessing", "weights", "dtype")


class FeatureSet:
    """Features of images, with what made them; sets of several processes merge.

    Example:
        >>> total = FeatureSet.load("shard_0.npz").merge(FeatureSet.load("shard_1.npz"))
        >>> total.save("all.npz")

    Attributes:
        features: float32 ``[N, D]``.
        extractor: Name of the network that made them.
        preprocessing: Name of the preprocessing of the images, or None where it is not known.
        weights: sha256 of the weight file, or None where it is not known.
        dtype: Dtype of the network, such as ``"float32"``, or None where it is not known.
        skipped: How many images could not be read and are not counted.
    """

    def __init__(
        self,
        features: np.ndarray,
        extractor: str,
        *,
        preprocessing: str | None = None,
        weights: str | None = None,
        dtype: str | None = None,
        skipped: int = 0,
    ) -> None:
        """Keep features.

        Raises:
            ValueError: They are not ``[N, D]``, or a value is not finite.
        """
        features = np.asarray(features, dtype=np.float32)
        if features.ndim != 2:
            raise ValueError(f"features must be [N, D], got shape {features.shape}")
        if not np.isfinite(features).all():
            row = int(np.argmin(np.isfinite(features).all(axis=1)))
            raise ValueError(f"the features of image {row} of {len(features)} are not finite")
        self.features = features
        self.extractor = extractor
        self.preprocessing = preprocessing
        self.weights = weights
        self.dtype = dtype
        self.skipped = skipped

    @property
    def count(self) -> int:
        """How many images were counted."""
        return len(self.features)

    def merge(self, other: FeatureSet) -> Self:
        """Count the images of another set as well, and return this one.

        Raises:
            ValueError: They were made differently.
        """
        for name in _TEXTS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"features with {name} {mine!r} and {theirs!r} cannot be merged")
        self.features = np.concatenate([self.features, other.features])
        self.skipped += other.skipped
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file with ``features`` and the other attributes.

        Raises:
            ValueError: The name does not end in ``.npz``.
        """
        path = Path(path).expanduser()
        if path.suffix != ".npz":
            raise ValueError(f"features are saved to a name that ends in .npz, got {str(path)!r}")
        texts = {name: getattr(self, name) for name in _TEXTS}
        known: Any = {name: value for name, value in texts.items() if value is not None}
        np.savez(path, features=self.features, skipped=self.skipped, **known)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not such a file.
        """
        path = Path(path).expanduser()
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
        except FileNotFoundError:
            raise
        except Exception as error:  # np.load raises whatever zip, zlib and pickle raise
            raise ValueError(f"{path} is not a readable .npz file: {error}") from error
        if missing := {"features", "extractor"} - values.keys():
            raise ValueError(
                f"{path} has no {' and no '.join(sorted(missing))}, only {', '.join(sorted(values))}"
            )
        texts: dict[str, Any] = {name: str(values[name]) for name in _TEXTS if name in values}
        return cls(values["features"], skipped=int(values.get("skipped", 0)), **texts)

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        """Show what is known, not the features."""
        known = f"count={self.count}, extractor={self.extractor!r}"
        return f"FeatureSet({known}, preprocessing={self.preprocessing!r}, skipped={self.skipped})"
