"""The published weights: which files they are, what of them is on disk, what they must give.

The files themselves tell most of it; this module compares them with the published layouts, with the
hashes that a hub lists, and with the scores that authors have published.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffsynth_metrics.catalog import find_class, find_name
from diffsynth_metrics.errors import CheckpointError, DownloadError
from diffsynth_metrics.networks.ocr import installed_networks
from diffsynth_metrics.weights.checkpoint import KNOWN_LAYOUTS, fingerprint, read_layout, weight_files
from diffsynth_metrics.weights.hub import LocalFiles, Repository
from diffsynth_metrics.weights.listing import HubFile, sha256_of
from diffsynth_metrics.weights.model_config import ModelConfig

if TYPE_CHECKING:
    from diffsynth_metrics.base import BaseMetric

__all__ = [
    "PICTURES_VARIABLE",
    "PUBLISHED_SCORES",
    "Check",
    "HubFile",
    "OnDisk",
    "Part",
    "PublishedScore",
    "download",
    "downloads_are_off",
    "find_parts",
    "list_on_hub",
    "models_folder",
    "on_disk",
    "size_text",
    "verify",
]

logger = logging.getLogger(__name__)

PICTURES_VARIABLE = "DIFFSYNTH_METRICS_PUBLISHED_IMAGES"
"""Environment variable with the folder in which :func:`verify` looks for the authors' pictures."""


@dataclass(frozen=True)
class Part:
    """Some of the published files of a metric.

    Attributes:
        role: ``"weights"`` or ``"processor"``.
        config: Where they are.
        sufficient: File names any of which makes a folder that was copied by hand complete.
    """

    role: Literal["weights", "processor"]
    config: ModelConfig
    sufficient: tuple[str, ...] = ()

    @property
    def repository(self) -> Repository:
        """The repository, with the local folder that its files go to."""
        source = self.config.download_source or os.environ.get("DIFFSYNTH_DOWNLOAD_SOURCE")
        return Repository(
            (source or "modelscope").lower(),
            self.config.model_id or "",
            self.config.revision,
            models_folder(),
        )

    @property
    def files(self) -> LocalFiles:
        """The local files, as far as they are there."""
        pattern = self.config.origin_file_pattern
        assert isinstance(pattern, str)
        return LocalFiles(self.repository.folder, pattern)


@dataclass(frozen=True)
class OnDisk:
    """What of a metric's published files is on disk.

    Attributes:
        state: ``"whole"``, ``"partly"`` or ``"absent"``; ``"whole"`` for a metric without weights.
        folder: Where they are, or would be.
        size: Bytes of the files that are there.
        problem: What is missing or damaged, in words; empty for ``"whole"``.
    """

    state: Literal["whole", "partly", "absent"]
    folder: Path
    size: int
    problem: str = ""


@dataclass(frozen=True)
class Check:
    """One thing that :func:`verify` looked at.

    Attributes:
        what: Such as ``"layout"``.
        result: ``"ok"``, ``"failed"``, or ``"not checked"`` where something that it takes is not there.
        detail: What was found, or what is needed.
    """

    what: str
    result: Literal["ok", "failed", "not checked"]
    detail: str


@dataclass(frozen=True)
class PublishedScore:
    """Scores that the authors of a metric published for pictures of theirs.

    Attributes:
        source: Where they stand.
        prompt: The prompt; None for a metric without one.
        pictures: The beginning of each picture's sha256.
        scores: One for each picture.
        tolerance: How far a right score may be off: the originals ran in fp16 on CUDA.
    """

    source: str
    prompt: str | None
    pictures: tuple[str, ...]
    scores: tuple[float, ...]
    tolerance: float


PUBLISHED_SCORES = {
    "aesthetic": PublishedScore(
        source="simple-aesthetics-predictor, a-photo-of-an-astronaut-riding-a-horse.png",
        prompt=None,
        pictures=("59e7267a",),
        scores=(5.7546,),
        tolerance=2e-2,
    ),
    "hpsv2": PublishedScore(
        source="HPSv2 2.0, issue 27, hpsv2/assets/demo_image.jpg",
        prompt="A cat with two horns on its head",
        pictures=("798dfb5b",),
        scores=(0.2876,),
        tolerance=5e-4,
    ),
    "image_reward": PublishedScore(
        source="ImageReward's README, assets/images/1.webp to 4.webp",
        prompt="a painting of an ocean with clouds and birds, day time, low depth field effect",
        pictures=("a5fcd126", "dc13919a", "ee859bac", "84faf59d"),
        scores=(0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492),
        tolerance=1e-2,
    ),
}
"""Metric to what its authors published; the others' authors published no picture with its score."""

