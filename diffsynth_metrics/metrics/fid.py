"""FID: how far the distribution of generated images is from that of reference images."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchvision.models.inception import Inception3
from typing_extensions import Self

from diffsynth_metrics.base import BaseMetric, MetricCard, check_batch_size, check_loading
from diffsynth_metrics.fid.distances import (
    FEWEST_FOR_INFINITY,
    FEWEST_FOR_KID,
    FEWEST_FOR_PRDC,
    factor_of_features,
    fid_infinity,
    frechet_terms,
    kernel_distance,
    precision_recall_density_coverage,
)
from diffsynth_metrics.fid.preprocessing import find_preprocessing
from diffsynth_metrics.fid.sources import ImageReader, ImageSource, OnError, choose_workers
from diffsynth_metrics.fid.statistics import FeatureRows, FIDStatistics, compare_statistics
from diffsynth_metrics.networks.inception import FEATURES, build_inception, optimize_inception
from diffsynth_metrics.weights.checkpoint import load_weights
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["FIDMetric", "FIDScore", "FIDSource"]

FIDSource: TypeAlias = "ImageSource | FIDStatistics"
"""A folder, images, an iterable of images or batches, statistics, or an ``.npz`` file of statistics."""

logger = logging.getLogger(__name__)


class FIDScore(float):
    """A FID: a float that prints with what it must be reported with.

    Attributes:
        preprocessing: Name of the preprocessing of the generated images.
        reference_count: Number of reference images, or None if their file does not say.
        generated_count: Number of generated images, or None if their file does not say.
        reference_skipped: Number of reference images that could not be read.
        generated_skipped: Number of generated images that could not be read.
    """

    preprocessing: str | None
    reference_count: int | None
    generated_count: int | None
    reference_skipped: int
    generated_skipped: int

    def __new__(cls, value: float, reference: FIDStatistics, generated: FIDStatistics) -> Self:
        """Label a value with the statistics that it comes from."""
        score = super().__new__(cls, value)
        score.preprocessing = generated.preprocessing
        score.reference_count, score.generated_count = reference.count, generated.count
        score.reference_skipped, score.generated_skipped = reference.skipped, generated.skipped
        return score

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        """Become a plain float in another process."""
        return float, (float(self),)

    def __str__(self) -> str:
        """Show the value with preprocessing, numbers of images and how many were skipped."""
        counts = _count(self.reference_count), _count(self.generated_count)
        skipped = self.reference_skipped, self.generated_skipped
        left_out = f", {skipped[0]:,} and {skipped[1]:,} more skipped" if any(skipped) else ""
        return (
            f"{float(self):.4f} (FID, preprocessing {self.preprocessing!r}, "
            f"{counts[0]} reference and {counts[1]} generated images{left_out})"
        )

    # A notebook shows this one.
    __repr__ = __str__


class FIDMetric(BaseMetric):
    """FID with the Inception of 2015-12-05: ``metric.compute(reference, generated)``; lower is better.

    The preprocessing has a name, and the name belongs to the number: see docs/fid.md for the table and
    for why the default is ``"clean"``. See ``FIDMetric.card``.
    """

    card = MetricCard(
        name="FID",
        inputs="two sets of images",
        range="0 for equal sets; about 2 to 60 on 10,000 images and more",
        higher_is_better=False,
        definition="|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) of Inception pool3 features",
        paper="https://arxiv.org/abs/1706.08500",
        repository="https://github.com/bioinf-jku/TTUR",
        code_license="Apache-2.0",
        weights_license="Apache-2.0 (TensorFlow's Inception of 2015-12-05)",
        notes=(
            "Compare numbers of the same preprocessing, reference set and number of images only; below "
            "2,048 images it is strongly biased upwards."
        ),
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="FID/model.safetensors"
    )
    model: Inception3

    def __init__(
        self,
        model: Inception3,
        *,
        batch_size: int,
        preprocessing: str = "clean",
        num_workers: int | None = None,
        weights: str | None = None,
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        super().__init__(model, batch_size=batch_size)
        self.preprocessing = find_preprocessing(preprocessing).name
        self.num_workers = num_workers
        self.weights = weights

    @classmethod
    def from_pretrained(
        cls,
        model_config: ModelConfig | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        *,
        processor_config: ModelConfig | None = None,
        torch_dtype: torch.dtype | None = None,
        preprocessing: str = "clean",
    ) -> Self:
        """Load the metric; the order of the positional arguments is that of ``diffsynth.metrics``.

        Args:
            model_config: Where the weights are; the published ones by default.
            device: Any torch device; the best that torch reports by default.
            batch_size: The largest number of images in the network at once. It bounds memory and does
                not change scores.
            num_workers: Threads that decode and resize images ahead of the network; as many as there
                are cores, and at most 8, by default. 0 works in the caller's thread.
            processor_config: Accepted as in the other metrics and not needed.
            torch_dtype: Dtype of the network; float32 by default, as everybody computes FID.
                Statistics are float64 in any case.
            preprocessing: ``"clean"``, ``"pytorch-fid"``, ``"torch-fidelity"``, ``"torchmetrics"`` or
                ``"diffsynth"``.

        Raises:
            CheckpointError: The files do not hold this metric's weights.
            DownloadError: The files could not be had.
            TypeError: `torch_dtype` is no floating dtype, or `device` no device.
            ValueError: There is no such preprocessing, or a number is out of range.
        """
        # Whatever is wrong with these is said before the files are fetched.
        find_preprocessing(preprocessing)
        choose_workers(num_workers)
        place, dtype = check_loading(
            model_config,
            processor_config,
            device=device,
            torch_dtype=torch_dtype,
            batch_size=batch_size,
        )
        files = cls._weights(model_config)
        model = build_inception()
        load_weights(
            model,
            files,
            metric=cls.__name__,
            device=place,
            dtype=torch.promote_types(dtype, torch.float32),
        )
        return cls(
            optimize_inception(model).to(dtype),
            batch_size=batch_size,
            preprocessing=preprocessing,
            num_workers=num_workers,
            weights=_sha256(files),
        )

    def compute(
        self,
        reference_images: FIDSource,
        generated_images: FIDSource,
        *,
        preprocessing: str | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> FIDScore:
        """Compute FID between two sets of images.

        Args:
            reference_images: Real images: a folder (read recursively), images as every metric takes
                them, an iterable of images or batches such as a DataLoader (never held in memory),
                :class:`FIDStatistics`, or an ``.npz`` file with ``mu`` and ``sigma``.
            generated_images: The images to judge, in the same forms.
            preprocessing: Another one than the metric's, for this call. Statistics keep their own.
            batch_size: Another one than the metric's, for this call.
            num_workers: Another number than the metric's, for this call.
            on_error: ``"raise"`` stops at an image that is absent, invalid or cannot be read and names
                it; ``"skip"`` leaves it out and counts it.
            progress: Show a progress bar on a terminal.

        Returns:
            A float of at least 0, which prints with the name of its preprocessing.

        Raises:
            TypeError: An argument is no source of images.
            ValueError: A side has fewer than two images or features that are not finite; or statistics
                were prepared otherwise than `preprocessing` says.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.

        Warns:
            UserWarning: A side has fewer than 2,048 images, or the sides were prepared differently.
        """
        (reference, _), (generated, _) = self._extract_both(
            reference_images,
            generated_images,
            preprocessing=preprocessing,
            batch_size=batch_size,
            num_workers=num_workers,
            on_error=on_error,
            progress=progress,
        )
        score = FIDScore(sum(compare_statistics(reference, generated)), reference, generated)
        _warn_of_few_images(reference, generated)
        logger.info("%s", score)
        return score

    def evaluate(
        self,
        reference_images: FIDSource,
        generated_images: FIDSource,
        *,
        infinity: bool = False,
        kid: bool = False,
        prdc: bool = False,
        seed: int = 2020,
        preprocessing: str | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> dict[str, Any]:
        """Compute FID like :meth:`compute`, with its parts and with what else the features say.

        The images are read once. The three further measures need the features of both sides at the end
        (``infinity``: of the generated images): 8 kB per image, and some 220 MB for any number of them.

        Args:
            reference_images: See :meth:`compute`.
            generated_images: See :meth:`compute`.
            infinity: Add ``"fid_infinity"``, the extrapolation to infinitely many generated images.
            kid: Add ``"kid"`` and ``"kid_std"``, which are unbiased for few images.
            prdc: Add ``"precision"``, ``"recall"``, ``"density"`` and ``"coverage"``.
            seed: Seed of the subsets of `infinity` and `kid`.
            preprocessing: See :meth:`compute`.
            batch_size: See :meth:`compute`.
            num_workers: See :meth:`compute`.
            on_error: See :meth:`compute`.
            progress: See :meth:`compute`.

        Returns:
            A dict of ``"score"``, its ``"mean_term"`` and ``"covariance_term"``,
            ``"reference_count"``, ``"generated_count"``, ``"reference_skipped"``,
            ``"generated_skipped"``, ``"preprocessing"``, ``"weights"`` and what was asked for.

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
        (reference, real), (generated, fake) = self._extract_both(
            reference_images,
            generated_images,
            reference_features=both,
            generated_features={**both, **({"FID_infinity": FEWEST_FOR_INFINITY} if infinity else {})},
            preprocessing=preprocessing,
            batch_size=batch_size,
            num_workers=num_workers,
            on_error=on_error,
            progress=progress,
        )
        mean_term, covariance_term = compare_statistics(reference, generated)
        _warn_of_few_images(reference, generated)
        result: dict[str, Any] = {
            "score": mean_term + covariance_term,
            "mean_term": mean_term,
            "covariance_term": covariance_term,
            "reference_count": reference.count,
            "generated_count": generated.count,
            "reference_skipped": reference.skipped,
            "generated_skipped": generated.skipped,
            "preprocessing": generated.preprocessing,
            "weights": generated.weights,
        }
        if infinity:
            assert fake is not None
            result["fid_infinity"] = fid_infinity(*reference.mean_and_factor(), fake, seed=seed)
        if kid:
            assert real is not None and fake is not None
            result["kid"], result["kid_std"] = kernel_distance(real, fake, seed=seed)
        if prdc:
            assert real is not None and fake is not None
            result |= precision_recall_density_coverage(real, fake)
        return result

    def statistics(
        self,
        images: FIDSource,
        *,
        preprocessing: str | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> FIDStatistics:
        """Compute the statistics of one set of images, to keep, to merge or to compare with later.

        See :meth:`compute` for the arguments; statistics come back as they are.

        Returns:
            Count, mean and covariance, which unpack as ``mean, covariance``.
        """
        source = self._open(
            images,
            preprocessing=preprocessing,
            batch_size=batch_size,
            num_workers=num_workers,
            on_error=on_error,
            progress=progress,
        )
        return self._extract(source)[0]

    def encode_image(self, images: ImageSource, *, progress: bool = False) -> Tensor:
        """Compute the pool3 features that everything here is made of.

        Returns:
            float32 ``[N, 2048]`` on the CPU, of at least 0.
        """
        _, features = self._extract(self._open(images, progress=progress), keep=True)
        if features is None:
            raise ValueError("statistics do not hold features; pass the images")
        return torch.from_numpy(features.astype(np.float32, copy=False))

    def __call__(self, reference_images: FIDSource, generated_images: FIDSource) -> FIDScore:
        """Do the same as :meth:`compute`."""
        return self.compute(reference_images, generated_images)

    def __repr__(self) -> str:
        """Show the class, where it runs and its preprocessing."""
        return f"{super().__repr__()[:-1]}, preprocessing={self.preprocessing!r})"

    def _extract_both(
        self,
        reference_images: FIDSource,
        generated_images: FIDSource,
        *,
        reference_features: Mapping[str, int] | None = None,
        generated_features: Mapping[str, int] | None = None,
        **options: Any,
    ) -> list[tuple[FIDStatistics, np.ndarray | None]]:
        """Do :meth:`_extract` with both sides, after both were checked: the first may take hours.

        What needs the features of a side is given with the fewest images that it takes.
        """
        sides = (
            ("reference", reference_images, reference_features or {}),
            ("generated", generated_images, generated_features or {}),
        )
        sources = [self._open(images, side=side, **options) for side, images, _ in sides]
        for source, (side, _, measures) in zip(sources, sides, strict=True):
            if measures and isinstance(source, FIDStatistics) and source.features is None:
                raise ValueError(
                    f"{', '.join(measures)} need the {side} images: statistics do not hold features"
                )
            count = source.count if isinstance(source, FIDStatistics) else source.total
            for measure, fewest in {"FID": 2, **measures}.items():
                if count is not None and count < fewest:
                    raise ValueError(f"{measure} needs at least {fewest} {side} images, got {count}")
        return [
            self._extract(source, side=side, keep=bool(measures))
            for source, (side, _, measures) in zip(sources, sides, strict=True)
        ]

    def _open(
        self,
        images: FIDSource,
        *,
        side: str = "",
        preprocessing: str | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> FIDStatistics | ImageReader:
        """Check a side and its options; nothing goes through the network yet."""
        prepare = find_preprocessing(self.preprocessing if preprocessing is None else preprocessing)
        batch_size = check_batch_size(self.batch_size if batch_size is None else batch_size)
        num_workers = choose_workers(self.num_workers if num_workers is None else num_workers)
        given = _given_statistics(images)
        if given is None:
            return ImageReader(
                images,
                prepare,
                batch_size=batch_size,
                num_workers=num_workers,
                on_error=on_error,
                progress=f"FID ({prepare.name}), {side or 'images'}" if progress else None,
            )
        if preprocessing is not None and given.preprocessing not in (None, preprocessing):
            raise ValueError(
                f"the {side or 'given'} statistics were prepared as {given.preprocessing!r}, which "
                f"preprocessing={preprocessing!r} contradicts"
            )
        return given

    def _extract(
        self, source: FIDStatistics | ImageReader, *, side: str = "", keep: bool = False
    ) -> tuple[FIDStatistics, np.ndarray | None]:
        """Return the statistics of a side, and its features ``[N, 2048]`` if they are to be kept."""
        if isinstance(source, FIDStatistics):
            return source, source.features if keep else None
        statistics = FIDStatistics(
            preprocessing=source.preprocessing.name,
            weights=self.weights,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        kept = FeatureRows()
        for batch in source:
            features = self._features(batch)
            statistics.update(features)
            if keep:
                kept.append(features)
        statistics.skipped = source.skipped
        if statistics.count == 0:
            raise ValueError(f"there is no {f'{side} image'.strip()} that can be read")
        return statistics, kept.take() if keep else None

    def _features(self, batch: np.ndarray) -> np.ndarray:
        """Map network inputs ``[B, 299, 299, 3]`` to features ``[B, 2048]``, both float32."""
        with self._scoring(gradients=False):
            # A view: channels are last in memory, as the network wants them.
            pixel_values = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)
            features: np.ndarray = self.model(pixel_values.to(self.dtype)).float().cpu().numpy()
            return features


def _given_statistics(images: FIDSource) -> FIDStatistics | None:
    if isinstance(images, FIDStatistics):
        return images
    if (
        isinstance(images, (str, os.PathLike))
        and os.fspath(images).endswith(".npz")
        and not os.path.isdir(images)
    ):
        return FIDStatistics.load(images)
    return None


def _warn_of_few_images(reference: FIDStatistics, generated: FIDStatistics) -> None:
    """Say how large FID is where it should be 0: between halves of one side."""
    counts = [side.count for side in (reference, generated) if side.count is not None]
    if not counts or min(counts) >= FEATURES:
        return
    example = ""
    features = min((side for side in (reference, generated) if side.count), key=_size).features
    if features is not None and len(features) >= 4:
        order = np.random.default_rng(0).permutation(len(features))
        first, second = np.array_split(features[order], 2)
        terms = frechet_terms(
            first.mean(axis=0),
            factor_of_features(first),
            second.mean(axis=0),
            factor_of_features(second),
        )
        example = (
            f" Two random halves of the smaller side, {len(first):,} images each, are {sum(terms):.2f} "
            "apart, though nothing but chance tells them apart."
        )
    warnings.warn(
        f"FID of {_count(reference.count)} reference and {_count(generated.count)} generated images: "
        f"below {FEATURES:,} the covariance is singular and FID is strongly biased upwards.{example} "
        "Compare only with numbers of as many images, or use evaluate(kid=True) with at least "
        f"{FEWEST_FOR_KID} images, and not statistics, on each side.",
        UserWarning,
        stacklevel=3,
    )


def _size(statistics: FIDStatistics) -> int:
    return statistics.count or 0


def _count(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
