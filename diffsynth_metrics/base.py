"""The contract that every metric keeps, and the card that says what its score means."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from diffsynth_metrics.errors import CheckpointError, DownloadError
from diffsynth_metrics.inputs import CheckedImages, ImagesInput, SharedImages
from diffsynth_metrics.pixels.batches import pixel_batches
from diffsynth_metrics.pixels.transforms import Transform
from diffsynth_metrics.weights.checkpoint import check_owner, is_published, read_config, weight_files
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = [
    "BaseMetric",
    "ImageMetric",
    "Metric",
    "MetricCard",
    "PromptMetric",
    "check_batch_size",
    "check_loading",
    "check_max_length",
    "choose_device",
    "choose_dtype",
    "plain_modes",
    "wants_gradients",
    "weights_of",
]


@dataclass(frozen=True)
class MetricCard:
    """What a score means.

    Attributes:
        name: The field's name of the metric.
        inputs: What one score is computed from.
        range: The values to expect of real pictures, in words.
        higher_is_better: The direction of the score.
        definition: The formula.
        paper: Where the metric was published.
        repository: The official implementation.
        code_license: Licence of the official implementation.
        weights_license: Licence of the weights, as far as it is declared.
        notes: What to know before comparing numbers.
    """

    name: str
    inputs: str
    range: str
    higher_is_better: bool
    definition: str
    paper: str
    repository: str
    code_license: str
    weights_license: str
    notes: str = ""


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# On a CPU, activations of more than 32 MB are mapped afresh, zeroed and given back for every operation
# (glibc's largest malloc threshold), unless the process happens to hold as much freed memory. Those of
# four images in a ViT-H/14 are 21 MB. Six are no faster and have more memory given back; three make
# slower products. A pass of a small network has a cost of its own, and nothing to gain.
_IMAGES_AT_ONCE_ON_CPU = 4
_LARGE_NETWORK = 50_000_000
_LARGEST_THRESHOLD = 32 * 2**20


class BaseMetric(ABC):
    """A metric: load it with :meth:`from_pretrained`, then ask for scores.

    It owns its network in ``.model`` and is not a Module itself, so a trainer that holds a metric does
    not register, move or save its weights. One object can be called from several threads.

    A metric declares its card and its default files, loads its network and computes the components
    of a score; the verbs (see :class:`PromptMetric` and :class:`ImageMetric`), grad mode, autocast and
    devices are handled here, once.
    """

    card: ClassVar[MetricCard]
    default_model: ClassVar[ModelConfig]
    default_processor: ClassVar[ModelConfig]
    """Patterns end with ``*.[jt]*``: .json, .jinja and .txt files, and not the weights beside them."""
    processor_files: ClassVar[tuple[str, ...]] = ()
    """File names any one of which says that a folder holds the metric's processor."""

    def __init__(self, model: nn.Module, *, batch_size: int) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        check_batch_size(batch_size)
        self._network = model
        self.batch_size = batch_size
        self._is_large = sum(weight.numel() for weight in model.parameters()) > _LARGE_NETWORK
        if self._is_large:
            _let_freed_memory_be_kept()

    if TYPE_CHECKING:
        # Metrics say what network it is, which they could not of a property.
        model: nn.Module
        _network: nn.Module
    else:

        @property
        def model(self) -> nn.Module:
            """The network."""
            return self._network

        @model.setter
        def model(self, network: nn.Module) -> None:
            self._network = network

    def to(self, device: str | torch.device) -> Self:
        """Move the network to a device and return the metric."""
        self._network.to(torch.device(device))
        return self

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self._network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's towers; heads and scores are float32 or wider."""
        dtypes = {weight.dtype for weight in weights_of(self._network)}
        return min(dtypes, key=lambda dtype: dtype.itemsize)

    def _pixel_batches(self, images: CheckedImages, transform: Transform) -> Iterator[Tensor]:
        """Yield normalised pixels ``[B, 3, S, S]`` as the network gets them, B at most `batch_size`."""
        device = self.device
        by_few = self._is_large and device.type == "cpu"
        at_once = _IMAGES_AT_ONCE_ON_CPU if by_few else self.batch_size
        for batch in pixel_batches(images, transform, batch_size=self.batch_size, device=device):
            yield from torch.tensor_split(batch, math.ceil(len(batch) / at_once))

    def __repr__(self) -> str:
        """Show the class and where it runs."""
        return (
            f"{type(self).__name__}(device={str(self.device)!r}, dtype={self.dtype}, "
            f"batch_size={self.batch_size})"
        )

    def _scoring(self, *, gradients: bool) -> AbstractContextManager[Any]:
        """Set the grad mode and switch autocast off, for this thread and this call only."""
        device = self.device.type
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device):
            return plain_modes(device, gradients=gradients)
        # Not set_grad_enabled: it sets the mode when it is made, and under torch.compile that stayed.
        return torch.enable_grad() if gradients else torch.no_grad()

    @classmethod
    def _weights(cls, model_config: ModelConfig | None) -> list[Path]:
        """Return the local weight files, which are not another metric's."""
        files = weight_files((model_config or cls.default_model).resolve())
        check_owner(files, cls)
        return files

    @classmethod
    def _resolve(
        cls, model_config: ModelConfig | None, processor_config: ModelConfig | None
    ) -> tuple[list[Path], list[str]]:
        """Return the local weight files, and the paths of the processor's files.

        Without a `processor_config`, a folder of weights that holds processor files serves itself,
        and any other weights are used with the metric's own processor, found where they are found.
        """
        model_config = model_config or cls.default_model
        weights = cls._weights(model_config)
        if processor_config is None and model_config.path is not None:
            own = [str(file) for file in weights[0].parent.iterdir() if file.is_file()]
            if any(Path(file).name in cls.processor_files for file in own):
                return weights, own
        processor = processor_config
        if processor is None:
            processor = replace(
                cls.default_processor,
                local_model_path=model_config.local_model_path,
                skip_download=model_config.skip_download,
            )
            if model_config.model_id == cls.default_processor.model_id:
                processor = replace(
                    processor,
                    download_source=model_config.download_source,
                    revision=model_config.revision,
                )
        try:
            return weights, processor.resolve(sufficient=cls.processor_files)
        except DownloadError as error:
            if processor_config is not None or model_config.path is None:
                raise
            raise DownloadError(
                f"there is no {' or '.join(cls.processor_files)} beside {weights[0]}, and {error}"
            ) from error

    @classmethod
    def _architecture(
        cls, model_config: ModelConfig | None, files: Sequence[Path], name: str = "config.json"
    ) -> dict[str, Any] | None:
        """Return the config next to the weights, or None where the published architecture holds.

        Weights of an unknown layout that came from a repository without their config are asked for
        it there.
        """
        config = read_config(files, name)
        repository = model_config or cls.default_model
        if config is None and repository.model_id and not is_published(files):
            first = repository.origin_file_pattern or ""
            folder = (first if isinstance(first, str) else first[0]).rpartition("/")[0]
            try:
                replace(repository, origin_file_pattern=f"{folder}/{name}".lstrip("/")).resolve()
            except DownloadError:
                return None  # the comparison with the published layout will say what is wrong
            config = read_config(files, name)
        return config

    @classmethod
    def _processor_folder(cls, paths: list[str]) -> Path:
        """Return the folder of the processor's files among `paths`."""
        for path in map(Path, paths):
            if path.name in cls.processor_files:
                return path.parent
        raise CheckpointError(
            f"there is no tokenizer ({' or '.join(cls.processor_files)}) among the processor's files "
            f"{', '.join(sorted(Path(path).name for path in paths))}"
        )