_SHAPES_SCORES = {("circle", "red"): 19.187, ("square", "blue"): 0.246}
"""Drawn shape to the score of ``"a red circle"`` with it, as the embedded model was trained."""


def size_text(size: float) -> str:
    """Return a number of bytes in words, such as ``"3.9 GB"``."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


_IN_PACKAGES: dict[str, Callable[[], Sequence[str | Path]]] = {
    "shapes": lambda: ModelConfig.embedded("shapes").resolve(),
    "text_rendering": installed_networks,
}
"""Metrics whose files come with an installed package, to what finds them."""


def models_folder() -> Path:
    """Return the folder of downloads, as :class:`ModelConfig` chooses it by default."""
    return Path(
        os.path.abspath(os.path.expanduser(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "./models"))
    )


def downloads_are_off() -> bool:
    """Tell whether the environment forbids to ask a hub."""
    return os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "").lower() in ("true", "1")


def find_parts(name: str, source: str | None = None) -> tuple[Part, ...]:
    """Return the published files of a metric; none where a package ships them, or it has no weights.

    Args:
        name: One of :data:`diffsynth_metrics.catalog.NAMES`.
        source: ``"modelscope"`` or ``"huggingface"``; None means the environment's, else ModelScope.

    Raises:
        ValueError: There is no such metric or source.
    """
    metric = find_class(name)
    weights = metric.default_model
    if find_name(name) in _IN_PACKAGES or weights is None:
        return ()
    # Some weights are on one hub only.
    hub = weights.download_source or source
    parts = [Part("weights", replace(weights, download_source=hub))]
    if metric.default_processor is not None:
        processor = replace(metric.default_processor, download_source=source)
        parts.append(Part("processor", processor, metric.processor_files))
    return tuple(parts)


def on_disk(name: str) -> OnDisk:
    """Look for the published files of a metric; of weights only the headers are read.

    Raises:
        ValueError: There is no such metric.
    """
    parts = find_parts(name)
    if not parts and find_name(name) not in _IN_PACKAGES:
        return OnDisk("whole", Path(), 0)
    if not parts:
        try:
            files = _IN_PACKAGES[find_name(name)]()
        except ImportError as error:
            return OnDisk("absent", Path(), 0, str(error))
        return OnDisk("whole", Path(files[0]).parent, sum(map(os.path.getsize, files)))
    folder = (parts[0].repository.folder / str(parts[0].config.origin_file_pattern)).parent
    names = {name for part in parts for name in part.files.names()}
    size = sum((parts[0].repository.folder / name).stat().st_size for name in names)
    problems = [problem for part in parts if (problem := _problem(part))]
    if not problems:
        return OnDisk("whole", folder, size)
    started = bool(names) or any(part.files.interrupted for part in parts) or bool(_leftovers(parts[0]))
    return OnDisk("partly" if started else "absent", folder, size, "; ".join(problems))


def _problem(part: Part) -> str:
    """Say what keeps the files of a part from being used; nothing where they are whole."""
    files = part.files
    if not files.are_complete(part.sufficient):
        if files.interrupted or _leftovers(part):
            return f"the download of the {part.role} was interrupted"
        if damaged := files.damaged():
            return f"{part.role} missing or damaged: {', '.join(damaged)}"
        return f"{part.role} not complete" if files.names() else f"no {part.role}"
    if part.role == "weights":
        try:
            read_layout([files.folder / name for name in files.names()])
        except CheckpointError as error:
            return str(error)
    return ""


def _leftovers(part: Part) -> list[Path]:
    """Return the unfinished files of the hubs' clients that begin with the name of a single file."""
    files = part.files
    if not files.one_file:
        return []
    target = files.folder / files.pattern
    beside = target.parent.glob(f"*{target.name}?*")
    inside = (files.folder / ".cache" / "huggingface" / "download").glob(f"**/*{target.name}.incomplete")
    return [file for file in (*beside, *inside) if file.is_file()]


def list_on_hub(part: Part) -> list[HubFile]:
    """Ask the hub which files a part has.

    Raises:
        DownloadError: The hub did not answer, has no such file, or may not be asked.
    """
    repository = part.repository
    if downloads_are_off():
        hint = "Allow downloads, which are off (DIFFSYNTH_SKIP_DOWNLOAD)."
        raise repository.error(hint, f"the hub was not asked about {part.files}")
    try:
        _, files = repository.list_files(part.files)
    except DownloadError:
        raise
    except Exception as error:
        logger.debug("the client's error", exc_info=True)
        problem = f"could not list the files: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise repository.error("Check the network, or choose the other hub.", problem) from None
    if not files:
        raise repository.error(
            "Choose the other hub.", f"no file of the repository matches {part.files}"
        )
    return files


