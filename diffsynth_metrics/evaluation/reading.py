"""The pictures of samples, each read once: what is hashed is what a metric gets."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from diffsynth_metrics.each_sample import OF_SAMPLES
from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.evaluation.fingerprint import bytes_of, readable, storable
from diffsynth_metrics.evaluation.run_folder import SAMPLES, table_of
from diffsynth_metrics.evaluation.samples import PackedImage, Sample
from diffsynth_metrics.evaluation.shards import file_stamp
from diffsynth_metrics.inputs import CheckedImage, ImageInput, as_images, open_image

__all__ = [
    "Content",
    "Item",
    "SampleReader",
    "image_name",
    "prompt_id",
    "read_image",
    "reference_of",
    "sample_row",
    "stamp_of",
]

_COARSEST_CLOCK = 2_000_000_000  # nanoseconds between two changes that a file system surely tells apart


@dataclass(frozen=True)
class Item:
    """A sample that was read.

    Attributes:
        sample: The sample.
        images: Its picture and, if they were asked for, its sources: bytes of a file, or pixels in
            memory; empty where one of them cannot be read.
        problem: Why not.
        image_sha256: Of its picture; empty where that cannot be read.
        sources_sha256: Of its sources, if they were asked for.
    """

    sample: Sample
    images: tuple[CheckedImage, ...]
    problem: Exception | None
    image_sha256: str
    sources_sha256: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many bytes were read for it."""
        return sum(len(image) for image in self.images if isinstance(image, bytes))


class Content(NamedTuple):
    """What the files of a sample were when they were read.

    Attributes:
        image: sha256 of its picture; None before it is read, empty where that failed.
        sources: sha256 of each of its sources, likewise.
        stamps: Of the picture and of each source that was read, see :func:`stamp_of`.
    """

    image: str | None
    sources: tuple[str, ...] | None
    stamps: tuple[str, ...]


class SampleReader:
    """Reads samples and remembers what their contents were.

    Attributes:
        samples: The samples.
        images_sha256: Of the picture of each sample; None before it is read, empty where that failed.
        sources_sha256: Of the sources of each sample, likewise.
        stamps: Of the files of each sample that were read, see :func:`stamp_of`.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        """Begin without having read anything."""
        self.samples = samples
        self.images_sha256: list[str | None] = [None] * len(samples)
        self.sources_sha256: list[tuple[str, ...] | None] = [None] * len(samples)
        self.stamps: list[tuple[str, ...]] = [()] * len(samples)

    def recall(self, before: pa.Table) -> None:
        """Take over the content of files that an earlier call has read and that are as they were.

        Args:
            before: What :meth:`table` returned then.
        """
        places = pc.index_in(self.described.column("id"), value_set=before.column("id"))
        known = ("image", "sources", "image_sha256", "sources_sha256", "stamps")
        now, then = _rows(self.described, known[:2]), _rows(before.take(places), known)
        for index, (files, (*files_then, digest, digests, stamps)) in enumerate(
            zip(now, then, strict=True)
        ):
            was_read = digest and all(digests or ()) and stamps and all(stamps)
            if not was_read or list(files) != files_then:
                continue
            sample = self.samples[index]
            images = (sample.image, *sample.sources)[: len(stamps)]
            if list(map(stamp_of, images)) == stamps:
                sources = None if digests is None else tuple(digests)
                self.learn(index, Content(digest, sources, tuple(stamps)))

    def read(self, index: int, *, sources: bool = False) -> Item:
        """Read a sample; what is wrong with its files is in the item."""
        sample = self.samples[index]
        wanted = [(image_name(sample), sample.image)]
        if sources:
            wanted += [(f"source {reference_of(image)}", image) for image in sample.sources]
        images: list[CheckedImage] = []
        digests: list[str] = []
        problem: Exception | None = None
        # Before they are read: a file that changes meanwhile has another stamp afterwards.
        stamps = tuple(stamp_of(image) for _, image in wanted)
        for name, image in wanted:
            try:
                contents, digest = read_image(image, name)
                images.append(contents)
            except OF_SAMPLES as error:
                problem, digest = problem or error, ""
            digests.append(digest)
        self.learn(index, Content(digests[0], tuple(digests[1:]) if sources else None, stamps))
        return Item(sample, () if problem else tuple(images), problem, digests[0], tuple(digests[1:]))

    def content(self, index: int) -> Content:
        """Return what is known of the content of a sample."""
        return Content(self.images_sha256[index], self.sources_sha256[index], self.stamps[index])

    def learn(self, index: int, content: Content) -> None:
        """Take what is known of the content of a sample."""
        self.images_sha256[index] = content.image
        if content.sources is not None:
            self.sources_sha256[index] = content.sources
        # Whoever has read the picture only does not change what is known of its sources.
        self.stamps[index] = content.stamps + self.stamps[index][len(content.stamps) :]

    def table(self) -> pa.Table:
        """Return the samples, with what is known of their contents."""
        contents = {
            "image_sha256": self.images_sha256,
            "sources_sha256": self.sources_sha256,
            "stamps": self.stamps,
        }
        table = self.described
        for name, values in contents.items():
            column = table.schema.get_field_index(name)
            table = table.set_column(
                column, SAMPLES.field(name), pa.array(values, SAMPLES.field(name).type)
            )
        return table

    @cached_property
    def described(self) -> pa.Table:
        """The samples, without what is known of their contents; samples do not change."""
        return pa.concat_tables(
            table_of([sample_row(self.samples[index]) for index in indices], SAMPLES)
            for indices in _blocks(len(self.samples))
        )


def _blocks(count: int) -> list[range]:
    """Divide indices into blocks: rows as dicts take much more memory than a table."""
    return [range(start, min(start + 4096, count)) for start in range(0, count, 4096)]


def _rows(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns, row by row."""
    for indices in _blocks(table.num_rows):
        block = table.slice(indices.start, len(indices))
        yield from zip(*(block.column(name).to_pylist() for name in names), strict=True)