class PromptMetric(BaseMetric):
    """A metric that scores pairs of a prompt and an image."""

    @abstractmethod
    def _components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        """Return everything that :meth:`evaluate` shows, as tensors ``[N]``; one is ``"score"``.

        Called with the grad mode that the verb wants, and without autocast.
        """

    def compute(self, prompt: str | Sequence[str], images: ImagesInput) -> list[float]:
        """Score pairs of prompts and images as the authors of the metric define it.

        Args:
            prompt: One prompt for all images, or as many prompts as images.
            images: One image or several: PIL images, paths, uint8 arrays ``[H, W, 3]``, tensors
                ``[3, H, W]`` or ``[N, 3, H, W]`` (uint8 in 0..255 or float in 0..1).

        Returns:
            One float per pair.

        Raises:
            TypeError: An argument is not a prompt or an image.
            ValueError: The numbers of prompts and images differ, or there are none.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.
        """
        with self._scoring(gradients=False):
            return _floats(self._components(prompt, images)["score"])

    def evaluate(self, prompt: str | Sequence[str], images: ImagesInput) -> list[dict[str, float]]:
        """Score like :meth:`compute`, and return each pair's components with its ``"score"``."""
        with self._scoring(gradients=False):
            return _rows(self._components(prompt, images))

    def reward(self, prompt: str | Sequence[str], images: ImagesInput) -> Tensor:
        """Score like :meth:`compute`, as a tensor for a training loop.

        Returns:
            float32 ``[N]`` on the metric's device (float64 where the metric runs in float64). It
            carries a graph to the pixels exactly when an image tensor requires a gradient and the
            caller has gradients enabled; the weights never receive one.
        """
        with self._scoring(gradients=wants_gradients(images)):
            return self._components(prompt, images)["score"]

    def score(self, prompt: str | Sequence[str], images: ImagesInput) -> list[float]:
        """Do the same as :meth:`compute`; the name that ``diffsynth.metrics`` uses."""
        return self.compute(prompt, images)

    def __call__(self, prompt: str | Sequence[str], images: ImagesInput) -> list[float]:
        """Do the same as :meth:`compute`."""
        return self.compute(prompt, images)


