"""What metrics of two sets of images share: how a side is read, and how it goes through the network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from diffsynth_metrics.base import SetMetric, check_batch_size
from diffsynth_metrics.fid.features import FeatureSet
from diffsynth_metrics.fid.preprocessing import Prepare, find_preprocessing
from diffsynth_metrics.fid.sources import ImageReader, ImageSource, OnError, choose_workers
from diffsynth_metrics.fid.statistics import FIDStatistics
from diffsynth_metrics.modes import plain_modes
from diffsynth_metrics.weights.files import sha256_of

__all__ = ["FeatureMetric", "ReadOptions", "check_count", "counts_of"]

_Kept: TypeAlias = "FIDStatistics | FeatureSet"


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


class FeatureMetric(SetMetric):
    """A metric of two sets that compares features of a network, which may be kept and come again.

    It defines :meth:`evaluate` and ``statistics``. :meth:`open_side` and :meth:`features_of` bring a
    source to features, and :meth:`made_by` says what is kept with these.
    """

    label: ClassVar[str]
    """How messages call the distance."""
    extractor: ClassVar[str]
    """Name of the network, which statistics carry."""
    preprocessings: ClassVar[Mapping[str, Prepare]]
    """Name of a preprocessing to what it does; the first is the default."""
    statistics_type: ClassVar[type[FIDStatistics] | type[FeatureSet]]
    """What is kept of a set of images."""

    def __init__(
        self,
        model: nn.Module,
        processor: None = None,
        *,
        preprocessing: str | None = None,
        num_workers: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`.

        Args:
            model: The network.
            processor: None.
            preprocessing: One of :attr:`preprocessings`.
            num_workers: Threads that decode and resize images ahead of the network.
            batch_size: The largest number of images in the network at once.
        """
        self.check_options(preprocessing=preprocessing, num_workers=num_workers)
        super().__init__(model, processor, batch_size=batch_size)
        self.preprocessing = preprocessing or next(iter(self.preprocessings))
        self.num_workers = num_workers
        self.weights: str | None = None  # sha256 of the weight file

    @classmethod
    def check_options(  # type: ignore[override]
        cls, *, preprocessing: str | None = None, num_workers: int | None = None
    ) -> None:
        """Check the metric's own options before files are fetched."""
        if preprocessing is not None:
            find_preprocessing(preprocessing, cls.preprocessings)
        choose_workers(num_workers)

    def describe(self) -> None:
        """Note the sha256 of the weights, which statistics carry."""
        super().describe()
        self.weights = sha256_of(self.weight_files)

    @property
    def provenance(self) -> dict[str, Any]:
        """What made a number, see :attr:`BaseMetric.provenance`; with the name of the preprocessing."""
        return {**super().provenance, "preprocessing": self.preprocessing}

    def __repr__(self) -> str:
        """Show the class, where it runs and its preprocessing."""
        return f"{super().__repr__()[:-1]}, preprocessing={self.preprocessing!r})"

    def open_side(
        self,
        side: str,
        images: ImageSource | _Kept,
        batch_size: int | None = None,
        num_workers: int | None = None,
        *,
        preprocessing: str | None = None,
        on_error: OnError = "raise",
        progress: bool = True,
        **unknown: Any,
    ) -> Any:
        """Check a side and its options; nothing goes through the network yet.

        Args:
            side: How messages call it, such as ``"reference"``.
            images: A source of images, or what is kept of one, or a file of that.
            batch_size: Another one than the metric's.
            num_workers: Another number than the metric's.
            preprocessing: See :class:`ReadOptions`, as for what follows.
            on_error: See there.
            progress: See there.
            **unknown: An error.

        Returns:
            What was kept, or an :class:`ImageReader`.
        """
        if unknown:
            raise TypeError(
                f"there is no option {next(iter(unknown))!r}; there are batch_size, num_workers, "
                f"{', '.join(ReadOptions.__annotations__)}"
            )
        wanted = self.preprocessing if preprocessing is None else preprocessing
        prepare = find_preprocessing(wanted, self.preprocessings)
        batch_size = check_batch_size(self.batch_size if batch_size is None else batch_size)
        num_workers = choose_workers(self.num_workers if num_workers is None else num_workers)
        source = self._find_source(images)
        if isinstance(source, self.statistics_type):
            self._check_kept(side, source, preprocessing)
            return source
        return ImageReader(
            source,
            prepare,
            batch_size=batch_size,
            num_workers=num_workers,
            on_error=on_error,
            progress=f"{self.label} ({prepare.name}), {side or 'images'}" if progress else None,
        )

    def made_by(self, source: ImageReader) -> dict[str, Any]:
        """Return what is kept with the features of a source: what made them."""
        return {
            "preprocessing": source.preprocessing.name,
            "weights": self.weights,
            "dtype": str(self.dtype).removeprefix("torch."),
            "extractor": self.extractor,
        }

    def features_of(self, side: str, source: ImageReader) -> Iterator[np.ndarray]:
        """Yield features ``[B, D]``, float32, of the images of a source, batch by batch.

        Raises:
            ValueError: There is no image that can be read.
        """
        empty = True
        for batch in source:
            yield self._features(batch)
            empty = False
        if empty:
            raise ValueError(f"there is no {f'{side} image'.strip()} that can be read")

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Map network inputs ``[B, 3, S, S]`` to features ``[B, D]``, float32."""
        features: Tensor = self.model(pixel_values).float()
        return features

    def _features(self, batch: np.ndarray) -> np.ndarray:
        """Map network inputs ``[B, S, S, 3]`` to features ``[B, D]``, both float32."""
        with plain_modes(self.device.type, gradients=False):
            # A view, with the channels last in memory: torch computes convolutions that way, and faster.
            pixel_values = torch.from_numpy(batch).to(self.device, self.dtype).permute(0, 3, 1, 2)
            features: np.ndarray = self.embed_image(pixel_values).cpu().numpy()
        if not np.isfinite(features).all():
            self.check_weights()
        return features

    def _find_source(self, images: Any) -> Any:
        """Return the contents of a file of statistics, and other sources as they are."""
        if not isinstance(images, (str, os.PathLike)):
            return images
        path = Path(images).expanduser()
        if path.suffix == ".npz" and not path.is_dir():
            return self.statistics_type.load(path)
        if path.is_file():
            raise ValueError(
                f"{str(images)!r} is one file; {self.label} compares sets of images: pass a folder, a "
                "list of images, an array [N, H, W, 3] (numpy.load of an .npy file), or an .npz file of "
                "statistics"
            )
        return path

    def _check_kept(self, side: str, kept: _Kept, preprocessing: str | None) -> None:
        if kept.extractor != self.extractor:
            raise ValueError(
                f"the {side or 'given'} statistics hold features of {kept.extractor!r}, and "
                f"{self.label} compares those of {self.extractor!r}"
            )
        if len(self.preprocessings) == 1:
            preprocessing = self.preprocessing
        if preprocessing is not None and kept.preprocessing not in (None, preprocessing):
            raise ValueError(
                f"the {side or 'given'} statistics were prepared as {kept.preprocessing!r}, which "
                f"preprocessing={preprocessing!r} contradicts"
            )


def counts_of(reference: _Kept, generated: _Kept) -> dict[str, Any]:
    """Return what belongs to a number besides the number: counts, preprocessing, weights."""
    return {
        "reference_count": reference.count,
        "generated_count": generated.count,
        "reference_skipped": reference.skipped,
        "generated_skipped": generated.skipped,
        "preprocessing": generated.preprocessing,
        "weights": generated.weights,
    }


def check_count(side: str, source: _Kept | ImageReader, measures: Mapping[str, int]) -> None:
    """Refuse a side that has too few images, or no features for the measures after the first."""
    _, *of_features = measures
    if of_features and isinstance(source, FIDStatistics) and source.features is None:
        raise ValueError(
            f"{', '.join(of_features)} need the {side} images: statistics do not hold features"
        )
    count = source.total if isinstance(source, ImageReader) else source.count
    for measure, fewest in measures.items():
        if count is not None and count < fewest:
            raise ValueError(f"{measure} needs at least {fewest} {side} images, got {count}")
