"""Which files a metric loads: its weights, the config beside them, its processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_metrics.errors import CheckpointError, DownloadError
from diffsynth_metrics.weights.checkpoint import check_owner, is_published, read_config, weight_files
from diffsynth_metrics.weights.listing import sha256_of
from diffsynth_metrics.weights.model_config import ModelConfig

if TYPE_CHECKING:
    from diffsynth_metrics.base import BaseMetric

__all__ = ["find_config", "find_processor", "find_weights", "sha256_of"]


def find_weights(metric: type[BaseMetric], model_config: ModelConfig) -> list[Path]:
    """Return the local weight files, which are not another metric's."""
    files = weight_files(model_config.resolve())
    check_owner(files, metric)
    return files


def find_config(
    metric: type[BaseMetric], model_config: ModelConfig, files: Sequence[Path]
) -> dict[str, Any] | None:
    """Return the config next to the weights, or None where the published architecture holds.

    Weights of an unknown layout that came from a repository without their config are asked for it there.
    """
    name = metric.config_file
    if name is None:
        return None
    config = read_config(files, name)
    if config is None and model_config.model_id and not is_published(files):
        first = model_config.origin_file_pattern or ""
        folder = (first if isinstance(first, str) else first[0]).rpartition("/")[0]
        try:
            replace(model_config, origin_file_pattern=f"{folder}/{name}".lstrip("/")).resolve()
        except DownloadError:
            return None  # the comparison with the published layout will say what is wrong
        config = read_config(files, name)
    return config


def find_processor(
    metric: type[BaseMetric],
    model_config: ModelConfig,
    processor_config: ModelConfig | None,
    files: Sequence[Path],
) -> Path:
    """Return the folder of the processor's files.

    Without a `processor_config`, a folder of weights that holds processor files serves itself, and any
    other weights are used with the metric's own processor, found where they are found.

    Raises:
        CheckpointError: The files hold no tokenizer.
        DownloadError: They could not be had.
    """
    if processor_config is None and model_config.path is not None:
        folder = files[0].parent
        if any((folder / name).is_file() for name in metric.processor_files):
            return folder
    processor = processor_config
    if processor is None:
        assert metric.default_processor is not None
        processor = replace(
            metric.default_processor,
            local_model_path=model_config.local_model_path,
            skip_download=model_config.skip_download,
        )
        if model_config.model_id == metric.default_processor.model_id:
            processor = replace(
                processor,
                download_source=model_config.download_source,
                revision=model_config.revision,
            )
    try:
        paths = [Path(path) for path in processor.resolve(sufficient=metric.processor_files)]
    except DownloadError as error:
        if processor_config is not None or model_config.path is None:
            raise
        raise DownloadError(
            f"Put {' or '.join(metric.processor_files)} beside {files[0]}, or pass "
            f"processor_config: there is none there, and the published one could not be had.\n{error}"
        ) from None
    for path in paths:
        if path.name in metric.processor_files:
            return path.parent
    raise CheckpointError(
        f"there is no tokenizer ({' or '.join(metric.processor_files)}) among the processor's files "
        f"{', '.join(sorted(path.name for path in paths))}"
    )
