"""What layouts are given, a source with its files, and what they make of it, samples and problems."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from diffsynth_metrics.evaluation.manifests import PICTURES
from diffsynth_metrics.evaluation.prompt_files import Prompts, read_prompts
from diffsynth_metrics.evaluation.samples import Problem, Sample

__all__ = ["Reading", "Source", "existing", "relative_name", "stem_of", "suffix_of"]


@dataclass(frozen=True)
class Source:
    """What :func:`read_samples` was asked to read."""

    path: Path
    prompts_path: Path | None
    columns: Mapping[str, str]
    allow_outside: bool

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, and not a file."""
        return self.path.is_dir()

    @cached_property
    def listing(self) -> tuple[list[str], int]:
        """The files in the folder and below it, with / and sorted; and the number of hidden names."""
        files: list[str] = []
        hidden = 0
        seen = set()
        for root, folders, names in os.walk(self.path, followlinks=True, onerror=_stop):
            status = os.stat(root)
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            below = os.path.relpath(root, self.path).replace(os.sep, "/")
            prefix = "" if below == "." else f"{below}/"
            hidden += sum(name.startswith(".") for name in (*names, *folders))
            folders[:] = [name for name in folders if not name.startswith(".")]
            files += [prefix + name for name in names if not name.startswith(".")]
        return sorted(files), hidden

    @property
    def files(self) -> list[str]:
        """The files in the folder and below it; for a single file, none."""
        return self.listing[0] if self.is_folder else []

    @cached_property
    def pictures(self) -> list[str]:
        """The pictures among the files."""
        return [name for name in self.files if suffix_of(name) in PICTURES]

    @cached_property
    def prompts(self) -> Prompts | None:
        """The prompts that were passed, or those in the only .json or .jsonl file in the folder."""
        if self.prompts_path is not None:
            return read_prompts(self.prompts_path)
        beside = [
            name for name in self.files if "/" not in name and suffix_of(name) in (".json", ".jsonl")
        ]
        if len(beside) != 1:
            return None
        try:
            return read_prompts(self.path / beside[0])
        except ValueError:  # some other file, which is reported as unused
            return None


@dataclass
class Reading:
    """What was found in a source; layouts fill it."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    details: list[str] = field(default_factory=list)
    has_no_prompts: bool = False

    def add(self, sample: Sample, *used: str, where: object = None, why: str = "") -> None:
        """Keep a sample.

        Args:
            sample: The sample.
            *used: The files of the folder that it uses.
            where: The row or file that should have its prompt; its picture by default.
            why: Why it has no prompt, where it has none.
        """
        self.samples.append(sample)
        self.used.update(used)
        if sample.prompt is None and not self.has_no_prompts:
            self.problem("no prompt", where or sample.image, why or "there is no prompt for it")

    def without_prompts(self, file: object, message: str) -> None:
        """Say once that no sample has a prompt; called before samples are added."""
        self.has_no_prompts = True
        self.problem("no prompt", file, message)

    def problem(self, kind: str, file: object, message: str) -> None:
        """Keep a problem."""
        self.problems.append(Problem(kind, str(file), message))

    def finish(self, source: Source) -> tuple[list[Sample], list[Problem]]:
        """Check what holds for every layout; return the samples and the problems.

        Raises:
            ValueError: There are no samples, or two of them cannot be told apart.
        """
        if not self.samples:
            raise ValueError(f"there are no pictures in {source.path}")
        samples = self._told_apart()
        self._report_unused(source)
        return samples, self.problems

    def _told_apart(self) -> list[Sample]:
        """Give samples whose pictures have one name, as x.png and x.jpg, ids with the suffix."""
        count = Counter(sample.id for sample in self.samples)
        samples = []
        first: dict[str, Sample] = {}
        for sample in self.samples:
            image = sample.image
            if count[sample.id] > 1 and isinstance(image, Path) and stem_of(image).endswith(sample.id):
                sample = replace(sample, id=sample.id + image.suffix)
                self.problem("duplicate", image, f"another picture has its name: it is {sample.id!r}")
            if (other := first.setdefault(sample.id, sample)) is not sample:
                raise ValueError(
                    f"two samples are called {sample.id!r}: {other.image} with the prompt "
                    f"{other.prompt!r}, and {image} with {sample.prompt!r}; leave one out, or add a "
                    "column 'id' that tells them apart"
                )
            samples.append(sample)
        return samples

    def _report_unused(self, source: Source) -> None:
        for name in source.files:
            if name not in self.used:
                self.problem("unused", source.path / name, "no sample uses it")
        if source.is_folder and (hidden := source.listing[1]):
            self.problem("unused", source.path, f"{hidden} names that begin with a dot are left out")


def existing(path: Path, where: object, reading: Reading) -> Path:
    """Return a path, and report it if there is no file."""
    if not path.is_file():
        reading.problem("missing", where, f"there is no file {str(path)!r}")
    return path


def suffix_of(name: str) -> str:
    """Return the suffix of a file name, in lower case."""
    return os.path.splitext(name)[1].lower()


def stem_of(name: str | Path) -> str:
    """Return a path without its suffix."""
    return os.path.splitext(name)[0]


def relative_name(path: Path, root: Path) -> str:
    """Return a path with / and relative to the root, where it lies below it."""
    name, above = str(path), os.path.join(root, "")
    return name.removeprefix(above).replace(os.sep, "/")


def _stop(error: OSError) -> None:
    # os.walk would leave the folder out, and nothing would say so.
    raise error
