"""What lies on disk becomes samples: pictures with their prompts, whatever the layout.

The data, and the two ways in. How each layout is recognised and read is in layouts.py, and docs/data.md
shows them all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from diffsynth_metrics.inputs import ImageInput

__all__ = ["PackedImage", "Problem", "Sample", "SampleSet", "open_reference", "read_samples"]


@dataclass(frozen=True)
class PackedImage:
    """A picture inside another file: a member of a tar shard, or a cell of a parquet file.

    It is read when it is used, and every metric takes it as an image.

    Attributes:
        file: The shard.
        member: What it is called there: a tar member's name, or a parquet cell such as ``"image[17]"``.
    """

    file: Path
    member: str

    def read(self) -> bytes:
        """Return the encoded picture.

        Raises:
            FileNotFoundError: The shard, or its member, is not there.
            ValueError: The shard is damaged.
        """
        from diffsynth_metrics.evaluation.shards import read_packed

        return read_packed(self.file, self.member)

    def seekable(self) -> bool:
        """Say what metrics ask of file objects: :meth:`read` always begins at the beginning."""
        return False

    @property
    def name(self) -> str:
        """How error messages call it."""
        return str(self)

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
        kind: What :func:`read_samples` finds is ``"missing"`` (a picture that should be there),
            ``"no prompt"``, ``"markup"`` (a prompt in a program's own notation), ``"duplicate"`` (a name
            that occurs twice), ``"ambiguous"`` (two prompts, of which one was taken) and ``"unused"`` (a
            file that no sample uses). ``check`` adds ``"corrupt"``, ``"identical"``, ``"cut"``, and what
            a metric needs and the samples do not have.
        file: The file, or the row of a manifest.
        message: What is wrong, in words.
    """

    kind: str
    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.message}"


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
        """Keep samples that were made in another way than by :func:`read_samples`, with their ids."""
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

    def __repr__(self) -> str:
        """Show how many there are, and as what they were read."""
        problems = f", {len(self.problems)} problems" if self.problems else ""
        return f"SampleSet({len(self)} samples{problems}; {self.layout}: {self.reason})"


def read_samples(
    source: str | os.PathLike[str],
    *,
    layout: str | None = None,
    prompts: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
) -> SampleSet:
    """Read pictures and prompts from a manifest, shards or a folder. No picture is opened.

    Args:
        source: A manifest (.csv, .tsv, .json, .jsonl, .parquet), a .tar shard, or a folder.
        layout: One of :data:`diffsynth_metrics.evaluation.layouts.NAMES`; None finds it.
        prompts: For a folder of pictures without prompts: a file with the prompts, by index or by name;
            for HPDv2 the folder of the ``STYLE.json`` files.
        columns: For manifests whose columns have other than the usual names: ``{"image": "picture"}``.
            Keys are image, prompt, id, prompt_id, seed, category and source.
        allow_outside: Whether a manifest may name files outside its own folder.

    Returns:
        The samples, sorted as the manifest or by name, with the layout, the reason why it was taken, and
        the problems. Their ids differ. A sample whose picture is not there is one of them.

    Raises:
        FileNotFoundError: The source or the prompts are not there.
        ValueError: No layout fits, or several do; a manifest cannot be read, or names a file outside its
            folder; the message names the file and the row.
        TypeError: `columns` is no dict.
        ImportError: A parquet file is to be read, and pyarrow is not installed.
    """
    from diffsynth_metrics.evaluation.layouts import choose_layout, open_source

    opened = open_source(source, prompts, columns, allow_outside)
    chosen, reason = choose_layout(opened, layout)
    if columns and chosen.name not in ("manifest", "imagefolder", "parquet"):
        raise ValueError(f"columns= goes with tables, and {opened.path} is read as {chosen.name!r}")
    reading = chosen.read(opened)
    samples, problems = reading.finish(opened)
    return SampleSet(
        samples,
        source=str(opened.path),
        layout=chosen.name,
        reason="; ".join([reason, *reading.details]),
        problems=problems,
    )


def open_reference(reference: str) -> Path | PackedImage:
    """Return the picture that ``str(sample.image)`` of a row names."""
    packed = re.fullmatch(r"(.+?\.(?:tar|parquet))::(.+)", reference, re.DOTALL)
    if packed and not os.path.exists(reference):
        return PackedImage(Path(packed[1]), packed[2])
    return Path(reference)
