"""Metrics that compare the embedding of a text with the embedding of an image.

A dual encoder says how it tokenizes and embeds; pairing, batching, normalisation, cosines and the cache
of text features are here, once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize
from typing_extensions import Self

from diffsynth_metrics.base import PromptMetric
from diffsynth_metrics.image_encoder import EncodesImages
from diffsynth_metrics.inputs import ImagesInput, as_images, as_prompts, pair
from diffsynth_metrics.modes import plain_modes
from diffsynth_metrics.tokens import CutsPrompts, TokenizedPrompts

__all__ = ["DualEncoderMetric", "cosine_matrix", "paired_cosine"]

_CACHED_PROMPTS = 4096


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


class DualEncoderMetric(CutsPrompts, EncodesImages, PromptMetric):
    """A metric whose score is a function of the cosine of a text and an image embedding.

    Option ``cache_text`` (default False): keep the features of the last prompts from call to call, which
    saves the text tower where prompts repeat, as in a training loop. The cache does not see that the
    network changes: whoever trains, patches or replaces it calls :meth:`clear_text_cache`, or scores are
    those of the old network.
    """

    def __init__(
        self, model: nn.Module, processor: Any = None, *, cache_text: bool = False, **base: Any
    ) -> None:
        """Wrap a loaded network; users call ``from_pretrained``."""
        super().__init__(model, processor, **base)
        self.cache_text = cache_text
        self._text_cache: dict[tuple[int, ...], Tensor] = {}

    @abstractmethod
    def embed_text(self, ids: list[list[int]]) -> Tensor:
        """Map the token ids of B prompts to embeddings ``[B, D]``, float32 or wider."""

    @abstractmethod
    def score_of_cosine(self, cosine: Tensor) -> Tensor:
        """Apply the metric's formula to cosines of any shape."""

    def components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        """Compute ``"score"``, ``"cosine"``, ``"prompt_tokens"`` and whether it was ``"truncated"``.

        See :meth:`PromptMetric.components`.
        """
        prompts, checked, count = pair(prompt, images)
        tokens = self.tokens_of(prompts)
        # Images first: an accelerator computes them while the texts are prepared.
        image_features = self.image_features(checked)
        cosine = paired_cosine(self._text_features(tokens), image_features)
        return {
            "score": self.score_of_cosine(cosine),
            "cosine": cosine,
            **tokens.components(count),
        }

    def encode_text(self, prompt: str | Sequence[str]) -> Tensor:
        """Compute text features, without gradients.

        Returns:
            float32 ``[T, D]`` on the metric's device, each row of L2 norm 1.
        """
        with plain_modes(self.device.type, gradients=False):
            return self._text_features(self.tokens_of(as_prompts(prompt)))

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
            return self.score_of_cosine(paired_cosine(text_features.to(wide), image_features.to(wide)))

    def similarity_matrix(self, prompt: str | Sequence[str], images: ImagesInput) -> list[list[float]]:
        """Score every prompt with every image.

        Returns:
            One list per prompt with one score per image, each equal to what :meth:`compute` returns
            for that pair.
        """
        with plain_modes(self.device.type, gradients=False):
            text_features = self._text_features(self.tokens_of(as_prompts(prompt)))
            cosine = cosine_matrix(text_features, self.image_features(as_images(images)))
            matrix: list[list[float]] = self.score_of_cosine(cosine).tolist()
        return matrix

    def clear_text_cache(self) -> None:
        """Forget the text features that ``cache_text=True`` keeps."""
        # A call that runs in another thread fills the old dict, whose features may be of an old network.
        self._text_cache = {}

    def to(
        self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Self:
        """Move the network to a device or bring its towers to a dtype, see :meth:`BaseMetric.to`."""
        super().to(device, dtype, non_blocking)
        self.clear_text_cache()
        return self

    @torch.no_grad()
    def _text_features(self, tokens: TokenizedPrompts) -> Tensor:
        """Return the features of all prompts; each different prompt is embedded once."""
        keys = [tuple(ids) for ids in tokens.ids]
        cache = self._text_cache if self.cache_text else {}
        known = {key: cache[key] for key in keys if key in cache}
        new = [key for key in dict.fromkeys(keys) if key not in known]
        for start in range(0, len(new), self.batch_size):
            batch = new[start : start + self.batch_size]
            features = l2_normalize(self.embed_text([list(key) for key in batch]), dim=-1)
            known |= dict(zip(batch, features, strict=True))
        if len(cache) + len(new) > _CACHED_PROMPTS:
            cache.clear()
        cache |= {key: known[key] for key in new}
        return torch.stack([known[key] for key in keys])