def stamp_of(image: ImageInput | PackedImage) -> str:
    """Return what the file system says of a picture's file; a file that is written to gets another one.

    Returns:
        Size, times of change and number of the file, or of the shard that it lies in. Empty where there
        is none, and where it has changed so recently that the next change may have the same time.
    """
    if isinstance(image, PackedImage):
        image = image.file
    elif not isinstance(image, (str, Path)):
        return ""
    elif str(image).startswith("~") and not os.path.exists(image):
        image = os.path.expanduser(image)
    try:
        stamp = file_stamp(image)
    except (OSError, ValueError):
        return ""
    _, modified, changed, _ = stamp
    if time.time_ns() - max(modified, changed) < _COARSEST_CLOCK:
        return ""
    return " ".join(map(str, stamp))


def read_image(image: ImageInput | PackedImage, name: str) -> tuple[CheckedImage, str]:
    """Read a picture once: return what a metric gets, and the sha256 of exactly that.

    Args:
        image: The image of a sample.
        name: How an error calls it.

    Returns:
        The bytes of a file, or the image itself where it is pixels in memory; and a sha256 in hex.

    Raises:
        FileNotFoundError: There is no such file.
        ImageError: It cannot be read, or is not what a metric accepts.
        OSError: The file cannot be read.
        TypeError: It is no image.
    """
    if contents := _contents_of_file(image):
        return contents, _digest_of_image(contents, name)
    if isinstance(image, PackedImage):
        try:
            image = image.read()
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged archive raises nearly anything
            raise ImageError(f"{name} cannot be read: {str(error) or repr(error)}") from error
    try:
        checked = as_images([image])[0]
    except FileNotFoundError as error:  # it names the file
        raise FileNotFoundError(str(error).removeprefix("image 0: ")) from error
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("image 0", name, 1)) from error
    if isinstance(checked, Path):
        checked = checked.read_bytes()
    return checked, _digest_of_image(checked, name)


def _contents_of_file(image: Any) -> bytes:
    """Return what is in a file, quickly; nothing where anything about it needs a closer look."""
    if not isinstance(image, (str, Path)) or str(image).startswith("~"):
        return b""
    try:
        with open(image, "rb") as file:
            return file.read()
    except (OSError, ValueError):
        return b""


def image_name(sample: Sample) -> str:
    """Return how messages call the picture of a sample: by its file, else by the sample."""
    return reference_of(sample.image) or f"the picture of sample {sample.id!r}"


def reference_of(image: ImageInput | PackedImage) -> str:
    """Return what a row says of where a picture is; empty for pixels in memory."""
    if isinstance(image, (str, Path, PackedImage)):
        return str(image)
    return str(getattr(image, "filename", "") or "")


def sample_row(sample: Sample) -> dict[str, str | list[str] | None]:
    """Return what rows say of a sample."""
    texts = {
        "id": sample.id,
        "prompt_id": prompt_id(sample.prompt_id, sample.prompt, sample.id),
        "seed": sample.seed,
        "category": sample.category,
        "prompt": sample.prompt,
    }
    return {
        **{name: None if text is None else storable(str(text)) for name, text in texts.items()},
        "image": _absolute(sample.image),
        "sources": list(map(_absolute, sample.sources)),
    }


def _absolute(image: ImageInput | PackedImage) -> str:
    """Return a reference that names the same file from every folder."""
    if isinstance(image, PackedImage):
        image = PackedImage(image.file.absolute(), image.member)
        return readable(str(image))
    reference = reference_of(image)
    return readable(os.path.abspath(os.path.expanduser(reference))) if reference else ""


def prompt_id(prompt_id: str | None, prompt: str | None, id: str) -> str:
    """Return what pictures of one prompt have in common: as the data says it, or a digest of the prompt.

    Args:
        prompt_id: As the data says it.
        prompt: The prompt.
        id: The sample's id, for one without a prompt.
    """
    if prompt_id is not None:
        return str(prompt_id)
    if prompt is None:
        return id
    return "p-" + hashlib.sha256(storable(prompt).encode()).hexdigest()[:12]


def _digest_of_image(image: CheckedImage, name: str) -> str:
    digest = hashlib.sha256()
    if isinstance(image, Tensor):
        digest.update(f"tensor {image.dtype} {tuple(image.shape)}".encode())
        digest.update(bytes_of(image))
    elif isinstance(image, PIL.Image.Image):
        picture = open_image(image, name)
        colours = (picture.getpalette(), picture.info.get("transparency"))
        digest.update(f"picture {picture.mode} {picture.size} {colours}".encode())
        digest.update(picture.tobytes())
    else:
        assert isinstance(image, bytes)
        digest.update(image)
    return digest.hexdigest()
