"""What frameworks pass: prompts with images or videos, and the images that they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from diffsynth_metrics.errors import RewardError
from diffsynth_metrics.inputs import as_images, is_one_image, rounded

__all__ = ["Batch", "Frames", "as_batch", "as_bytes", "check_frames", "has_videos"]

Frames: TypeAlias = Literal["mean", "min", "first", "middle", "all"]
"""The score of a video: the mean or the lowest of its frames' scores, the score of one frame, or what a
function makes of all frames together."""


@dataclass(frozen=True)
class Batch:
    """N samples to be scored.

    An image may be an exception that says why there is none. Of videos, `images` are the frames of all
    of them, `frames` says how many each has, and `lowest` that the lowest score of its frames counts and
    not the mean. `sources` are the images that each sample was made from; empty where none has any.
    """

    prompts: list[str]
    images: Any
    sources: list[list[Any]]
    frames: list[int] | None = None
    lowest: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, indices: Sequence[int]) -> Batch:
        """Return some of the samples, of a batch of images."""
        images = self.images
        return Batch(
            [self.prompts[index] for index in indices],
            images[list(indices)] if isinstance(images, Tensor) else [images[i] for i in indices],
            [self.sources[index] for index in indices] if self.sources else [],
        )

    def of_frames(self) -> Batch:
        """Return every frame as a sample."""
        if self.frames is None:
            return self
        owners = [index for index, count in enumerate(self.frames) for _ in range(count)]
        blank = replace(self, images=self.prompts, frames=None)
        return replace(blank.select(owners), images=self.images)

    def as_bytes(self) -> Batch:
        """Return the samples with their float pictures rounded, see :func:`as_bytes`."""
        return replace(self, images=as_bytes(self.images), sources=[*map(as_bytes, self.sources)])


def as_batch(
    prompts: Sequence[str], images: Any, sources: Any = None, frames: Frames | None = None
) -> Batch:
    """Align what a framework passes.

    Args:
        prompts: N prompts.
        images: N images: a tensor ``[N, 3, H, W]``, an array ``[N, H, W, 3]`` or a list. Or N videos: a
            tensor ``[N, T, 3, H, W]``, an array ``[N, T, H, W, 3]``, or a list of such and of lists.
        sources: For each sample an image, several, or None; None where there are none.
        frames: What becomes of a video.

    A single prompt or picture, whose letters or rows would be taken for many, is a TypeError or
    ValueError, and so are numbers that differ or are 0, and a video where `frames` is None. Of a video
    without frames the image is an error that says so.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list, one per image, got the str {prompts!r}")
    if getattr(images, "ndim", 4) == 3:
        raise ValueError(
            "images must be a batch [N, 3, H, W], an array [N, H, W, 3] or a list, "
            f"got a single one of shape {list(images.shape)}"
        )
    prompts = list(prompts)
    counts = hasattr(images, "__len__") and not isinstance(images, (str, bytes))
    if not counts or len(images) != len(prompts):
        got = len(images) if counts else type(images).__name__
        raise ValueError(f"got {len(prompts)} prompts and {got} images")
    if not prompts:
        raise ValueError("there are no prompts and no images; pass at least one pair")
    if sources is not None and (is_one_image(sources) or len(sources) != len(prompts)):
        got = "a single one" if is_one_image(sources) else len(sources)
        raise ValueError(f"pass source images as a list with {len(prompts)} entries, got {got}")
    of_samples = [] if sources is None else [_images_of(one) for one in sources]
    batch = Batch(prompts, images, of_samples if any(of_samples) else [])
    return _with_frames(batch, frames) if has_videos(images) else batch


def check_frames(frames: Frames | None) -> Frames | None:
    """Return what becomes of a video; what is not known is a ValueError."""
    if frames is not None and frames not in get_args(Frames):
        raise ValueError(f"frames must be one of {', '.join(get_args(Frames))}, got {frames!r}")
    return frames


def as_bytes(images: Any) -> Any:
    """Round float pictures to the bytes that are saved.

    A tensor stays on its device. Anything that is not a float picture is returned as it is, and the
    metric says what is wrong with it; the other pictures of its batch are rounded all the same.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.ndim in (3, 4):
        images = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3)
    if isinstance(images, Tensor) and images.is_floating_point():
        try:
            as_images(images)
        except ValueError:
            return [as_bytes(image) for image in images] if images.ndim == 4 else images
        result = torch.empty_like(images, dtype=torch.uint8)
        # One by one, so that what is between stays in a processor's caches.
        for target, image in zip(result, images, strict=True):
            target.copy_(rounded(image))
        return result
    return [as_bytes(image) for image in images] if isinstance(images, (list, tuple)) else images


def _is_several(sample: Any) -> bool:
    return isinstance(sample, (list, tuple)) or getattr(sample, "ndim", 3) == 4


def _images_of(sample: Any) -> list[Any]:
    """Return the images of one sample as a list."""
    return [] if sample is None else list(sample) if _is_several(sample) else [sample]


def has_videos(images: Any) -> bool:
    """Tell whether there is a video among images."""
    ndim = getattr(images, "ndim", None)
    return ndim == 5 or (ndim is None and any(map(_is_several, images)))


def _with_frames(batch: Batch, frames: Frames | None) -> Batch:
    """Take the frames of the videos that are to be scored."""
    if frames is None:
        raise ValueError(f"there are videos: pass frames= as one of {', '.join(get_args(Frames))}")
    nothing = RewardError("the video has no frames")
    videos = [_images_of(video) or [nothing] for video in batch.images]
    if frames == "all":
        return replace(batch, images=[v[0] if isinstance(v[0], Exception) else v for v in videos])
    if frames in ("first", "middle"):
        return replace(batch, images=[v[0 if frames == "first" else len(v) // 2] for v in videos])
    flat = [image for video in videos for image in video]
    return replace(batch, images=flat, frames=[*map(len, videos)], lowest=frames == "min")
