"""WebDataset's layout: tar shards in which the files of a sample have one name up to the first dot."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffsynth_metrics.evaluation.manifests import PICTURES, find_prompt, first_label, parse_json
from diffsynth_metrics.evaluation.samples import PackedImage, Sample
from diffsynth_metrics.evaluation.shards import read_member, tar_members
from diffsynth_metrics.evaluation.sources import Reading, Source, suffix_of

__all__ = ["find_webdataset", "read_webdataset"]


def find_webdataset(source: Source) -> str | None:
    """Look for tar shards, without pictures beside them."""
    if not source.is_folder:
        return f"{source.path.name} is a tar file" if suffix_of(source.path.name) == ".tar" else None
    shards = [name for name in source.files if suffix_of(name) == ".tar"]
    if not shards or source.pictures:
        return None
    return f"it holds .tar files and no pictures, such as {shards[0]}"


def read_webdataset(source: Source) -> Reading:
    """Read names and texts of all shards, and leave the pictures in them."""
    names = [name for name in source.files if suffix_of(name) == ".tar"]
    shards = [source.path / name for name in names] if source.is_folder else [source.path]
    if not shards:
        raise ValueError(f"there are no .tar files in {source.path}")
    reading = Reading(used=set(names), details=[f"{len(shards)} shards"])
    for shard in shards:
        _read_shard(reading, shard)
    count = Counter(sample.id for sample in reading.samples)
    if twice := next((key for key, number in count.items() if number > 1), None):
        reading.problem(
            "duplicate", source.path, f"{twice!r} is in several shards: ids begin with the shard"
        )
        reading.samples = [_with_shard(sample) for sample in reading.samples]
    return reading


def _with_shard(sample: Sample) -> Sample:
    assert isinstance(sample.image, PackedImage)
    return replace(sample, id=f"{sample.image.file.stem}/{sample.id}")


def _read_shard(reading: Reading, shard: Path) -> None:
    """Group the files of a shard by their names up to the first dot, and read each group."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for member in tar_members(shard):
        folder, _, name = member.rpartition("/")
        stem, _, ending = name.partition(".")
        group = groups[f"{folder}/{stem}".removeprefix("./").removeprefix("/")]
        if not stem:
            reading.problem("unused", f"{shard}::{member}", "its name begins with a dot")
        elif (other := group.setdefault(ending.lower(), member)) != member:
            raise ValueError(f"{shard} holds {other!r} and {member!r}, which are one name to WebDataset")
    for key, members in groups.items():
        images = [member for ending, member in members.items() if f".{ending}" in PICTURES]
        if len(images) > 1:
            raise ValueError(f"{shard} holds several pictures of {key!r}: {' and '.join(images)}")
        text, labels = members.get("txt"), members.get("json")
        for member in members.values():
            if not images or member not in (images[0], text, labels):
                reading.problem("unused", f"{shard}::{member}", "no sample uses it")
        if images:
            _read_group(reading, shard, key, images[0], text, labels)


def _read_group(
    reading: Reading, shard: Path, key: str, image: str, text: str | None, labels: str | None
) -> None:
    where = f"{shard}::{labels}"
    values: dict[str, Any] = {}
    if labels:
        try:
            values = parse_json(_member_text(shard, labels))
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where} must hold an object, such as {{'prompt': ...}}")
    prompt = find_prompt(values, where)
    if text:
        written = _member_text(shard, text).strip()
        if prompt is not None and prompt.strip() != written:
            reading.problem("ambiguous", where, f"its prompt is not that of {text}, which is taken")
        prompt = written
    reading.add(
        Sample(
            id=key,
            prompt=prompt or None,
            image=PackedImage(shard, image),
            prompt_id=first_label(values, "prompt_id", where),
            seed=first_label(values, "seed", where),
            category=first_label(values, "category", where),
        )
    )


def _member_text(shard: Path, member: str) -> str:
    try:
        return read_member(shard, member).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shard}::{member} is not UTF-8: {error}") from error
