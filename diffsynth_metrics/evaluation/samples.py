"""What lies on disk becomes samples: pictures with their prompts, whatever the layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from diffsynth_metrics.inputs import ImageInput

__all__ = ["PackedImage", "Problem", "Sample", "SampleSet", "open_reference", "read_samples"]


@dataclass(frozen=True)
class PackedImage:
    """A picture inside another file: a member of a tar shard, or a cell of a parquet file.

    It has ``read()``, so every metric takes it as an image.

    Attributes:
        file: The shard.
        member: What it is called there.
    """

    file: Path
    member: str

    def read(self) -> bytes:
        """Return the encoded picture."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.file}::{self.member}"


@dataclass(frozen=True)
class Sample:
    """One picture to score.

    Attributes:
        id: Its name in the data set; the same in two data sets that are to be compared.
        prompt: The text it was made from, or the instruction of an edit; None where there is none.
        image: A path (which may not exist), a :class:`PackedImage`, or any image that a metric takes.
        sources: The pictures that it was made from, such as the source of an edit or a reference.
        prompt_id: What pictures of one prompt have in common; None: the prompt itself says it.
        seed: Which picture of its prompt it is, as the data says it.
        category: A group of prompts that is summarised apart.
    """

    id: str
    prompt: str | None
    image: ImageInput | PackedImage
    sources: tuple[ImageInput | PackedImage, ...] = ()
    prompt_id: str | None = None
    seed: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class Problem:
    """Something in a data set that its reader wants to be told.

    Attributes:
        kind: ``"missing"``, ``"unused"``, ``"duplicate"``, ``"no prompt"``, ...
        file: The file, or the row of a manifest.
        message: What is wrong, in words.
    """

    kind: str
    file: str
    message: str


class SampleSet(Sequence[Sample]):
    """The samples of a source, with how it was read.

    Attributes:
        source: Where they come from.
        layout: Name of the layout.
        reason: Why it was taken for that.
        problems: What was left out, is missing or is double; nothing is ignored in silence.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        source: str = "",
        layout: str = "list",
        reason: str = "",
        problems: Sequence[Problem] = (),
    ) -> None:
        self._samples = tuple(samples)
        self.source = source
        self.layout = layout
        self.reason = reason
        self.problems = tuple(problems)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> SampleSet: ...
    def __getitem__(self, index: int | slice) -> Sample | SampleSet:
        """Return a sample, or a part of the set that was read in the same way."""
        if isinstance(index, int):
            return self._samples[index]
        return SampleSet(
            self._samples[index],
            source=self.source,
            layout=self.layout,
            reason=self.reason,
            problems=self.problems,
        )


def read_samples(
    source: str | os.PathLike[str],
    *,
    layout: str | None = None,
    prompts: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
) -> SampleSet:
    """Read pictures and prompts from a manifest or a folder."""
    raise NotImplementedError


def open_reference(reference: str) -> Any:
    """Return the picture that ``str(sample.image)`` of a row names: a Path or a PackedImage."""
    raise NotImplementedError