class ImageMetric(BaseMetric):
    """A metric that scores images alone."""

    @abstractmethod
    def _components(self, images: ImagesInput) -> dict[str, Tensor]:
        """Return everything that :meth:`evaluate` shows, as tensors ``[N]``; one is ``"score"``.

        Called with the grad mode that the verb wants, and without autocast.
        """

    def compute(self, images: ImagesInput) -> list[float]:
        """Score images as the authors of the metric define it.

        Args:
            images: One image or several: PIL images, paths, uint8 arrays ``[H, W, 3]``, tensors
                ``[3, H, W]`` or ``[N, 3, H, W]`` (uint8 in 0..255 or float in 0..1).

        Returns:
            One float per image.

        Raises:
            TypeError: An argument is not an image.
            ValueError: There are no images.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.
        """
        with self._scoring(gradients=False):
            return _floats(self._components(images)["score"])

    def evaluate(self, images: ImagesInput) -> list[dict[str, float]]:
        """Score like :meth:`compute`, and return each image's components with its ``"score"``."""
        with self._scoring(gradients=False):
            return _rows(self._components(images))

    def reward(self, images: ImagesInput) -> Tensor:
        """Score like :meth:`compute`, as a tensor for a training loop.

        Returns:
            float32 ``[N]`` on the metric's device (float64 where the metric runs in float64). It
            carries a graph to the pixels exactly when an image tensor requires a gradient and the
            caller has gradients enabled; the weights never receive one.
        """
        with self._scoring(gradients=wants_gradients(images)):
            return self._components(images)["score"]

    def score(self, images: ImagesInput) -> list[float]:
        """Do the same as :meth:`compute`; the name that ``diffsynth.metrics`` uses."""
        return self.compute(images)

    def __call__(self, images: ImagesInput) -> list[float]:
        """Do the same as :meth:`compute`."""
        return self.compute(images)


Metric = BaseMetric
"""The name that ``diffsynth.metrics`` gives to the base class."""


