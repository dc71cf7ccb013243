"""The contract that every metric keeps, the one way to load it, and the card that says what it means.

A metric says how its network is built (:meth:`BaseMetric.build`) and what it computes
(:meth:`PromptMetric.components`); loading, devices, dtypes, grad mode and the verbs are here, once.
"""

from __future__ import annotations

import inspect
import math
import os
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, replace
from functools import wraps
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from diffsynth_metrics.drop_in import DropIn, name_arguments, take_neutral
from diffsynth_metrics.embedded import SHAPES_CARD
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.inputs import CheckedImages, ImageInput, ImagesInput
from diffsynth_metrics.modes import in_its_own_modes
from diffsynth_metrics.networks.gradient_checkpointing import checkpoint_blocks
from diffsynth_metrics.pixels.batches import pixel_batches
from diffsynth_metrics.pixels.transforms import Transform
from diffsynth_metrics.weights.checkpoint import (
    blamed,
    check_sizes,
    find_non_finite,
    is_published,
    load_weights,
)
from diffsynth_metrics.weights.files import find_config, find_processor, find_weights, sha256_of
from diffsynth_metrics.weights.model_config import ModelConfig
from diffsynth_metrics.weights.placement import (
    DeviceMap,
    check_device_map,
    choose_device,
    choose_dtype,
    dispatch,
)

__all__ = [
    "BaseMetric",
    "ImageMetric",
    "Metric",
    "MetricCard",
    "PromptMetric",
    "ReferenceMetric",
    "RowMetric",
    "SetMetric",
    "check_batch_size",
    "one_source",
    "rows_of_pairs",
]

_BATCH_SIZE_ON_CPU = 4
_SHAPES = Path(__file__).parent / "embedded" / "shapes"

_Inputs = ParamSpec("_Inputs")
_Result = TypeVar("_Result")
_Batch = TypeVar("_Batch", bound=Sized)


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
        good_for: What to use it for, in one short phrase.
        download: Size of the published weight files: the elements of the published layout (names and
            shapes) in the official dtype. The files of tokenizer and processor add a few MB.
        memory: What the weights take in memory in the official dtype; pictures and activations come on
            top.
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
    good_for: str = ""
    download: str = ""
    memory: str = ""

    def _repr_html_(self) -> str:
        """Show the card as a table in a notebook."""
        rows = "".join(
            f'<tr><th style="text-align:left">{field.name.replace("_", " ")}</th>'
            f'<td style="text-align:left">{escape(_words(getattr(self, field.name)))}</td></tr>'
            for field in fields(self)
        )
        return f"<table>{rows}</table>"


