"""LPIPS: how different two pictures look to people, from the features of a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from diffsynth_metrics.base import MetricCard, ReferenceMetric
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.inputs import (
    CheckedImage,
    CheckedImages,
    ImagesInput,
    image_size,
    open_image,
    pair_references,
    pixel_count,
)
from diffsynth_metrics.networks.lpips import NETS, LPIPSNetwork
from diffsynth_metrics.pixels.batches import prepare_ahead, tensor_pixels
from diffsynth_metrics.pixels.resizing import cpu_count
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop, Transform, Unresized, normalize_
from diffsynth_metrics.weights.checkpoint import read_layout
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["LPIPSMetric"]

_HALF = (0.5, 0.5, 0.5)  # brings pixels to -1..1
_FILES = {"alex": "alexnet", "squeeze": "squeezenet", "vgg": "vgg"}


class LPIPSMetric(ReferenceMetric):
    """LPIPS, version 0.1: 0 for equal pictures, lower is more similar.

    Example:
        >>> metric = LPIPSMetric.from_pretrained()
        >>> metric.compute("original.png", "copy.png")[0]

    Pictures of one size are compared as they are. Where the two of a pair differ in size, both are
    resized (bicubic, the shorter side to `target_size`) and cropped at the centre. :meth:`reward` is
    minus the distance. See ``LPIPSMetric.card``.
    """

    card = MetricCard(
        name="LPIPS",
        inputs="reference image and image",
        range="0 for equal pictures; about 0.05 to 0.8",
        higher_is_better=False,
        definition="sum over layers of the mean over positions of w * (f(a) - f(b))^2",
        paper="https://arxiv.org/abs/1801.03924",
        repository="https://github.com/richzhang/PerceptualSimilarity",
        code_license="BSD-2-Clause",
        weights_license="BSD-2-Clause (linear weights), BSD-3-Clause (torchvision's networks)",
        notes="Distances of different networks and picture sizes are not comparable.",
        good_for="how far an edit or reconstruction looks from its reference",
        download="10 MB",
        memory="10 MB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="LPIPS/alexnet.safetensors"
    )
    config_file = None
    float32_parts = ("lin",)
    model: LPIPSNetwork

    def __init__(
        self,
        model: LPIPSNetwork,
        processor: None = None,
        *,
        net: str = "alex",
        target_size: int = 512,
        **base: Any,
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        self.check_options(net=net, target_size=target_size)
        super().__init__(model, processor, **base)
        self.net, self.target_size = net, target_size
        self.unresized = Unresized(mean=_HALF, std=_HALF)
        self.transform = ShortestEdgeCrop(target_size, crop_rounding="half_even", mean=_HALF, std=_HALF)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        model_config: ModelConfig | None = None,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        target_size: int = 512,
        vram_limit: None = None,
        **base: Any,
    ) -> Self:
        """Load the metric; the order of the positional arguments is that of ``diffsynth.metrics``.

        Args:
            net: Whose features are compared: ``"alex"`` for measuring, as the authors recommend,
                ``"vgg"`` as a loss, ``"squeeze"`` where it must be small.
            model_config: Where the weights are; the published ones of `net` by default.
            device: Any torch device; the best that torch reports by default.
            batch_size: The largest number of pairs in the network at once.
            target_size: The side of pictures whose sizes differ.
            vram_limit: Accepted if it is None, the default of ``diffsynth.metrics``.
            **base: See :meth:`BaseMetric.from_pretrained`.

        Raises:
            ValueError: There is no such network, or a number is out of range.
            CheckpointError: The files hold another network's weights, or another metric's.
            Exception: What :meth:`BaseMetric.from_pretrained` raises.
        """
        cls.check_options(net=net, target_size=target_size)
        if model_config is None:
            model_config = ModelConfig(
                model_id=cls.default_model.model_id,
                origin_file_pattern=f"LPIPS/{_FILES[net]}.safetensors",
            )
        return super().from_pretrained(
            model_config,
            device=device,
            batch_size=batch_size,
            vram_limit=vram_limit,
            net=net,
            target_size=target_size,
            **base,
        )

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check ``net`` and ``target_size``."""
        net, target_size = options.get("net", "alex"), options.get("target_size", 512)
        if net not in NETS:
            raise ValueError(f"net must be one of {', '.join(NETS)}, got {net!r}")
        if isinstance(target_size, bool) or not isinstance(target_size, int) or target_size < 1:
            raise ValueError(f"target_size must be a positive int, got {target_size!r}")

    @classmethod
    def read_config(cls, model_config: ModelConfig | None, files: Sequence[Path]) -> dict[str, Any]:
        """Return which network the files hold, by the names of their tensors."""
        layout = read_layout(files)
        net = "squeeze" if "lin6.model.1.weight" in layout else "alex"
        return {"net": "vgg" if "net.slice1.2.weight" in layout else net}

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> LPIPSNetwork:
        """Build the network, see :meth:`BaseMetric.build`."""
        with torch.device("meta"):
            return LPIPSNetwork("alex" if config is None else config["net"])

    @classmethod
    def assemble(cls, model: Any, processor: Any, *, batch_size: int | None, **options: Any) -> Self:
        """Make the metric of its loaded parts."""
        net = options.get("net", "alex")
        if model.name != net:
            raise CheckpointError(f"Pass net={model.name!r}: the weights are not those of net={net!r}")
        return super().assemble(model, processor, batch_size=batch_size, **options)

    def components(self, reference: ImagesInput, images: ImagesInput) -> dict[str, Tensor]:
        """Compute ``"score"``, the distance; gradients flow to both sides."""
        references, checked = pair_references(reference, images)
        return {"score": torch.cat([self.model(*pair) for pair in self._batches(references, checked)])}

    def _batches(
        self, references: CheckedImages, images: CheckedImages
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels of both sides, ``[B, 3, H, W]`` in -1..1, whose pairs follow one another."""
        pending: list[list[Tensor]] = []
        for pair in self._pairs(references, images):
            other_size = pending and pending[0][0].shape != pair[0].shape
            if pending and (other_size or len(pending) == self.batch_size):
                yield _stacked(pending)
                pending = []
            pending.append(pair)
        yield _stacked(pending)

    def _pairs(self, references: CheckedImages, images: CheckedImages) -> Iterator[list[Tensor]]:
        """Yield the pixels of each pair, ``[3, H, W]`` each, decoded ahead by threads."""

        def sides(index: int) -> list[tuple[CheckedImage, str]]:
            return [(references[index], f"reference {index}"), (images[index], f"image {index}")]

        def prepare(index: int) -> tuple[Transform, list[Tensor]]:
            one, other = (image_size(*side) for side in sides(index))
            transform = self.unresized if one == other else self.transform
            return transform, [_bytes(*side, transform) for side in sides(index)]

        def pixels(index: int) -> int:
            return sum(pixel_count(image) for image, _ in sides(index) if not isinstance(image, Tensor))

        pairs = prepare_ahead(
            range(len(images)),
            prepare,
            pixels,
            workers=min(cpu_count(), len(images)),
            ahead=2 * self.batch_size,
        )
        for index, (transform, prepared) in enumerate(pairs):
            # Tensors are transformed here: the threads know nothing of the caller's gradients.
            yield [
                (tensor_pixels if isinstance(image, Tensor) else normalize_)(
                    side[None].to(self.device), transform
                )[0]
                for (image, _), side in zip(sides(index), prepared, strict=True)
            ]


def _bytes(image: CheckedImage, name: str, transform: Transform) -> Tensor:
    """Return what the transform makes of a picture, and a tensor as it is."""
    return image if isinstance(image, Tensor) else transform.from_pil(open_image(image, name))


def _stacked(pairs: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = (torch.stack(side) for side in zip(*pairs, strict=True))
    return first, second
