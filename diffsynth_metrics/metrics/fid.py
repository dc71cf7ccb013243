"""FID: how far the distribution of generated images is from that of reference images."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.inception import Inception3
from typing_extensions import Self, TypedDict, Unpack

from diffsynth_metrics.base import MetricCard, SetMetric, check_batch_size
from diffsynth_metrics.fid.distances import (
    FEWEST_FOR_KID,
    FEWEST_FOR_PRDC,
    kernel_distance,
    precision_recall_density_coverage,
)
from diffsynth_metrics.fid.preprocessing import PREPROCESSINGS, Prepare, find_preprocessing
from diffsynth_metrics.fid.sources import ImageReader, ImageSource, OnError, choose_workers
from diffsynth_metrics.fid.statistics import (
    FEWEST_FOR_INFINITY,
    FIDStatistics,
    compare_statistics,
    differences_of_making,
    fid_infinity,
)
from diffsynth_metrics.modes import plain_modes
from diffsynth_metrics.networks.inception import FEATURES, build_inception
from diffsynth_metrics.weights.files import sha256_of
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["FIDMetric", "FIDSource", "ReadOptions"]

FIDSource: TypeAlias = "ImageSource | FIDStatistics"
"""A folder, images, an iterable of images or batches, statistics, or an ``.npz`` file of statistics."""

logger = logging.getLogger(__name__)


class ReadOptions(TypedDict, total=False):
    """How one call reads its images; every option may be left out.

    Attributes:
        preprocessing: Another one than the metric's, for images. Statistics keep their own, and it is an
            error if theirs is another one.
        on_error: ``"raise"``, the default, stops at an image that is absent, invalid or cannot be read
            and names it; ``"skip"`` leaves it out and counts it.
        progress: Whether a terminal shows a progress bar; it does by default.
    """

    preprocessing: str | None
    on_error: OnError
    progress: bool


class FIDMetric(SetMetric):
    """FID with the Inception of 2015-12-05: lower is better.

    Example:
        >>> metric = FIDMetric.from_pretrained()
        >>> metric.compute("real/", "generated/")

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
        good_for="how close a set of pictures is to a reference set",
        download="96 MB",
        memory="87 MB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="FID/model.safetensors"
    )
    config_file: ClassVar[str | None] = None
    label: ClassVar[str] = "FID"
    """How messages call the distance."""
    extractor: ClassVar[str] = "inception"
    """Name of the network, which statistics carry."""
    preprocessings: ClassVar[Mapping[str, Prepare]] = PREPROCESSINGS
    """Name of a preprocessing to what it does."""
    dimensions: int = FEATURES
    """Number of features that the network makes of an image."""
    model: Inception3

    def __init__(
        self,
        model: Inception3,
        processor: None = None,
        *,
        preprocessing: str = "clean",
        num_workers: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        self.check_options(preprocessing=preprocessing, num_workers=num_workers)
        super().__init__(model, processor, batch_size=batch_size)
        self.preprocessing = preprocessing
        self.num_workers = num_workers
        self.weights: str | None = None  # sha256 of the weight file

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model_config: ModelConfig | None = None,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        vram_limit: None = None,
        *,
        preprocessing: str = "clean",
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
            preprocessing: ``"clean"``, ``"pytorch-fid"``, ``"torch-fidelity"``, ``"torchmetrics"`` or
                ``"diffsynth"``.
            torch_dtype: Dtype of the network; float32 by default, as everybody computes FID.
                Statistics are float64 in any case.
            processor_config: Accepted as in the other metrics and not needed.

        Raises:
            CheckpointError: The files do not hold this metric's weights.
            DownloadError: The files could not be had.
            TypeError: `torch_dtype` is no floating dtype, or a config no ModelConfig.
            ValueError: There is no such preprocessing, or a number is out of range.
            RuntimeError: torch does not know the device, or it is not there.
        """
        return super().from_pretrained(
            model_config,
            processor_config,
            torch_dtype,
            device,
            batch_size=batch_size,
            num_workers=num_workers,
            vram_limit=vram_limit,
            preprocessing=preprocessing,
        )

    @classmethod
    def check_options(  # type: ignore[override]
        cls, *, preprocessing: str = "clean", num_workers: int | None = None
    ) -> None:
        """Check the metric's own options before files are fetched."""
        find_preprocessing(preprocessing, cls.preprocessings)
        choose_workers(num_workers)

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> Inception3:
        """Build the Inception, which has one architecture."""
        return build_inception()

    @classmethod
    def finish(cls, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Leave the classifier out, and bring the statistics of batch norms to the dtype as well."""
        model.fc = nn.Identity()
        return model.to(dtype)

    def describe(self) -> None:
        """Note the sha256 of the weights, which statistics carry."""
        super().describe()
        self.weights = sha256_of(self.weight_files)

    def compute(  # type: ignore[override]
        self,
        reference_images: FIDSource,
        generated_images: FIDSource,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **options: Unpack[ReadOptions],
    ) -> float:
        """Compute FID between two sets of images.

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
            FID, at least 0.

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
        """Compute FID like :meth:`compute`, with its parts and with what else the features say.

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
        return self._extract("", self._open("", images, batch_size, num_workers, **options))[0]

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
        features = self._extract("", self._open("", images, progress=progress), keep=True)[1]
        if len(features) == 0:
            raise ValueError("statistics do not hold features; pass the images")
        return torch.from_numpy(features.astype(np.float32, copy=False))

    @property
    def provenance(self) -> dict[str, Any]:
        """What made a number, see :attr:`BaseMetric.provenance`; with the name of the preprocessing."""
        return {**super().provenance, "preprocessing": self.preprocessing}

    def __repr__(self) -> str:
        """Show the class, where it runs and its preprocessing."""
        return f"{super().__repr__()[:-1]}, preprocessing={self.preprocessing!r})"

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
            side: self._open(side, source, batch_size, num_workers, **options)
            for side, source in images.items()
        }
        for side, source in sources.items():
            _check_count(side, source, {self.label: 2, **measures.get(side, {})})
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
            "reference_count": reference.count,
            "generated_count": generated.count,
            "reference_skipped": reference.skipped,
            "generated_skipped": generated.skipped,
            "preprocessing": generated.preprocessing,
            "weights": generated.weights,
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

    def _open(
        self,
        side: str,
        images: FIDSource,
        batch_size: int | None = None,
        num_workers: int | None = None,
        *,
        preprocessing: str | None = None,
        on_error: OnError = "raise",
        progress: bool = True,
        **unknown: Any,
    ) -> FIDStatistics | ImageReader:
        """Check a side and its options; nothing goes through the network yet."""
        if unknown:
            raise TypeError(
                f"there is no option {next(iter(unknown))!r}; there are batch_size, num_workers, "
                f"{', '.join(ReadOptions.__annotations__)}"
            )
        wanted = self.preprocessing if preprocessing is None else preprocessing
        prepare = find_preprocessing(wanted, self.preprocessings)
        batch_size = check_batch_size(self.batch_size if batch_size is None else batch_size)
        num_workers = choose_workers(self.num_workers if num_workers is None else num_workers)
        source = _find_source(images, self.label)
        if not isinstance(source, FIDStatistics):
            return ImageReader(
                source,
                prepare,
                batch_size=batch_size,
                num_workers=num_workers,
                on_error=on_error,
                progress=f"{self.label} ({prepare.name}), {side or 'images'}" if progress else None,
            )
        if source.extractor != self.extractor:
            raise ValueError(
                f"the {side or 'given'} statistics hold features of {source.extractor!r}, and "
                f"{self.label} compares those of {self.extractor!r}"
            )
        if preprocessing is not None and source.preprocessing not in (None, preprocessing):
            raise ValueError(
                f"the {side or 'given'} statistics were prepared as {source.preprocessing!r}, which "
                f"preprocessing={preprocessing!r} contradicts"
            )
        return source

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
        statistics = FIDStatistics(
            preprocessing=source.preprocessing.name,
            weights=self.weights,
            dtype=str(self.dtype).removeprefix("torch."),
            extractor=self.extractor,
        )
        for batch in source:
            features = self._features(batch)
            statistics.update(features)
            if keep:
                kept.append(features)
        statistics.skipped = source.skipped
        if statistics.count == 0:
            raise ValueError(f"there is no {f'{side} image'.strip()} that can be read")
        return statistics, np.concatenate(kept)

    def _features(self, batch: np.ndarray) -> np.ndarray:
        """Map network inputs ``[B, S, S, 3]`` to features ``[B, D]``, both float32."""
        with plain_modes(self.device.type, gradients=False):
            # A view, with the channels last in memory: torch computes convolutions that way, and faster.
            pixel_values = torch.from_numpy(batch).to(self.device, self.dtype).permute(0, 3, 1, 2)
            features: np.ndarray = self.model(pixel_values).float().cpu().numpy()
        if not np.isfinite(features).all():
            self.check_weights()
        return features


def _find_source(images: FIDSource, label: str) -> FIDSource:
    """Return the statistics of a file of statistics, and other sources as they are."""
    if not isinstance(images, (str, os.PathLike)):
        return images
    path = Path(images).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".npz":
        return FIDStatistics.load(path)
    if path.is_file():
        raise ValueError(
            f"{str(images)!r} is one file; {label} compares sets of images: pass a folder, a list of "
            "images, an array [N, H, W, 3] (numpy.load of an .npy file), or an .npz file of statistics"
        )
    return path


def _check_count(side: str, source: FIDStatistics | ImageReader, measures: Mapping[str, int]) -> None:
    """Refuse a side that has too few images, or no features for the measures after the first."""
    _, *of_features = measures
    if of_features and isinstance(source, FIDStatistics) and source.features is None:
        raise ValueError(
            f"{', '.join(of_features)} need the {side} images: statistics do not hold features"
        )
    count = source.count if isinstance(source, FIDStatistics) else source.total
    for measure, fewest in measures.items():
        if count is not None and count < fewest:
            raise ValueError(f"{measure} needs at least {fewest} {side} images, got {count}")


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
