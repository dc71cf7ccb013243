"""What metrics share that embed images: L2-normalised features, batch by batch."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from torch.nn.functional import normalize as l2_normalize

from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.inputs import CheckedImages, ImagesInput, as_images
from diffsynth_metrics.modes import plain_modes, wants_gradients
from diffsynth_metrics.pixels.batches import joined

__all__ = ["EncodesImages"]


class EncodesImages(BaseMetric):
    """A metric whose network makes an embedding of an image; it defines :meth:`embed_image`."""

    @abstractmethod
    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Map normalised pixels ``[B, 3, S, S]`` to embeddings ``[B, D]``, float32 or wider."""

    def encode_image(self, images: ImagesInput) -> Tensor:
        """Compute image features.

        Returns:
            float32 ``[N, D]`` on the metric's device, each row of L2 norm 1. Gradients flow as in
            :meth:`reward`.
        """
        with plain_modes(self.device.type, gradients=wants_gradients(images)):
            return self.image_features(as_images(images))

    def image_features(self, images: CheckedImages) -> Tensor:
        """Do the same for checked images, in the grad mode and autocast of the caller."""
        return l2_normalize(self.image_embeddings(images), dim=-1)

    def image_embeddings(self, images: CheckedImages) -> Tensor:
        """Embed checked images: ``[N, D]``, not normalised, likewise in the modes of the caller."""
        return joined([self.embed_image(batch) for batch in self.pixel_batches(images)])