class _MetricType(ABCMeta):
    """Says how a metric is loaded to whom calls its class without a network."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        try:
            return super().__call__(*arguments, **options)
        except TypeError:
            if arguments or options:
                raise
            raise TypeError(f"load a metric with {cls.__name__}.from_pretrained()") from None


class BaseMetric(DropIn, ABC, metaclass=_MetricType):
    """A metric: load it with :meth:`from_pretrained`, then ask for scores.

    It owns its network in ``.model``, the library's own module, and is not a Module itself, so a trainer
    that holds a metric does not register, move or save its weights. One object can be called from
    several threads.
    """

    model: Any
    transform: Transform
    """How pictures become pixels, for metrics that use :meth:`pixel_batches`."""
    card: MetricCard
    default_model: ModelConfig | None
    """Where the published weights are; None: the metric has no weights, and :meth:`build` is all."""
    variant: ClassVar[str | None] = None
    """Name of the option that chooses among several published networks, such as LPIPS's ``net``."""
    variants: ClassVar[Mapping[str, ModelConfig]] = {}
    """The values of that option, the default first, to where the published weights are."""
    default_processor: ModelConfig | None = None
    """Patterns end with ``*.[jt]*``: .json, .jinja and .txt files, and not the weights beside them."""
    processor_files: ClassVar[tuple[str, ...]] = ()
    """File names any one of which says that a folder holds the metric's processor; none: it has none."""
    config_file: ClassVar[str | None] = "config.json"
    """Name of the file next to the weights that gives the architecture; None: there is one only."""
    official_dtype: ClassVar[torch.dtype] = torch.float32
    float32_parts: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the names of weights that stay in float32 where the network's dtype is narrower."""
    unused_weights: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that the files hold and the network does without."""
    default_batch_size: ClassVar[int] = 16
    supports_device_map: ClassVar[bool] = False
    has_scored = False
    """Whether a first score has been looked at, whose being no number would show broken weights."""
    positional: ClassVar[tuple[str, ...]] = ("processor_kwargs", "vram_limit")
    """Names of the arguments of :meth:`from_pretrained` behind `device`, in upstream's order."""
    neutral: ClassVar[Mapping[str, Any]] = {"vram_limit": None}
    """Arguments of upstream that only their default is accepted of."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What :meth:`arguments` takes besides images: ``"prompt"``, ``"source"``."""

    def __init__(
        self, model: nn.Module, processor: Any = None, *, batch_size: int | None = None
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`.

        Args:
            model: The network, in evaluation mode.
            processor: What :meth:`load_processor` returned.
            batch_size: The largest number of images or prompts in the network at once; None chooses.
        """
        if not isinstance(model, nn.Module):
            name = type(self).__name__
            raise TypeError(
                f"load a metric with {name}.from_pretrained(ModelConfig(path=...)); {name} itself "
                f"wraps a loaded network, got {type(model).__name__}"
            )
        self.model = model
        self.processor = processor
        self._batch_size = None if batch_size is None else check_batch_size(batch_size)
        self.weight_files: tuple[Path, ...] = ()
        self.options: dict[str, Any] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Let every ``components`` set its own grad mode."""
        super().__init_subclass__(**options)
        if "components" in cls.__dict__:
            cls.components = in_its_own_modes(cls.__dict__["components"])  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(
        cls,
        model_config: ModelConfig | None = None,
        processor_config: ModelConfig | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        *more: Any,
        batch_size: int | None = None,
        device_map: DeviceMap | None = None,
        gradient_checkpointing: bool = False,
        check_finite: bool = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Load the metric. Everything has a working default.

        Args:
            model_config: Where the weights are; the published ones by default. A ``config.json`` next to
                them gives the architecture, otherwise it is the published one.
            processor_config: Where the tokenizer or processor is; by default next to local weights, else
                the published one. Metrics that need none accept it.
            torch_dtype: Dtype of the towers; by default the dtype in which the authors run the network.
                Heads, norms of features and scores are float32 in any case.
            device: Any torch device; the best that torch reports by default.
            *more: The arguments that follow in ``diffsynth.metrics``, in its order.
            batch_size: The largest number of images or prompts in the network at once. It bounds memory
                and does not change scores. None chooses: 4 on a CPU, the metric's default elsewhere.
            device_map: Instead of `device`, several: ``"auto"``, ``"balanced"``, ``"sequential"``, or
                names of modules to devices. For HPSv3 and the judges.
            gradient_checkpointing: Whether :meth:`reward` computes the towers' blocks again on the way
                back, which takes less memory and more time. Scores and gradients are the same.
            check_finite: Whether NaN and infinity are looked for in the weights, which reads all of
                them. Without it, a first score that is no number is looked into.
            processor_kwargs: Passed on to the ``from_pretrained`` of the tokenizer or processor.
            **options: The metric's own options, see its class.

        Raises:
            CheckpointError: The files do not hold this metric's weights.
            DownloadError: The files could not be had.
            TypeError: An argument is of the wrong type, or there is no such argument.
            ValueError: An argument is out of its range, or the metric has no weights to choose.
            RuntimeError: torch does not know the device, or it is not there.
        """
        # Whatever is wrong with the arguments is said before gigabytes are fetched.
        if processor_kwargs is not None:
            options["processor_kwargs"] = processor_kwargs
        options = name_arguments(cls.positional, more, options, owner=cls.__name__)
        take_neutral(options, cls.neutral, owner=cls.__name__)
        if "processor_config" in options and processor_config is not None:
            raise TypeError("tokenizer_config and processor_config name the same files: pass one")
        processor_config = options.pop("processor_config", processor_config)
        processor_kwargs = _check_processor_kwargs(cls, options.pop("processor_kwargs", None))
        for config in (model_config, processor_config):
            if config is not None and not isinstance(config, ModelConfig):
                raise TypeError(
                    f"a config must be a ModelConfig, got {config!r}; write ModelConfig(path=...), "
                    "ModelConfig(model_id=..., origin_file_pattern=...) or ModelConfig.embedded(name), "
                    "and device=... and torch_dtype=... by name"
                )
        if batch_size is not None:
            check_batch_size(batch_size)
        _check_options(cls, options)
        cls.check_options(**options)
        weights = cls._weights_config(model_config, options)
        if device is not None and device_map is not None:
            raise ValueError("pass either device or device_map")
        if device_map is not None and not cls.supports_device_map:
            raise ValueError(f"{cls.__name__} runs on one device: pass device instead of device_map")
        check_device_map(device_map)
        first = choose_device(device)
        dtype = choose_dtype(torch_dtype, cls.official_dtype)

        files = [] if weights is None else find_weights(cls, weights)
        folder = None
        if cls.processor_files and weights is not None:
            folder = find_processor(cls, weights, processor_config, files)
        # Buffers that are computed belong in memory and in no caller's inference mode.
        with torch.device("cpu"), torch.inference_mode(False):
            # Mapped from the files on the CPU, where they are not copied, before they are spread.
            loaded_on = first if device_map is None else torch.device("cpu")
            network = cls._load_network(weights, files, loaded_on, dtype, check_finite=check_finite)
            model = cls.finish(network, dtype)
            # Now that they are known to be this metric's: of other files a variant means nothing.
            cls._check_variant(files, options)
            if gradient_checkpointing:
                checkpoint_blocks(model)
            if device_map is not None:
                model = dispatch(model, device_map, dtype)
            processor = None
            if folder is not None:
                # Wrong options of the caller are no damage of a file.
                with blamed(folder, passed=(TypeError,) if processor_kwargs else ()):
                    processor = cls.load_processor(folder, model, **processor_kwargs)
            metric = cls.assemble(model, processor, batch_size=batch_size, **options)
        metric.weight_files = tuple(files)
        metric.options = options
        metric.describe()
        return metric

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        """Build the network: parameters on the meta device, buffers that no file holds in memory.

        Args:
            config: The parsed ``config.json`` next to the weights; None: the published architecture. Of
                a metric with :attr:`variants` it also has the variant of the files, under the name of
                the option.

        Raises:
            CheckpointError: The config describes another kind of network.
        """
        raise NotImplementedError(f"{cls.__name__} does not say how its network is built")

    @classmethod
    def read_config(cls, model_config: ModelConfig, files: Sequence[Path]) -> dict[str, Any] | None:
        """Return the architecture that :meth:`build` gets."""
        config = find_config(cls, model_config, files)
        if cls.variant is None:
            return config
        return {**(config or {}), cls.variant: cls.variant_of(files)}

    @classmethod
    def variant_of(cls, files: Sequence[Path]) -> str:
        """Tell by the names of their tensors which of :attr:`variants` weight files hold."""
        raise NotImplementedError(f"{cls.__name__} does not say which variant weights are of")

    @classmethod
    def _weights_config(
        cls, model_config: ModelConfig | None, options: Mapping[str, Any]
    ) -> ModelConfig | None:
        """Return where the weights are, or None for a metric that has none.

        Raises:
            ValueError: It has none, and the caller says where they are.
        """
        if model_config is None and cls.variant is not None:
            return cls.variants[cls._chosen_variant(options)]
        if model_config is None:
            return cls.default_model
        # A class of a user's that has no default takes weights by path.
        if getattr(cls, "default_model", model_config) is None:
            raise ValueError(
                f"leave model_config out: {cls.__name__} loads no weights, got {model_config!r}"
            )
        return model_config

    @classmethod
    def _load_network(
        cls,
        weights: ModelConfig | None,
        files: Sequence[Path],
        device: torch.device,
        dtype: torch.dtype,
        *,
        check_finite: bool,
    ) -> nn.Module:
        """Build the network and load its weights, if it has any."""
        if weights is None:
            return cls.build(None).to(device).eval()
        path = files[0].parent / (cls.config_file or "config.json")
        with blamed(path):
            config = cls.read_config(weights, files)
        with blamed(path, config):
            check_sizes(config, files, path)
            model = cls.build(config)
        load_weights(
            model,
            files,
            metric=cls.__name__,
            device=device,
            dtype=dtype,
            float32=cls.float32_parts,
            unused=cls.unused_weights,
            config=cls.config_file,
            check_finite=check_finite,
        )
        return model

    @classmethod
    def _chosen_variant(cls, options: Mapping[str, Any]) -> str:
        """Return the value of the option that chooses a variant.

        Raises:
            ValueError: There is no such variant.
        """
        chosen: str = options.get(cls.variant or "", next(iter(cls.variants)))
        if chosen not in cls.variants:
            raise ValueError(f"{cls.variant} must be one of {', '.join(cls.variants)}; got {chosen!r}")
        return chosen

    @classmethod
    def _check_variant(cls, files: Sequence[Path], options: Mapping[str, Any]) -> None:
        if cls.variant is None:
            return
        found, chosen = cls.variant_of(files), cls._chosen_variant(options)
        if found != chosen:
            raise CheckpointError(
                f"Pass {cls.variant}={found!r}: the weights are not those of {cls.variant}={chosen!r}"
            )

    @classmethod
    def finish(cls, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Change a loaded network where a metric needs it; called again after a new dtype."""
        return model

    @classmethod
    def load_processor(cls, folder: Path, model: nn.Module, **processor_kwargs: Any) -> Any:
        """Load the tokenizer or processor of a folder, and check that it belongs to the network."""
        raise NotImplementedError(f"{cls.__name__} does not say how its processor is loaded")

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check the metric's own options before files are fetched; here the one of a variant."""
        if cls.variant is not None:
            cls._chosen_variant(options)

    @classmethod
    def assemble(
        cls, model: nn.Module, processor: Any, *, batch_size: int | None, **options: Any
    ) -> Self:
        """Make the metric of its loaded parts."""
        return cls(model, processor, batch_size=batch_size, **options)

    def describe(self) -> None:
        """Say in ``self.card`` what only the loaded files tell; called once."""
        if _SHAPES in {file.parent for file in self.weight_files}:
            self.card = replace(self.card, **SHAPES_CARD)
        elif self.weight_files and not is_published(self.weight_files):
            self.card = replace(self.card, name=f"{self.card.name}, unpublished weights")

    @property
    def batch_size(self) -> int:
        """The largest number of images or prompts in the network at once."""
        if self._batch_size is not None:
            return self._batch_size
        on_cpu = self.device.type == "cpu"
        return min(_BATCH_SIZE_ON_CPU, self.default_batch_size) if on_cpu else self.default_batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int | None) -> None:
        self._batch_size = None if batch_size is None else check_batch_size(batch_size)

    @property
    def device(self) -> torch.device:
        """The device of the network; the CPU for one that has no tensors."""
        first = next(chain(self.model.parameters(), self.model.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's towers; heads and scores are float32 or wider."""
        weights = {weight.dtype for weight in self.model.parameters()}
        dtypes: set[torch.dtype] = weights or {buffer.dtype for buffer in self.model.buffers()}
        return min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)

    def to(
        self,
        device: str | int | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> Self:
        """Move the network to a device, bring its towers to a dtype, and return the metric.

        What stays in float32 when the metric is loaded stays in float32 here. What a narrower dtype has
        rounded away does not come back: load the metric again for that.

        Raises:
            TypeError: `dtype` is none of a network.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if device is not None:
            self.model.to(torch.device(device), non_blocking=non_blocking)
        if dtype is not None and choose_dtype(dtype, dtype) != self.dtype:
            wide = torch.promote_types(dtype, torch.float32)
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    weight.data = weight.to(wide if name.startswith(self.float32_parts) else dtype)
            self.finish(self.model, dtype)
        return self

    def pixel_batches(self, images: CheckedImages) -> Iterator[Tensor]:
        """Yield the inputs of the network, prepared by ``self.transform``.

        Args:
            images: What :func:`~diffsynth_metrics.inputs.as_images` or ``pair`` returned.

        Yields:
            Normalised float pixels ``[B, 3, S, S]`` on the metric's device, B at most the batch size.
        """
        return pixel_batches(images, self.transform, batch_size=self.batch_size, device=self.device)

    def arguments(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageInput] | Tensor,
        sources: Sequence[Sequence[ImageInput]] = (),
    ) -> tuple[Any, ...]:
        """Arrange N samples as this metric's verbs take them, so that code can score with any metric.

        ``metric.evaluate(*metric.arguments(prompts, images, sources))``; what a metric does not need is
        left out.

        Args:
            prompts: N prompts.
            images: N images.
            sources: For each sample the images that it was made from, which a metric of edits or of
                pairs of images needs; one that does not need them is given none.

        Raises:
            TypeError: The metric compares sets, and does not score single samples.
            ValueError: The metric needs exactly one source image per sample, and there is none, or more.
        """
        taken: list[Any] = [prompts] if "prompt" in self.needs else []
        if "source" in self.needs:
            taken.append(one_source(self, sources, len(images)))
        return (*taken, images)

    def check_weights(self) -> None:
        """Look for the cause of a score that is not finite.

        Raises:
            CheckpointError: The weights hold NaN or infinity.
        """
        if broken := find_non_finite(self.model):
            files = ", ".join(map(str, self.weight_files)) or "the network"
            raise CheckpointError(
                f"Download the weights again: {files} holds NaN or infinity in {broken[0]}"
                + (f" and {len(broken) - 1} more tensors" if len(broken) > 1 else "")
                + ", so that scores are no numbers"
            )

    @property
    def provenance(self) -> dict[str, Any]:
        """What made a number: metric, versions, weights and settings, as plain values.

        ``"weights"`` is the sha256 of the weight files, or None for a network that was not loaded from
        files. It is that of the files as they are now.
        """
        from diffsynth_metrics import __version__

        return {
            "metric": type(self).__name__,
            "name": self.card.name,
            "version": __version__,
            "weights": sha256_of(self.weight_files) if self.weight_files else None,
            "weight_files": [os.fspath(file) for file in self.weight_files],
            "preprocessing": repr(getattr(self, "transform", None)),
            "options": {name: str(value) for name, value in self.options.items()},
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }

    def __repr__(self) -> str:
        """Show which metric it is and where it runs."""
        where = f"device={str(self.device)!r}, dtype={self.dtype}, batch_size={self.batch_size}"
        return f"{type(self).__name__}({self.card.name!r}, {where})"


def _explained(verb: Callable[_Inputs, _Result]) -> Callable[_Inputs, _Result]:
    """Let a verb that was called with other arguments say which it takes."""
    signature = inspect.signature(verb)

    @wraps(verb)
    def call(*inputs: _Inputs.args, **options: _Inputs.kwargs) -> _Result:
        try:
            signature.bind(*inputs, **options)
        except TypeError as error:
            unknown = [name for name in options if name not in signature.parameters]
            problem = f"there is no argument {unknown[0]!r}" if unknown else str(error)
            names = ", ".join(list(signature.parameters)[1:])
            raise TypeError(
                f"{verb.__name__} takes ({names}); several images are one list: {problem}"
            ) from None
        return verb(*inputs, **options)

    return call


class PromptMetric(BaseMetric):
    """A metric that scores pairs of a prompt and an image; it defines :meth:`components`."""

    needs = ("prompt",)

    @abstractmethod
    def components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        """Compute everything that the metric knows of pairs of prompts and images.

        Args:
            prompt: One prompt for all images, or as many prompts as images.
            images: One image or several, see :data:`diffsynth_metrics.inputs.ImagesInput`; one image
                that is in no list goes with every prompt.

        Returns:
            Name to tensor ``[N]``; ``"score"`` is one of them: float32 (float64 where the metric runs in
            float64) on the metric's device. Floats carry a graph to the pixels exactly when an image
            tensor requires one and the caller has gradients enabled; the weights never receive one.
        """

    @_explained
    def compute(self, prompt: str | Sequence[str], images: ImagesInput) -> list[float]:
        """Score pairs of prompts and images as the authors of the metric define it.

        Args:
            prompt: One prompt for all images, or as many prompts as images.
            images: One image or several: PIL images, paths, encoded bytes, arrays ``[H, W, 3]``, tensors
                ``[3, H, W]`` or ``[N, 3, H, W]`` (uint8 in 0..255 or float in 0..1).

        Returns:
            One float per pair.

        Raises:
            TypeError: An argument is not a prompt or an image.
            ValueError: The numbers of prompts and images differ, or there are none.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.
        """
        with torch.no_grad():
            return _floats(_one_each(self.components(prompt, images), images)["score"])

    @_explained
    def evaluate(self, prompt: str | Sequence[str], images: ImagesInput) -> list[dict[str, Any]]:
        """Score like :meth:`compute`, and return the :meth:`components` of each pair as plain values."""
        with torch.no_grad():
            return _rows(_one_each(self.components(prompt, images), images))

    @_explained
    def reward(self, prompt: str | Sequence[str], images: ImagesInput) -> Tensor:
        """Score like :meth:`compute`, as a tensor ``[N]`` for training, see :meth:`components`."""
        return _one_each(self.components(prompt, images), images)["score"]


class RowMetric(BaseMetric):
    """A metric of prompts and images that may say why a sample has no score; without gradients.

    It defines :meth:`evaluate`, whose rows have ``"score"``, None where there is none, and ``"error"``.
    The other verbs take the same arguments.
    """

    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    numbers: ClassVar[tuple[str, ...]] = ("score",)
    """What of a row is a number, or None."""

    @abstractmethod
    def evaluate(self, prompt: Any, images: Any, *asked: Any, **options: Any) -> list[dict[str, Any]]:
        """Return a row of plain values for each sample; a metric says which arguments it takes."""

    def _numbers(self, row: dict[str, Any]) -> dict[str, float | None]:
        """Return what :meth:`components` has of a row."""
        return {name: row[name] for name in self.numbers}

    def components(self, prompt: Any, images: Any, *asked: Any, **options: Any) -> dict[str, Tensor]:
        """Return the numbers of :meth:`evaluate`: float32 ``[N]``, NaN where there is none."""
        rows = [self._numbers(row) for row in self.evaluate(prompt, images, *asked, **options)]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [_or_nan(row.get(name)) for row in rows] for name in names}
        return {
            name: torch.tensor(column, dtype=torch.float32, device=self.device)
            for name, column in columns.items()
        }

    def compute(self, prompt: Any, images: Any, *asked: Any, **options: Any) -> list[Any]:
        """Return the ``"score"`` of :meth:`evaluate`: a number per sample, NaN where there is none.

        Where the score of a sample is several numbers, it is their list.
        """
        return [_or_nan(row["score"]) for row in self.evaluate(prompt, images, *asked, **options)]

    def reward(self, prompt: Any, images: Any, *asked: Any, **options: Any) -> Tensor:
        """Score like :meth:`compute`, as a tensor ``[N]``, without gradients."""
        return self.components(prompt, images, *asked, **options)["score"]

    def check_weights(self) -> None:
        """Do nothing: that a score is missing is no sign of broken weights."""


class ImageMetric(BaseMetric):
    """A metric that scores images alone; it defines :meth:`components`."""

    @abstractmethod
    def components(self, images: ImagesInput) -> dict[str, Tensor]:
        """Compute everything that the metric knows, as :meth:`PromptMetric.components` does."""

    @_explained
    def compute(self, images: ImagesInput) -> list[float]:
        """Score images as the authors of the metric define it.

        Args:
            images: One image or several, as :meth:`PromptMetric.compute` takes them.

        Returns:
            One float per image.

        Raises:
            TypeError: An argument is not an image.
            ValueError: There are no images.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.
        """
        with torch.no_grad():
            return _floats(_one_each(self.components(images), images)["score"])

    @_explained
    def evaluate(self, images: ImagesInput) -> list[dict[str, Any]]:
        """Score like :meth:`compute`, and return each image's :meth:`components` as plain values."""
        with torch.no_grad():
            return _rows(_one_each(self.components(images), images))

    @_explained
    def reward(self, images: ImagesInput) -> Tensor:
        """Score like :meth:`compute`, as a tensor ``[N]`` for training, see :meth:`components`."""
        return _one_each(self.components(images), images)["score"]


class ReferenceMetric(BaseMetric):
    """A metric that compares each image with a reference image; it defines :meth:`components`.

    ``reference`` and ``images`` are one image each, as many of both, one reference (not in a list) for
    several images, or two folders whose files are paired by their names without suffix.
    """

    needs = ("source",)

    @abstractmethod
    def components(self, reference: ImagesInput, images: ImagesInput) -> dict[str, Tensor]:
        """Compute everything that the metric knows of pairs of images.

        A metric begins with :func:`diffsynth_metrics.inputs.pair_references`, which checks and aligns
        both.

        Returns:
            See :meth:`PromptMetric.components`; gradients flow to both sides.
        """

    @_explained
    def compute(self, reference: ImagesInput, images: ImagesInput) -> list[float]:
        """Compare images with their references as the authors of the metric define it.

        Args:
            reference: One image or several, as :meth:`PromptMetric.compute` takes them, or a folder.
            images: As many images; or a folder, where `reference` is one.

        Returns:
            One float per pair; of folders, in the sorted order of the names.

        Raises:
            TypeError: An argument is not an image.
            ValueError: The numbers of images differ, or the files of two folders do not pair.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.
        """
        with torch.no_grad():
            return _floats(self.components(reference, images)["score"])

    @_explained
    def evaluate(self, reference: ImagesInput, images: ImagesInput) -> list[dict[str, Any]]:
        """Score like :meth:`compute`, and return the :meth:`components` of each pair as plain values."""
        with torch.no_grad():
            return _rows(self.components(reference, images))

    @_explained
    def reward(self, reference: ImagesInput, images: ImagesInput) -> Tensor:
        """Return the score as a tensor ``[N]`` for training: minus the score where lower is better.

        See :meth:`components` for gradients.
        """
        score = self.components(reference, images)["score"]
        return score if self.card.higher_is_better else -score


class SetMetric(BaseMetric):
    """A metric of two sets of images, such as FID; it defines :meth:`evaluate`."""

    def arguments(self, *samples: Any, **named: Any) -> tuple[Any, ...]:
        """Refuse single samples, see :meth:`BaseMetric.arguments`."""
        raise TypeError(f"{type(self).__name__} does not score single samples")

    @abstractmethod
    def evaluate(self, reference_images: Any, generated_images: Any, **options: Any) -> dict[str, Any]:
        """Compare two sets of images; ``"score"`` is the number of the metric."""

    def compute(self, reference_images: Any, generated_images: Any, **options: Any) -> float:
        """Return the ``"score"`` of :meth:`evaluate`, which takes the same arguments."""
        return float(self.evaluate(reference_images, generated_images, **options)["score"])


Metric = BaseMetric
"""The name that ``diffsynth.metrics`` gives to the base class."""


def rows_of_pairs(
    batches: Iterable[_Batch], images: int, count: int, batch_size: int
) -> Iterator[tuple[_Batch, slice]]:
    """Yield batches of encoded images with the pairs that each belongs to.

    Args:
        batches: What the network made of batches of images.
        images: The number of images: 1, which goes with all pairs, or `count`.
        count: The number of pairs.
        batch_size: The most pairs at once.

    Yields:
        A batch, and the slice of its pairs; a batch of one image may stand for all pairs of its slice.
    """
    done = 0
    for batch in batches:
        pairs = count if images == 1 else len(batch)
        for start in range(done, done + pairs, batch_size):
            yield batch, slice(start, min(start + batch_size, done + pairs))
        done += pairs


def one_source(
    metric: BaseMetric, sources: Sequence[Sequence[ImageInput]], count: int
) -> list[ImageInput]:
    """Return the source image of each of `count` samples.

    Raises:
        ValueError: A sample has none, or several; the message names the sample.
    """
    if not sources:
        sources = [()] * count
    for index, of_sample in enumerate(sources):
        if len(of_sample) != 1:
            raise ValueError(
                f"{type(metric).__name__} needs one source image per sample, and sample {index} has "
                f"{len(of_sample) or 'none'}"
            )
    return [of_sample[0] for of_sample in sources]


def check_batch_size(batch_size: int) -> int:
    """Return a batch size.

    Raises:
        ValueError: It is not a positive int.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
    return batch_size


def _check_processor_kwargs(
    metric: type[BaseMetric], processor_kwargs: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    if processor_kwargs is None:
        return {}
    if not isinstance(processor_kwargs, Mapping):
        raise TypeError(f"processor_kwargs must be a mapping, got {type(processor_kwargs).__name__}")
    if processor_kwargs and not metric.processor_files:
        raise TypeError(f"{metric.__name__} has no processor that processor_kwargs could change")
    if "local_files_only" in processor_kwargs:
        raise TypeError(
            "processor_kwargs may not have local_files_only: the processor's files are always local by "
            "then; ModelConfig(skip_download=True) is what forbids downloads"
        )
    return processor_kwargs


def _check_options(metric: type[BaseMetric], options: Mapping[str, Any]) -> None:
    """Refuse options that neither ``assemble`` nor an ``__init__`` of the metric takes by keyword."""
    parameters = inspect.signature(metric.assemble).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    for kind in metric.__mro__:
        if (init := kind.__dict__.get("__init__")) is not None:
            parameters = inspect.signature(init).parameters.values()
            known += [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
            if not any(one.kind is one.VAR_KEYWORD for one in parameters):
                break
    if unknown := sorted(options.keys() - set(known)):
        known = sorted({*known, "batch_size", "check_finite", "device", "device_map", "torch_dtype"})
        raise TypeError(
            f"{metric.__name__}.from_pretrained has no argument {unknown[0]!r}; it has model_config, "
            f"processor_config, processor_kwargs, gradient_checkpointing, {', '.join(known)}"
        )


def _words(value: str | bool) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def _or_nan(score: Any) -> Any:
    """Return a score, NaN where it is None; of a list, each of its numbers."""
    if isinstance(score, list):
        return [_or_nan(number) for number in score]
    return math.nan if score is None else score


def _one_each(components: dict[str, Tensor], images: ImagesInput) -> dict[str, Tensor]:
    """Check that a metric, which may be a user's, gave one score per image.

    Raises:
        RuntimeError: It did not.
    """
    several = len(images) if isinstance(images, (list, tuple)) else 1
    score = components["score"]
    if score.ndim != 1 or (several > 1 and len(score) != several):
        raise RuntimeError(
            "components must return tensors [N], one score per image, and begin with as_images or pair "
            f"of diffsynth_metrics.inputs: got shape {list(score.shape)} for {several} images"
        )
    return components


def _floats(values: Tensor) -> list[float]:
    return [float(value) for value in values.tolist()]


def _rows(components: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Turn columns ``[N]`` into N dicts of plain values."""
    columns = {name: values.tolist() for name, values in components.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