def download(name: str, source: str | None = None) -> list[Check]:
    """Download the published files of a metric, as far as they are missing, and check them.

    The hub's client goes on where it was interrupted, see docs/weights.md.

    Args:
        name: One of :data:`diffsynth_metrics.catalog.NAMES`.
        source: ``"modelscope"`` or ``"huggingface"``.

    Returns:
        One check of sha256 per part of the files.

    Raises:
        DownloadError: The files could not be had.
        ValueError: There is no such metric or source.
    """
    parts = find_parts(name, source)
    for part in parts:
        part.config.resolve(sufficient=part.sufficient)
    return _compare_with_hub(parts)


def _compare_with_hub(parts: Sequence[Part]) -> list[Check]:
    """Compare local files with what the hub lists: sha256, or the size where it lists no sha256."""
    checks: list[Check] = []
    unanswered = ""  # a hub that does not answer is asked once, because it takes seconds to find out
    for part in parts:
        what = f"sha256 of the {part.role}"
        try:
            listed = {} if unanswered else {file.name: file for file in list_on_hub(part)}
        except DownloadError as error:
            unanswered = " ".join(str(error).split())
        if unanswered:
            checks.append(Check(what, "not checked", unanswered))
        else:
            checks.append(_compare_with_listing(what, part, listed))
    return checks


def _compare_with_listing(what: str, part: Part, listed: Mapping[str, HubFile]) -> Check:
    folder, source, local = part.repository.folder, part.repository.source, part.files.names()
    if absent := sorted(listed.keys() - set(local)):
        return Check(what, "failed", f"missing here: {', '.join(absent)}")
    known = [name for name in local if name in listed]
    if wrong := [name for name in known if not listed[name].equals(folder / name)]:
        hint = f"Delete {folder / wrong[0]} and download again"
        return Check(what, "failed", f"{hint}: other content than on {source}")
    hashed = [name for name in known if listed[name].sha256 or listed[name].git_sha1]
    detail = f"{len(hashed)} of {len(local)} files equal to those on {source}"
    rest = f"; of {len(known) - len(hashed)} more the size is" if len(hashed) < len(known) else ""
    return Check(what, "ok", detail + rest)


def verify(
    metric: str, *, pictures: str | os.PathLike[str] | None = None, source: str | None = None
) -> list[Check]:
    """Check the files of a metric that are on disk; nothing is downloaded.

    Args:
        metric: ``"pickscore"`` checks the published weights, ``"pickscore=PATH"`` a file or folder.
        pictures: A folder with the pictures that authors published scores of, recognised by their
            sha256; None means the folder that the environment's :data:`PICTURES_VARIABLE` names.
        source: The hub whose hashes are asked for.

    Returns:
        The checks in order; they end with the first that failed.

    Raises:
        ValueError: There is no such metric or source, or it is a server.
    """
    name, _, path = metric.partition("=")
    name = find_name(name)
    if path.startswith(("http://", "https://")):
        raise ValueError(f"Verify the files on the machine that serves them: {path} is a server")
    if name == "text_rendering":
        return _check_ocr(path)
    if find_class(name).default_model is None:
        return [Check("files", "ok", "it is a formula, and has no weights")]
    parts = () if path else find_parts(name, source)
    checks: list[Check] = []
    for check in _checks(name, _local_config(name, path), parts, pictures):
        checks.append(check)
        if check.result == "failed":
            break
    return checks


def _check_ocr(path: str) -> list[Check]:
    """Check the networks of the metric that reads text, which no hub lists."""
    if path:
        raise ValueError(f"text_rendering reads with the networks of rapidocr, and not with {path}")
    try:
        files = installed_networks()
    except ImportError as error:
        return [Check("files", "failed", str(error))]
    size = size_text(sum(map(os.path.getsize, files)))
    return [
        Check("files", "ok", f"{len(files)} of weights, {size}, in {files[0].parent}"),
        Check("sha256", "not checked", f"no hub lists these files; it is {sha256_of(files)}"),
    ]


def _local_config(name: str, path: str) -> ModelConfig:
    if path:
        return ModelConfig(path=os.path.expanduser(path), skip_download=True)
    published = ModelConfig.embedded(name) if name == "shapes" else find_class(name).default_model
    assert published is not None  # verify() knows those that have no weights
    return replace(published, skip_download=True)