def check_loading(
    *configs: ModelConfig | None,
    device: str | torch.device | None,
    torch_dtype: torch.dtype | None,
    batch_size: int,
    official: torch.dtype = torch.float32,
) -> tuple[torch.device, torch.dtype]:
    """Check what every ``from_pretrained`` takes, before gigabytes are fetched; return where it runs.

    Raises:
        TypeError: A config is not a ModelConfig, or the dtype is none of a network.
        ValueError: `batch_size` is not a positive int.
        RuntimeError: torch does not know the device, or it is not there.
    """
    for config in configs:
        if config is not None and not isinstance(config, ModelConfig):
            raise TypeError(
                f"a config must be a ModelConfig, got {config!r}; write ModelConfig(path=...) or "
                "ModelConfig(model_id=..., origin_file_pattern=...)"
            )
    check_batch_size(batch_size)
    return choose_device(device), choose_dtype(torch_dtype, official)


def check_batch_size(batch_size: int) -> int:
    """Return a batch size.

    Raises:
        ValueError: It is not a positive int.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
    return batch_size


def check_max_length(max_length: int) -> None:
    """Check that a number of tokens leaves room for a prompt between its begin and its end.

    Raises:
        ValueError: It is not an int of at least 3.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 3:
        raise ValueError(f"max_length must be an int of at least 3, got {max_length!r}")


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device, or for None the best one that torch reports.

    Raises:
        RuntimeError: torch does not know the device, or it is not there.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:  # each torch's, by backend
            raise RuntimeError(f"the device {str(device)!r} cannot be used: {error}") from error
        return torch.device(device)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def choose_dtype(torch_dtype: torch.dtype | None, official: torch.dtype) -> torch.dtype:
    """Return the dtype of the towers, or for None the official one.

    Raises:
        TypeError: It is not a dtype that networks run in.
    """
    if torch_dtype is None:
        return official
    if torch_dtype not in _DTYPES:
        raise TypeError(
            f"torch_dtype must be one of {', '.join(map(str, _DTYPES))}, got {torch_dtype!r}"
        )
    return torch_dtype


@contextmanager
def plain_modes(device: str, *, gradients: bool) -> Iterator[None]:
    """Leave the caller's inference mode and autocast, and set the grad mode."""
    with (
        # Tensors made in inference mode could not be kept in a cache that a later call with gradients
        # reads, so a caller's inference mode is left for the duration of the call.
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        torch.autocast(device, enabled=False),
    ):
        yield


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Return all weights, as every call asks for them: without what ``parameters()`` keeps books of."""
    weights: list[nn.Parameter | None] = []
    modules: list[nn.Module | None] = [model]
    for module in modules:
        if module is not None:
            weights += module._parameters.values()
            modules += module._modules.values()
    return [weight for weight in weights if weight is not None]


def wants_gradients(images: ImagesInput) -> bool:
    """Tell whether the caller has gradients enabled and an image that requires one."""
    if not torch.is_grad_enabled():
        return False
    if isinstance(images, SharedImages):
        images = images.checked
    if isinstance(images, Tensor):
        return images.requires_grad
    return isinstance(images, Sequence) and any(
        isinstance(image, Tensor) and image.requires_grad for image in images
    )


def _let_freed_memory_be_kept() -> None:
    """Let glibc keep the memory of activations from one operation of a network to the next.

    It learns from what a program frees: from then on it serves blocks of up to that size, at most 32 MB,
    from memory that it keeps, of which it gives back what is above twice as much. A program that never
    freed a large block has every activation mapped and zeroed again.
    Nothing is written to this block, so it takes no memory; other allocators do not mind it.
    """
    torch.empty(_LARGEST_THRESHOLD - 2**16, dtype=torch.uint8, device="cpu")


def _floats(values: Tensor) -> list[float]:
    return [float(value) for value in values.tolist()]


def _rows(components: dict[str, Tensor]) -> list[dict[str, float]]:
    """Turn columns ``[N]`` into N dicts."""
    columns = {name: _floats(values) for name, values in components.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
