"""LPIPS: how different two pictures look to people, from the features of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from diffsynth_metrics.base import MetricCard, ReferenceMetric
from diffsynth_metrics.inputs import ImagesInput, pair_references
from diffsynth_metrics.networks.lpips import SMALLEST_SIDES, LPIPSNetwork
from diffsynth_metrics.pixels.pairs import pair_batches
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop, Unresized
from diffsynth_metrics.weights.checkpoint import read_layout
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["LPIPSMetric"]

_HALF = (0.5, 0.5, 0.5)  # brings pixels to -1..1


def _published(file: str) -> ModelConfig:
    return ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern=f"LPIPS/{file}.safetensors"
    )


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
    variant = "net"
    variants: ClassVar[dict[str, ModelConfig]] = {
        "alex": _published("alexnet"),
        "squeeze": _published("squeezenet"),
        "vgg": _published("vgg"),
    }
    default_model = variants["alex"]
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
        super().check_options(**options)
        target_size = options.get("target_size", 512)
        if isinstance(target_size, bool) or not isinstance(target_size, int) or target_size < 1:
            raise ValueError(f"target_size must be a positive int, got {target_size!r}")

    @classmethod
    def variant_of(cls, files: Sequence[Path]) -> str:
        """Tell whose features are in the files by the layers that only one network has."""
        layout = read_layout(files)
        if "lin6.model.1.weight" in layout:
            return "squeeze"
        return "vgg" if "net.slice1.2.weight" in layout else "alex"

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> LPIPSNetwork:
        """Build the network, see :meth:`BaseMetric.build`."""
        with torch.device("meta"):
            return LPIPSNetwork("alex" if config is None else config["net"])

    def components(self, reference: ImagesInput, images: ImagesInput) -> dict[str, Tensor]:
        """Compute ``"score"``, the distance; gradients flow to both sides.

        Raises:
            ImageError: A picture is smaller than the network can read: 31 pixels for ``"alex"``, 17 for
                ``"squeeze"``, 16 for ``"vgg"``. See also :meth:`ReferenceMetric.compute`.
        """
        pairs = pair_batches(
            *pair_references(reference, images),
            self.unresized,
            of_other_sizes=self.transform,
            smallest_side=SMALLEST_SIDES[self.net],
            batch_size=self.batch_size,
            device=self.device,
        )
        return {"score": torch.cat([self.model(*pair) for pair in pairs])}
