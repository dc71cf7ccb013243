"""The Fréchet distance between the features of two sets of images: FID with any network."""

from __future__ import annotations

import logging
import os
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from diffsynth_metrics.fid.distances import (
    FEWEST_FOR_KID,
    FEWEST_FOR_PRDC,
    kernel_distance,
    precision_recall_density_coverage,
)
from diffsynth_metrics.fid.metric import FeatureMetric, ReadOptions, check_count, counts_of
from diffsynth_metrics.fid.sources import ImageReader, ImageSource
from diffsynth_metrics.fid.statistics import (
    FEWEST_FOR_INFINITY,
    FIDStatistics,
    compare_statistics,
    differences_of_making,
    fid_infinity,
)
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["FIDSource", "FrechetMetric"]

FIDSource: TypeAlias = "ImageSource | FIDStatistics"
"""A folder, images, an iterable of images or batches, statistics, or an ``.npz`` file of statistics."""

logger = logging.getLogger(__name__)


class FrechetMetric(FeatureMetric):
    """The Fréchet distance between normal distributions of the features of two sets: lower is better."""

    statistics_type = FIDStatistics

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """Number of features that the network makes of an image."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model_config: ModelConfig | None = None,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        vram_limit: None = None,
        *,
        preprocessing: str | None = None,
        torch_dtype: torch.dtype | None = None,
        processor_config: ModelConfig | None = None,
    ) -> Self:
        """Load the metric; the order of the positional arguments is that of ``diffsynth.metrics``.

        Args:
            model_config: Where the weights are; the published ones by default.
            device: Any torch device; the best that torch reports by default.
            batch_size: The largest number of images in the network at once. It bounds memory and does
                not change scores. None chooses: 4 on a CPU, 16 elsewhere.
            num_workers: Threads that decode and resize images ahead of the network; as many as there
                are cores, and at most 8, by default. 0 works in the caller's thread.
            vram_limit: Accepted if it is None, the default of ``diffsynth.metrics``.
            preprocessing: One of the metric's; see the class.
            torch_dtype: Dtype of the network; float32 by default, as everybody computes it. Statistics
                are float64 in any case.
            processor_config: Accepted as in the other metrics and not needed.

        Raises:
            CheckpointError: The files do not hold this metric's weights.
            DownloadError: The files could not be had.
            TypeError: `torch_dtype` is no floating dtype, or a config no ModelConfig.
            ValueError: There is no such preprocessing, or a number is out of range.
            RuntimeError: torch does not know the device, or it is not there.
        """
        options: dict[str, Any] = {} if preprocessing is None else {"preprocessing": preprocessing}
        return super().from_pretrained(
            model_config,
            processor_config,
            torch_dtype,
            device,
            batch_size=batch_size,
            num_workers=num_workers,
            vram_limit=vram_limit,
            **options,
        )

    def compute(  # type: ignore[override]
        self,
        reference_images: FIDSource,
        generated_images: FIDSource,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **options: Unpack[ReadOptions],
    ) -> float:
        """Compute the distance between two sets of images.

        What belongs to the number (preprocessing, how many images, how many were skipped) is in
        :meth:`evaluate`, and goes to the log at level INFO.

        Args:
            reference_images: Real images: a folder (read recursively), images as every metric takes
                them, an iterable of images or batches such as a DataLoader (never held in memory),
                :class:`FIDStatistics`, or an ``.npz`` file with ``mu`` and ``sigma``.
            generated_images: The images to judge, in the same forms.
            batch_size: Another one than the metric's, for this call.
            num_workers: Another number than the metric's, for this call.
            **options: See :class:`ReadOptions`.

        Returns:
            The distance, at least 0.

        Raises:
            TypeError: An argument is no source of images, or there is no such option.
            ValueError: A side is one file, has fewer than two images or features that are not finite;
                or statistics have another number of features, or were prepared otherwise than
                `preprocessing` says.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.

        Warns:
            UserWarning: A side has fewer than 2,048 images, or the sides were prepared differently.
        """
        sources = {"reference": reference_images, "generated": generated_images}
        return float(self._compare(sources, {}, batch_size, num_workers, options)[0]["score"])

    def evaluate(  # type: ignore[override]
        self,
        reference_images: FIDSource,
        generated_images: FIDSource,
        batch_size: int | None = None,
        num_workers: int | None = None,
        *,
        infinity: bool = False,
        kid: bool = False,
        prdc: bool = False,
        seed: int = 2020,
        **options: Unpack[ReadOptions],
    ) -> dict[str, Any]:
        """Compute the same as :meth:`compute`, with its parts and with what else the features say.

        The images are read once. The three further measures need the features of both sides at the end
        (``infinity``: of the generated images), 8 kB per image and twice that while they are joined, and
        some 220 MB for any number of images.

        Args:
            reference_images: See :meth:`compute`.
            generated_images: See :meth:`compute`.
            batch_size: See :meth:`compute`.
            num_workers: See :meth:`compute`.
            infinity: Add ``"fid_infinity"``, the extrapolation to infinitely many generated images.
            kid: Add ``"kid"`` and ``"kid_std"``, which are unbiased for few images.
            prdc: Add ``"precision"``, ``"recall"``, ``"density"`` and ``"coverage"``.
            seed: Seed of the subsets of `infinity` and `kid`.
            **options: See :class:`ReadOptions`.

        Returns:
            A dict of ``"score"``, its ``"mean_term"`` and ``"covariance_term"``,
            ``"reference_count"``, ``"generated_count"``, ``"reference_skipped"``,
            ``"generated_skipped"``, ``"preprocessing"``, ``"weights"`` and what was asked for. A count
            is None for statistics of a file that does not say it.

        Raises:
            TypeError: See :meth:`compute`.
            ValueError: See :meth:`compute`; or features are needed of a side that has statistics only,
                or that has too few images: KID takes 4, `prdc` 6 and `infinity` 20.
            ImageError: See :meth:`compute`.
            FileNotFoundError: See :meth:`compute`.
        """
        both = {
            **({"KID": FEWEST_FOR_KID} if kid else {}),
            **({"precision and recall": FEWEST_FOR_PRDC} if prdc else {}),
        }
        result, reference, real, fake = self._compare(
            {"reference": reference_images, "generated": generated_images},
            {
                "reference": both,
                "generated": {**both, **({"FID_infinity": FEWEST_FOR_INFINITY} if infinity else {})},
            },
            batch_size,
            num_workers,
            options,
        )
        if infinity:
            result["fid_infinity"] = fid_infinity(reference, fake, seed=seed)
        if kid:
            result["kid"], result["kid_std"] = kernel_distance(real, fake, seed=seed)
        if prdc:
            result |= precision_recall_density_coverage(real, fake)
        return result

    def statistics(
        self,
        images: FIDSource,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **options: Unpack[ReadOptions],
    ) -> FIDStatistics:
        """Compute the statistics of one set of images, to keep, to merge or to compare with later.

        See :meth:`compute` for the arguments and errors; statistics come back as they are.

        Returns:
            Count, mean and covariance, which unpack as ``mean, covariance``.
        """
        side = self.open_side("", images, batch_size, num_workers, **options)
        return self._extract("", side)[0]

    def encode_image(self, images: ImageSource, *, progress: bool = False) -> Tensor:
        """Compute the features that everything here is made of.

        Returns:
            float32 ``[N, D]`` on the CPU; of Inception 2,048 of at least 0.

        Raises:
            TypeError: It is no source of images.
            ValueError: It is statistics, which do not hold features.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.
        """
        if isinstance(images, (str, os.PathLike)) and not os.path.isdir(os.path.expanduser(images)):
            images = [images]  # one image is enough here
        features = self._extract("", self.open_side("", images, progress=progress), keep=True)[1]
        if len(features) == 0:
            raise ValueError("statistics do not hold features; pass the images")
        return torch.from_numpy(features.astype(np.float32, copy=False))

    def _compare(
        self,
        images: Mapping[str, FIDSource],
        measures: Mapping[str, Mapping[str, int]],
        batch_size: int | None,
        num_workers: int | None,
        options: ReadOptions,
    ) -> tuple[dict[str, Any], FIDStatistics, np.ndarray, np.ndarray]:
        """Compare two sides, called ``"reference"`` and ``"generated"``.

        Args:
            images: The source of each side.
            measures: What needs the features of a side, with the fewest images that it takes.
            batch_size: See :meth:`compute`.
            num_workers: See :meth:`compute`.
            options: See :meth:`compute`.

        Returns:
            The result, the statistics of the reference, and the features of both sides, which are empty
            where no measure needs them.
        """
        # Both sides are checked before the first goes through the network, which may take hours.
        sources = {
            side: self.open_side(side, source, batch_size, num_workers, **options)
            for side, source in images.items()
        }
        for side, source in sources.items():
            check_count(side, source, {self.label: 2, **measures.get(side, {})})
        self._check_dimensions(sources)
        (reference, real), (generated, fake) = (
            self._extract(side, source, keep=bool(measures.get(side)))
            for side, source in sources.items()
        )
        mean_term, covariance_term = compare_statistics(reference, generated)
        doubts = differences_of_making(reference, generated, self.label)
        doubts += _doubts_of_few(reference, generated, self.label, self.dimensions)
        for doubt in doubts:
            warnings.warn(doubt, UserWarning, stacklevel=3)
        result = {
            "score": mean_term + covariance_term,
            "mean_term": mean_term,
            "covariance_term": covariance_term,
            **counts_of(reference, generated),
        }
        logger.info(
            "%s %.4f, preprocessing %r: %s reference images (%d more skipped), %s generated images "
            "(%d more skipped)",
            self.label,
            result["score"],
            generated.preprocessing,
            _count(reference),
            reference.skipped,
            _count(generated),
            generated.skipped,
        )
        return result, reference, real, fake

    def _check_dimensions(self, sources: Mapping[str, FIDStatistics | ImageReader]) -> None:
        """Refuse statistics of another network before images go through this one."""
        dimensions = {
            side: source.dimensions if isinstance(source, FIDStatistics) else self.dimensions
            for side, source in sources.items()
        }
        if len(set(dimensions.values())) > 1:
            each = " and ".join(f"{number:,} on the {side} side" for side, number in dimensions.items())
            raise ValueError(
                f"the two sides have different numbers of features per image, {each}: statistics must "
                "have been made with the same network"
            )

    def _extract(
        self, side: str, source: FIDStatistics | ImageReader, *, keep: bool = False
    ) -> tuple[FIDStatistics, np.ndarray]:
        """Return the statistics of a side and, to keep, its features ``[N, D]``, otherwise none."""
        kept = [np.empty((0, self.dimensions), dtype=np.float32)]
        if isinstance(source, FIDStatistics):
            return source, kept[0] if source.features is None else source.features
        statistics = FIDStatistics(**self.made_by(source))
        for features in self.features_of(side, source):
            statistics.update(features)
            if keep:
                kept.append(features)
        statistics.skipped = source.skipped
        return statistics, np.concatenate(kept)


def _doubts_of_few(
    reference: FIDStatistics, generated: FIDStatistics, label: str, dimensions: int
) -> list[str]:
    """Say how large a distance of few images is where it should be 0: between halves of one side."""
    smaller = min(reference, generated, key=lambda side: np.inf if side.count is None else side.count)
    if smaller.count is None or smaller.count >= dimensions:
        return []
    example = ""
    if smaller.features is not None and smaller.count >= 4:
        shuffled = np.random.default_rng(0).permutation(smaller.features)
        halves = [FIDStatistics().update(half) for half in np.array_split(shuffled, 2)]
        example = (
            f" Two random halves of the smaller side, {halves[0].count:,} images each, are "
            f"{sum(compare_statistics(*halves)):.2f} apart, though nothing but chance tells them apart."
        )
    return [
        f"{label} of {_count(reference)} reference and {_count(generated)} generated images: "
        f"below {dimensions:,} the covariance is singular and {label} is strongly biased upwards."
        f"{example} Compare only with numbers of as many images, or use evaluate(kid=True) with at "
        f"least {FEWEST_FOR_KID} images, and not statistics, on each side."
    ]


def _count(statistics: FIDStatistics) -> str:
    return "an unknown number of" if statistics.count is None else f"{statistics.count:,}"
