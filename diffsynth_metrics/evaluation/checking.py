"""Looks through a data set before it is scored for hours: what is missing, broken or double."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.catalog import find_class, name_of
from diffsynth_metrics.errors import DownloadError, ImageError
from diffsynth_metrics.evaluation.samples import PackedImage, Problem, Sample, SampleSet, read_samples
from diffsynth_metrics.evaluation.tables import Table
from diffsynth_metrics.inputs import open_image
from diffsynth_metrics.metrics.clip import CLIPMetric
from diffsynth_metrics.metrics.image_reward import ImageRewardMetric
from diffsynth_metrics.open_clip_encoder import OpenCLIPMetric
from diffsynth_metrics.tokens import CutsPrompts
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["Check", "check"]

_CUTTING = ("bioclip", "clip", "hpsv2", "image_reward", "pickscore")
_WITHOUT_SCORE = {"corrupt", "missing", "no prompt", "no source", "same id"}
_SHOWN = 20

_Lengths = Callable[[list[str]], list[int]]


@dataclass(frozen=True)
class Check:
    """What was found in a data set.

    Attributes:
        samples: The data set.
        problems: What :func:`read_samples` found, and what ``check`` found, in this order.
        prompts: How many prompts there are.
        pictures_per_prompt: The least and the most pictures of one prompt.
        categories: How many samples each category has.
        not_checked: What could not be looked at, and why.
        needs_prompts: Whether a sample without prompt will have no score.
    """

    samples: SampleSet
    problems: tuple[Problem, ...]
    prompts: int
    pictures_per_prompt: tuple[int, int]
    categories: dict[str, int]
    not_checked: tuple[str, ...]
    needs_prompts: bool = True

    @property
    def ok(self) -> bool:
        """Whether every sample can be scored; unused files and cut prompts do not prevent that."""
        harmless = set() if self.needs_prompts else {"no prompt"}
        return not {problem.kind for problem in self.problems} & (_WITHOUT_SCORE - harmless)

    def table(self) -> Table:
        """Return the counts, each kind of problem with its first case."""
        low, high = self.pictures_per_prompt
        each = f"{low} of each" if low == high else f"{low} to {high} of each"
        seeds = len({sample.seed for sample in self.samples if sample.seed is not None})
        rows: list[tuple[Any, ...]] = [
            ("layout", self.samples.layout, self.samples.reason),
            ("samples", len(self.samples), self.samples.source),
            ("prompts", self.prompts, f"pictures: {each}" if self.prompts else ""),
            ("seeds", seeds, ""),
            *((f"category {name}", count, "") for name, count in sorted(self.categories.items())),
        ]
        kinds: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            kinds[problem.kind].append(problem)
        rows += [(kind, len(found), _first(found)) for kind, found in kinds.items()]
        return Table(("", "count", "note"), tuple(rows), notes=self.not_checked)

    def __str__(self) -> str:
        """Return the table, and the problems one by one, of each kind the first ones."""
        lines = [self.table().text()]
        count: Counter[str] = Counter()
        for problem in self.problems:
            count[problem.kind] += 1
            if count[problem.kind] <= _SHOWN:
                lines.append(str(problem))
        lines += [
            f"{kind}: and {number - _SHOWN} more" for kind, number in count.items() if number > _SHOWN
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.table().html()


def check(
    samples_or_source: Sequence[Sample] | str | os.PathLike[str],
    metrics: Iterable[str | type[BaseMetric] | BaseMetric] | None = None,
    *,
    progress: bool = False,
) -> Check:
    """Look through a data set: every picture is decoded, and no model is loaded.

    Args:
        samples_or_source: Samples, or what :func:`read_samples` reads without further arguments.
        metrics: The metrics that will score it, by name, class or object: prompts that they cut and
            pictures that they need are looked at. None: the package's metrics that cut prompts.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError, ValueError: See :func:`read_samples`.
        ValueError: There is no such metric; the message suggests one.
    """
    if isinstance(samples_or_source, (str, os.PathLike)):
        samples = read_samples(samples_or_source)
    elif isinstance(samples_or_source, SampleSet):
        samples = samples_or_source
    else:
        samples = SampleSet(samples_or_source)
    chosen = list(_CUTTING if metrics is None else metrics)
    cut, not_checked = _find_cut_prompts(samples, chosen)
    problems = (
        *samples.problems,
        *_find_same_ids(samples),
        *_find_same_seeds(samples),
        *_look_at_pictures(samples, progress),
        *cut,
        *_find_needs(samples, [] if metrics is None else chosen),
    )
    per_prompt = Counter(
        sample.prompt_id or sample.prompt for sample in samples if sample.prompt_id or sample.prompt
    )
    return Check(
        samples=samples,
        problems=problems,
        prompts=len(per_prompt),
        pictures_per_prompt=(min(per_prompt.values(), default=0), max(per_prompt.values(), default=0)),
        categories=dict(Counter(sample.category for sample in samples if sample.category is not None)),
        # Of metrics that nobody has named it is no news.
        not_checked=tuple(not_checked) if metrics is not None else (),
        needs_prompts=metrics is None or any("prompt" in _class_of(one).needs for one in chosen),
    )


def _first(problems: list[Problem]) -> str:
    text = f"{problems[0].file}: {problems[0].message}"
    return text if len(text) <= 120 else text[:119] + "…"


def _find_same_ids(samples: SampleSet) -> list[Problem]:
    counts = Counter(sample.id for sample in samples)
    return [
        Problem("same id", name, f"{count} samples have this id, and results are kept by id")
        for name, count in counts.items()
        if count > 1
    ]


def _find_same_seeds(samples: SampleSet) -> list[Problem]:
    """Report samples that a comparison, which pairs by prompt and seed, cannot tell apart."""
    first: dict[tuple[str | None, str], str] = {}
    problems = []
    for sample in samples:
        if sample.seed is not None:
            key = sample.prompt_id or sample.prompt, sample.seed
            if (other := first.setdefault(key, sample.id)) != sample.id:
                message = f"it has the prompt and the seed of sample {other!r}"
                problems.append(Problem("same seed", f"sample {sample.id!r}", message))
    return problems


def _look_at_pictures(samples: SampleSet, progress: bool) -> list[Problem]:
    """Decode every picture once; report those that cannot be read, and those with equal bytes."""
    problems: list[Problem] = []
    results: dict[str, str] = {}
    everything = (image for sample in samples for image in (sample.image, *sample.sources))
    images = {str(image): image for image in everything if isinstance(image, (str, Path, PackedImage))}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as threads:
        looked_at = threads.map(_look_at, images.values())
        for name, (digest, problem) in zip(
            images, tqdm(looked_at, total=len(images), disable=not progress, unit="picture"), strict=True
        ):
            if digest is not None:
                results[name] = digest
            # read_samples has reported the files that are missing, by their rows.
            if problem is not None and not (problem.kind == "missing" and samples.source):
                problems.append(problem)
    return problems + _find_identical(samples, results)


def _look_at(image: str | Path | PackedImage) -> tuple[str | None, Problem | None]:
    """Return the sha256 of an encoded picture, or what is wrong with it."""
    if not isinstance(image, PackedImage) and not os.path.isfile(image):
        return None, Problem("missing", str(image), "there is no such file")
    try:
        contents = image.read() if isinstance(image, PackedImage) else Path(image).read_bytes()
        open_image(contents, str(image))
    except (ImageError, OSError, ValueError) as error:
        message = str(error).removeprefix(f"{image} ")
        return None, Problem("corrupt", str(image), message)
    return hashlib.sha256(contents).hexdigest(), None


def _find_identical(samples: SampleSet, digests: dict[str, str]) -> list[Problem]:
    first: dict[str, str] = {}
    problems = []
    for name in dict.fromkeys(str(sample.image) for sample in samples):
        if name in digests and (other := first.setdefault(digests[name], name)) != name:
            problems.append(Problem("identical", name, f"it has the same bytes as {other}"))
    return problems


def _class_of(metric: str | type[BaseMetric] | BaseMetric) -> type[BaseMetric]:
    if isinstance(metric, str):
        return find_class(metric.partition("=")[0])
    return metric if isinstance(metric, type) else type(metric)


def _find_needs(
    samples: SampleSet, metrics: Iterable[str | type[BaseMetric] | BaseMetric]
) -> list[Problem]:
    """Report what metrics need besides pictures and prompts."""
    without = [sample for sample in samples if not sample.sources]
    return [
        Problem(
            "no source",
            f"sample {without[0].id!r}",
            f"{len(without)} samples have none for {_name(one)}",
        )
        for one in metrics
        if without and "source" in _class_of(one).needs
    ]


def _name(metric: str | type[BaseMetric] | BaseMetric) -> str:
    return metric if isinstance(metric, str) else name_of(metric)


def _find_cut_prompts(
    samples: SampleSet, metrics: Iterable[str | type[BaseMetric] | BaseMetric]
) -> tuple[list[Problem], list[str]]:
    """Return the prompts that some metric cuts, and of which metrics that is not known."""
    prompts = list(dict.fromkeys(sample.prompt for sample in samples if sample.prompt is not None))
    readers: dict[str, list[str]] = defaultdict(list)
    limits: dict[str, tuple[_Lengths, int]] = {}
    not_checked = []
    for metric in metrics:
        try:
            kind, lengths, limit = _token_limit(metric)
        except LookupError as error:
            not_checked.append(f"not checked whether {_name(metric)} cuts prompts: {error.args[0]}")
            continue
        if limit:
            readers[kind].append(_name(metric))
            limits[kind] = lengths, limit
    problems = []
    for kind, names in readers.items():
        lengths, limit = limits[kind]
        for prompt, length in zip(prompts, lengths(prompts), strict=True):
            if length > limit:
                start = prompt if len(prompt) <= 60 else prompt[:57] + "..."
                message = f"it has {length} tokens, and of these {', '.join(names)} read {limit}"
                problems.append(Problem("cut", repr(start), message))
    return problems, not_checked


def _token_limit(metric: str | type[BaseMetric] | BaseMetric) -> tuple[str, _Lengths, int]:
    """Return which tokenizer a metric has, the lengths that it gives prompts, and the limit; 0: none.

    Raises:
        LookupError: The tokenizer is not on disk.
    """
    cls = _class_of(metric)
    if not issubclass(cls, CutsPrompts):
        return "", lambda prompts: [], 0
    if isinstance(metric, CutsPrompts):
        return _limit_of_loaded(metric)
    if issubclass(cls, OpenCLIPMetric):
        return _published_clip()
    name, _, path = metric.partition("=") if isinstance(metric, str) else ("", "", "")
    if path or name == "shapes":
        config = ModelConfig(path=os.path.expanduser(path)) if path else ModelConfig.embedded("shapes")
        return _limit_of_folder(cls, config)
    if issubclass(cls, CLIPMetric):
        return _published_clip()
    if issubclass(cls, ImageRewardMetric) and cls.default_processor is not None:
        return _limit_of_folder(cls, cls.default_processor)
    raise LookupError("its tokenizer is not known")


def _limit_of_loaded(metric: CutsPrompts) -> tuple[str, _Lengths, int]:
    def lengths(prompts: list[str]) -> list[int]:
        return metric.tokenize(prompts).lengths

    longest = "word " * 2000
    return f"loaded {id(metric)}", lengths, len(metric.tokenize([longest]).ids[0])


def _published_clip() -> tuple[str, _Lengths, int]:
    """Return CLIP's tokenizer as open_clip ships it; transformers' differs in HTML entities only."""
    import open_clip

    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    return "clip", lambda prompts: [len(tokenizer.encode(prompt)) + 2 for prompt in prompts], 77


def _limit_of_folder(cls: type[BaseMetric], config: ModelConfig) -> tuple[str, _Lengths, int]:
    """Return the tokenizer that lies with local weights, or among the downloads."""
    try:
        files = replace(config, skip_download=True).resolve(sufficient=cls.processor_files)
    except (DownloadError, FileNotFoundError) as error:
        raise LookupError("its tokenizer is not on disk") from error
    folder = next((Path(file).parent for file in files if Path(file).name in cls.processor_files), None)
    if folder is None:
        raise LookupError("there is no tokenizer beside its weights")
    if (option := inspect.signature(cls.__init__).parameters.get("max_length")) is None:
        raise LookupError("it is not known how much it reads")
    limit = option.default
    if (folder / "config.json").is_file() and issubclass(cls, CLIPMetric):
        text = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("text_config", {})
        limit = min(limit, text.get("max_position_embeddings", limit))
    from transformers import BertTokenizer, CLIPTokenizer

    kind = CLIPTokenizer if issubclass(cls, CLIPMetric) else BertTokenizer
    tokenizer = kind.from_pretrained(folder, local_files_only=True)

    def lengths(prompts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"]] if prompts else []

    return str(folder), lengths, limit