def _checks(
    name: str, config: ModelConfig, parts: Sequence[Part], pictures: str | os.PathLike[str] | None
) -> Iterator[Check]:
    """Yield one check after the other, from the cheap to the expensive."""
    if parts and not parts[0].files.names() and not parts[0].files.interrupted:
        folder = parts[0].repository.folder
        yield Check("files", "failed", f"Run diffsynth-metrics download {name}: no weights in {folder}")
        return
    try:
        files = weight_files(config.resolve())
        layout = read_layout(files)
    except (DownloadError, CheckpointError, FileNotFoundError) as error:
        yield Check("files", "failed", str(error))
        return
    size = sum(file.stat().st_size for file in files)
    yield Check("files", "ok", f"{len(files)} of weights, {size_text(size)}, in {files[0].parent}")
    owners = KNOWN_LAYOUTS.get(fingerprint(layout), ())
    yield _check_layout(name, len(layout), owners)
    yield from _compare_with_hub(parts)
    if not parts:
        detail = f"no hub lists these files; it is {sha256_of(files)}"
        yield Check("sha256", "not checked", detail)
    try:
        metric = find_class(name).from_pretrained(model_config=config, device="cpu", check_finite=False)
    except (DownloadError, CheckpointError, FileNotFoundError) as error:
        yield Check("loading", "failed", str(error))
        return
    dtype = str(metric.dtype).removeprefix("torch.")
    yield Check("loading", "ok", f"the network takes every tensor, in {dtype}")
    yield _check_values(metric)
    yield _check_scores(name, metric, published=bool(owners), pictures=pictures)


def _check_layout(name: str, count: int, owners: Sequence[str]) -> Check:
    if not owners:
        detail = f"{count} tensors are no published layout; their config must fit them"
        return Check("layout", "not checked", detail)
    wanted = find_class(name).__name__
    if wanted not in owners:
        return Check("layout", "failed", f"these are weights of {' or '.join(owners)}, not of {wanted}")
    return Check("layout", "ok", f"{count} tensors with the published names and shapes")


def _check_values(metric: BaseMetric) -> Check:
    try:
        metric.check_weights()
    except CheckpointError as error:
        return Check("values", "failed", str(error))
    return Check("values", "ok", "no NaN and no infinity")


def _check_scores(
    name: str, metric: BaseMetric, *, published: bool, pictures: str | os.PathLike[str] | None
) -> Check:
    if name == "shapes":
        return _check_shapes(metric)
    known = PUBLISHED_SCORES.get(name)
    if known is None:
        return Check("scores", "not checked", "the authors published no picture with its score")
    if not published:
        return Check("scores", "not checked", "published scores are of the published weights")
    folder = pictures or os.environ.get(PICTURES_VARIABLE)
    found = _find_pictures(Path(folder).expanduser(), known.pictures) if folder else []
    if len(found) < len(known.pictures):
        detail = f"needs the pictures of {known.source} in --pictures or {PICTURES_VARIABLE}"
        return Check("scores", "not checked", detail)
    prompts = [known.prompt or ""] * len(found)
    rows = metric.evaluate(*metric.arguments(prompts, found))  # type: ignore[attr-defined]
    return _compare_scores([row["score"] for row in rows], known.scores, known.tolerance, known.source)


def _check_shapes(metric: BaseMetric) -> Check:
    from diffsynth_metrics.embedded.drawing import draw_shape

    drawn = [draw_shape(*words) for words in _SHAPES_SCORES]
    scores = metric.compute("a red circle", drawn)
    source = "the scores of drawn shapes"
    return _compare_scores(scores, tuple(_SHAPES_SCORES.values()), 5e-2, source)


def _compare_scores(
    scores: Sequence[float], expected: Sequence[float], tolerance: float, source: str
) -> Check:
    far = max(abs(score - wanted) for score, wanted in zip(scores, expected, strict=True))
    detail = f"at most {far:.2g} from {source} (allowed {tolerance:g})"
    return Check("scores", "ok" if far <= tolerance else "failed", detail)


def _find_pictures(folder: Path, wanted: Sequence[str]) -> list[Path]:
    """Return the files below a folder whose sha256 begin as wanted, in that order, where they are."""
    hashes = {
        hashlib.sha256(file.read_bytes()).hexdigest(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    found = [[file for digest, file in hashes.items() if digest.startswith(one)] for one in wanted]
    return [files[0] for files in found if files]
