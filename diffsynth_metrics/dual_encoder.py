"""Metrics that compare the embedding of a text with the embedding of an image.

A dual encoder declares its transform and computes raw embeddings; pairing, batching, normalisation,
cosines and the memory of prompts are here, once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize
from typing_extensions import Self

from diffsynth_metrics.base import PromptMetric, wants_gradients
from diffsynth_metrics.inputs import CheckedImages, ImagesInput, as_images, as_prompts, pair
from diffsynth_metrics.locks import Lock
from diffsynth_metrics.pixels.batches import joined
from diffsynth_metrics.pixels.transforms import Transform

__all__ = ["DualEncoderMetric", "cosine_matrix", "paired_cosine"]

_REMEMBERED_PROMPTS = 1024


def paired_cosine(text_features: Tensor, image_features: Tensor) -> Tensor:
    """Return the cosine of each pair of normalised features.

    Args:
        text_features: ``[N, D]``, or ``[1, D]`` for one text with all images.
        image_features: ``[N, D]``, or ``[1, D]`` for one image with all texts.

    Returns:
        ``[N]``.

    Raises:
        ValueError: The shapes do not pair.
    """
    shapes = list(text_features.shape), list(image_features.shape)
    (rows, width), (image_rows, image_width) = (shape if len(shape) == 2 else (0, 0) for shape in shapes)
    if not width or width != image_width or (rows != image_rows and 1 not in (rows, image_rows)):
        raise ValueError(
            f"features must be [N, D] and [N, D], or [1, D] on one side; got {shapes[0]} for "
            f"text_features and {shapes[1]} for image_features"
        )
    return (text_features * image_features).sum(dim=-1)


def cosine_matrix(text_features: Tensor, image_features: Tensor) -> Tensor:
    """Return the cosine of each text with each image: ``[T, D]`` and ``[N, D]`` to ``[T, N]``."""
    return text_features @ image_features.T


class DualEncoderMetric(PromptMetric):
    """A metric whose score is a function of the cosine of a text and an image embedding."""

    def __init__(self, model: nn.Module, *, transform: Transform, batch_size: int) -> None:
        """Wrap a loaded network and its transform; users call ``from_pretrained``."""
        super().__init__(model, batch_size=batch_size)
        self.transform = transform
        self._text_cache = _TextCache(_REMEMBERED_PROMPTS)

    if not TYPE_CHECKING:

        @property
        def model(self) -> nn.Module:
            """The network. Who has asked for it can change it, see :attr:`remembers_prompts`."""
            self.remembers_prompts = False
            return self._network

        @model.setter
        def model(self, network: nn.Module) -> None:
            self.remembers_prompts = False
            self._network = network

    @property
    def remembers_prompts(self) -> bool:
        """Whether text features of prompts are kept from call to call.

        They are in a metric that ``from_pretrained`` loaded, until somebody asks for its ``model``: a
        network can change without a trace (hooks, adapters, fused optimizers, ``.data``), and what was
        remembered would be wrong in silence. Set it to True where the text tower stays as it is.
        """
        return self._text_cache.is_used

    @remembers_prompts.setter
    def remembers_prompts(self, value: bool) -> None:
        self._text_cache.is_used = value
        self._text_cache.clear()  # afterwards, so that no other thread adds to it in between

    @abstractmethod
    def _embed_images(self, pixel_values: Tensor) -> Tensor:
        """Map normalised pixels ``[B, 3, S, S]`` to embeddings ``[B, D]``, float32 or wider."""

    @abstractmethod
    def _embed_texts(self, prompts: list[str]) -> Tensor:
        """Map prompts to embeddings ``[B, D]``, float32 or wider."""

    @abstractmethod
    def _score(self, cosine: Tensor) -> Tensor:
        """Apply the metric's formula to cosines of any shape."""

    def encode_image(self, images: ImagesInput) -> Tensor:
        """Compute image features.

        Returns:
            float32 ``[N, D]`` on the metric's device, each row of L2 norm 1. Gradients flow as in
            :meth:`reward`.
        """
        with self._scoring(gradients=wants_gradients(images)):
            return self._image_features(as_images(images))

    def encode_text(self, prompt: str | Sequence[str]) -> Tensor:
        """Compute text features, without gradients.

        Returns:
            float32 ``[T, D]`` on the metric's device, each row of L2 norm 1.
        """
        with self._scoring(gradients=False):
            # A copy, because what is remembered must not be written to.
            return self._text_features(as_prompts(prompt)).clone()

    def score_from_features(self, text_features: Tensor, image_features: Tensor) -> Tensor:
        """Score pairs of features.

        Args:
            text_features: ``[N, D]`` or ``[1, D]``, normalised, as :meth:`encode_text` returns.
            image_features: ``[N, D]`` or ``[1, D]``, normalised, as :meth:`encode_image` returns.

        Returns:
            ``[N]``, float32 or wider; gradients flow to both.

        Raises:
            ValueError: The shapes do not pair.
        """
        wide = torch.promote_types(
            torch.promote_types(text_features.dtype, image_features.dtype), torch.float32
        )
        with torch.autocast(self.device.type, enabled=False):
            return self._score(paired_cosine(text_features.to(wide), image_features.to(wide)))

    def similarity_matrix(self, prompt: str | Sequence[str], images: ImagesInput) -> list[list[float]]:
        """Score every prompt with every image.

        Returns:
            One list per prompt with one score per image, each equal to what :meth:`compute` returns
            for that pair.
        """
        with self._scoring(gradients=False):
            text_features = self._text_features(as_prompts(prompt))
            image_features = self._image_features(as_images(images))
            matrix: list[list[float]] = self._score(
                cosine_matrix(text_features, image_features)
            ).tolist()
        return matrix

    def to(self, device: str | torch.device) -> Self:
        """Move the network to a device and return the metric."""
        self._text_cache.clear()
        return super().to(device)

    def _components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        prompts, checked, _ = pair(prompt, images)
        # Images first: an accelerator computes them while the prompts are looked up or tokenized.
        image_features = self._image_features(checked)
        cosine = paired_cosine(self._text_features(prompts), image_features)
        return {"score": self._score(cosine), "cosine": cosine}

    def _image_features(self, images: CheckedImages) -> Tensor:
        batches = self._pixel_batches(images, self.transform)
        return joined([l2_normalize(self._embed_images(batch), dim=-1) for batch in batches])

    def _text_settings(self) -> Hashable:
        """Return what text features depend on besides prompt and network."""
        return None

    def _text_features(self, prompts: list[str]) -> Tensor:
        """Return the features of all prompts; each different prompt is encoded once."""
        different = list(dict.fromkeys(prompts))
        settings = self._text_settings()
        starts = range(0, len(different), self.batch_size)
        batches = [tuple(different[start : start + self.batch_size]) for start in starts]
        features = joined([self._batch_of_texts(settings, batch) for batch in batches])
        if different == prompts:
            return features
        places = {prompt: place for place, prompt in enumerate(different)}
        return features[[places[prompt] for prompt in prompts]]

    def _batch_of_texts(self, settings: Hashable, prompts: tuple[str, ...]) -> Tensor:
        # Remembered as a batch, and not prompt by prompt: products round differently in batches of
        # another size, and what a call gets must not depend on what other calls asked before.
        features = self._text_cache.get((settings, prompts))
        if features is None:
            with torch.no_grad():
                features = l2_normalize(self._embed_texts(list(prompts)), dim=-1)
            self._text_cache.put((settings, prompts), features)
        return features


class _TextCache:
    """The features of the batches of prompts that were used last, for all threads; a copy is empty.

    Attributes:
        is_used: Whether anything is kept.
    """

    def __init__(self, capacity: int, *, is_used: bool = False) -> None:
        """Keep features of `capacity` prompts, or of a single batch that has more."""
        self._capacity = capacity
        self.is_used = is_used
        self._batches: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return partial(_TextCache, is_used=self.is_used), (self._capacity,)

    def __len__(self) -> int:
        return sum(map(len, self._batches.values()))

    def get(self, key: Hashable) -> Tensor | None:
        with self._lock:
            features = self._batches.get(key)
            if features is not None:
                self._batches.move_to_end(key)
            return features

    def put(self, key: Hashable, features: Tensor) -> None:
        with self._lock:
            if self.is_used:
                self._batches[key] = features
            while len(self) > self._capacity and len(self._batches) > 1:
                self._batches.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._batches.clear()
