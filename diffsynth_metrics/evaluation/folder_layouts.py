"""Layouts that are folders of pictures, with prompts in names, beside the pictures or in one file."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from diffsynth_metrics.evaluation.manifests import (
    MANIFESTS,
    find_prompt,
    first_label,
    open_manifest,
    read_text,
)
from diffsynth_metrics.evaluation.prompt_files import (
    FoundPrompt,
    Prompts,
    has_markup,
    has_png_text,
    prompt_of_png,
    read_infotext,
    read_prompts,
)
from diffsynth_metrics.evaluation.samples import Sample
from diffsynth_metrics.evaluation.sources import Reading, Source, existing, stem_of, suffix_of

_LOOKED_AT = 32
"""How many PNG files of a folder are opened to find out whether they hold prompts."""

# --- folders whose prompts lie beside the pictures ---


def find_sidecar(source: Source) -> str | None:
    """Look for x.txt beside x.png."""
    files = set(source.files)
    with_text = [name for name in source.pictures if f"{stem_of(name)}.txt" in files]
    return f"{stem_of(with_text[0])}.txt lies beside {with_text[0]}" if with_text else None


def read_sidecar(source: Source) -> Reading:
    """Read all pictures; a text that A1111 wrote is its prompt only."""
    reading = Reading()
    files = set(source.files)
    for name in source.pictures:
        text, path = f"{stem_of(name)}.txt", source.path / name
        if text not in files:
            reading.add(Sample(stem_of(name), None, path), name, why=f"there is no {text}")
            continue
        content = read_text(source.path / text)
        found = read_infotext(content) or FoundPrompt(content.strip() or None)
        _note_markup(reading, found, source.path / text)
        sample = Sample(stem_of(name), found.text, path, seed=found.seed)
        reading.add(sample, name, text, where=source.path / text, why="it is empty")
    return reading


def _note_markup(reading: Reading, found: FoundPrompt, file: Path) -> None:
    if found.text and has_markup(found.text):
        reading.problem("markup", file, "metrics read <name:...> and (words:1.2) in its prompt as words")


def find_png_text(source: Source) -> str | None:
    """Look for text of A1111 or ComfyUI in some of the PNG files."""
    names = [name for name in source.pictures if suffix_of(name) == ".png"]
    for name in names[:: max(1, len(names) // _LOOKED_AT)]:
        if has_png_text(source.path / name):
            return f"{name} holds text of A1111 or ComfyUI"
    return None


def read_png_text(source: Source) -> Reading:
    """Read all pictures; those without such a text have no prompt."""
    reading = Reading()
    for name in source.pictures:
        path, found, why = source.path / name, FoundPrompt(None), ""
        try:
            found = prompt_of_png(path)
        except ValueError as error:
            why = str(error)
        _note_markup(reading, found, path)
        reading.add(Sample(stem_of(name), found.text, path, seed=found.seed), name, why=why)
    return reading


# --- benchmarks ---

_GENEVAL = re.compile(r"(\d+)/metadata\.jsonl")
_HPDV2 = re.compile(r"([^/]+)/(\d{5})\.\w+")
_T2I_COMPBENCH = re.compile(r"(?:samples/)?([^/]+)_(\d{6})\.\w+")


def _geneval_pictures(source: Source) -> dict[str, list[str]]:
    """Return the pictures in samples/ of each folder that has a prompt."""
    folders = [match[1] for name in source.files if (match := _GENEVAL.fullmatch(name))]
    pictures: dict[str, list[str]] = {folder: [] for folder in folders}
    for name in source.pictures:
        folder, _, rest = name.partition("/")
        if folder in pictures and rest.startswith("samples/"):
            pictures[folder].append(name)
    return pictures


def find_geneval(source: Source) -> str | None:
    """Look for folders 00000 with metadata.jsonl and samples/."""
    found = next((names[0] for names in _geneval_pictures(source).values() if names), None)
    return f"{found} and a metadata.jsonl in {found.split('/')[0]}" if found else None


def read_geneval(source: Source) -> Reading:
    """Read all such folders; their grids are unused."""
    reading = Reading()
    for folder, pictures in _geneval_pictures(source).items():
        name = f"{folder}/metadata.jsonl"
        file = source.path / name
        rows = open_manifest(file).read(())
        if len(rows) != 1:
            raise ValueError(f"{file} must hold one object with the prompt, and holds {len(rows)}")
        prompt = find_prompt(rows[0].values, str(file))
        category = first_label(rows[0].values, "category", str(file))
        reading.used.add(name)
        if not pictures:
            reading.problem("missing", file, f"there are no pictures in {folder}/samples")
        for picture in pictures:
            seed = PurePosixPath(picture).stem
            path = source.path / picture
            sample = Sample(f"{folder}/{seed}", prompt, path, (), folder, seed, category)
            reading.add(sample, picture, where=file)
    return reading


def _hpdv2_styles(source: Source) -> dict[str, Path]:
    """Return the folders of numbered pictures that have a list of prompts of the same name."""
    where = source.prompts_path or source.path
    styles = {match[1] for name in source.pictures if (match := _HPDV2.fullmatch(name))}
    files = {style: where / f"{style}.json" for style in sorted(styles)}
    return {style: file for style, file in files.items() if file.is_file()}


def find_hpdv2(source: Source) -> str | None:
    """Look for STYLE/00000.jpg with STYLE.json."""
    styles = _hpdv2_styles(source)
    return f"folders {', '.join(styles)} of numbered pictures, and .json files" if styles else None


def read_hpdv2(source: Source) -> Reading:
    """Read all styles; a prompt without picture is a sample whose picture is missing."""
    styles = _hpdv2_styles(source)
    if not styles:
        raise ValueError(
            f"there are no pictures such as anime/00000.jpg in {source.path} with anime.json beside the "
            "folder; pass prompts=FOLDER if the lists of prompts lie elsewhere"
        )
    reading = Reading()
    for style, file in styles.items():
        prompts = read_prompts(file)
        if not prompts.by_index:
            raise ValueError(f"{file} must hold a list of prompts")
        by_index = {stem_of(name): name for name in source.pictures if name.startswith(f"{style}/")}
        reading.used.add(file.name)
        for index, found in enumerate(prompts.by_index):
            key = f"{style}/{index:05d}"
            name = by_index.get(key, f"{key}.jpg")
            path = existing(source.path / name, f"{file}, item {index + 1}", reading)
            reading.add(Sample(key, found.text, path, prompt_id=key, category=style), name)
    return reading


def find_t2i_compbench(source: Source) -> str | None:
    """Look for names that are a prompt of several words and six digits, in samples/ or the folder."""
    in_samples = [name for name in source.pictures if name.startswith("samples/")]
    names = [_T2I_COMPBENCH.fullmatch(name) for name in in_samples or source.pictures]
    prompts = {match[1] for match in names if match}
    # A prompt has several words; IMG_000001.png and my_photo_000001.png are other pictures.
    if names and all(names) and len(prompts) > 1 and all(" " in prompt for prompt in prompts):
        return f"names are a prompt and six digits, as {(in_samples or source.pictures)[0]!r}"
    return None


def read_t2i_compbench(source: Source) -> Reading:
    """Read all such names; the six digits count the pictures of all prompts."""
    reading = Reading()
    for name in source.pictures:
        if match := _T2I_COMPBENCH.fullmatch(name):
            path = source.path / name
            reading.add(Sample(path.stem, match[1], path, seed=match[2]), name)
    return reading


# --- folders whose prompts are in a file of their own ---


def find_image_reward(source: Source) -> str | None:
    """Look for ID_0.png with a list of ids and prompts."""
    if source.prompts_path is not None and source.prompts_path.is_dir():
        return None
    prompts = source.prompts
    if prompts is None or prompts.name_column != "id":
        return None
    stems = [PurePosixPath(name).stem for name in source.pictures]
    numbered = next((stem for stem in stems if _numbered(stem)[0] in prompts.by_name), None)
    if numbered is None or any(stem in prompts.by_name for stem in stems):
        return None
    return f"{numbered!r} is the id of a prompt in {prompts.file.name} and a number"


def find_prompts(source: Source) -> str | None:
    """Match pictures with the prompts that were passed, unless a benchmark does so."""
    if source.prompts_path is None or _hpdv2_styles(source):
        return None
    if find_image_reward(source) or find_edits(source):
        return None
    prompts = read_prompts(source.prompts_path)
    if not any(_key_of(name, prompts) for name in source.pictures):
        return None
    how = "name" if prompts.by_name else "index"
    return f"pictures have the prompts of {source.prompts_path.name} by {how}"


def read_with_prompts(source: Source) -> Reading:
    """Read all pictures, with the prompts of a file."""
    prompts = source.prompts
    if prompts is None:
        raise ValueError(f"pass prompts=FILE for the pictures in {source.path}")
    reading = Reading()
    met: set[str] = set()
    for name in source.pictures:
        path = source.path / name
        match = _key_of(name, prompts)
        if match is None:
            why = f"{prompts.file.name} has no prompt for it"
            reading.add(Sample(stem_of(name), None, path), name, why=why)
            continue
        key, seed, found = match
        met.add(key)
        sample = Sample(stem_of(name), found.text, path, (), key, seed or found.seed, found.category)
        reading.add(sample, name)
    if prompts.by_index and "0" not in met and "1" in met:
        raise ValueError(
            f"prompts are counted from 0, and the names in {source.path} begin with 1: rename the "
            "pictures, or pass prompts by name, {'1': 'the first prompt'}"
        )
    names = (_INDEXED.fullmatch(PurePosixPath(name).stem) for name in source.pictures)
    words = sorted({repr(match[1] or "") for match in names if match})
    if prompts.by_index and len(words) > 1:
        raise ValueError(
            f"names in {source.path} begin with {' and '.join(words)}, so it is not known what their "
            "numbers count: pass prompts by name"
        )
    for key in prompts.by_name or map(str, range(len(prompts.by_index))):
        if key not in met:
            reading.problem("missing", prompts.file, f"there is no picture for the prompt {key!r}")
    _use_file(reading, source, prompts.file)
    return reading


_INDEXED = re.compile(r"(\D*[_ -])?(\d+)(?:[_-](\d+))?")


def _key_of(name: str, prompts: Prompts) -> tuple[str, str | None, FoundPrompt] | None:
    """Return which prompt a picture belongs to: its key, a number behind it, and the prompt.

    By name, a picture is called as the key, with or without folder and suffix, or ``KEY_3``. By index,
    its name is the index, or ``INDEX_3``, perhaps behind a word, as ``image_00012``.
    """
    stem = PurePosixPath(name).stem
    key, number = _numbered(stem)
    if prompts.by_index:
        indexed = _INDEXED.fullmatch(stem)
        if indexed is None or int(indexed[2]) >= len(prompts.by_index):
            return None
        return _plain_number(indexed[2]), indexed[3], prompts.by_index[int(indexed[2])]
    for whole in (name, stem_of(name), PurePosixPath(name).name, stem, _plain_number(stem)):
        if whole in prompts.by_name:
            return whole, None, prompts.by_name[whole]
    for whole in (_numbered(stem_of(name))[0], key, _plain_number(key)):
        if number is not None and whole in prompts.by_name:
            return whole, number, prompts.by_name[whole]
    return None


def _plain_number(text: str) -> str:
    """Return 7 for 00007, and other texts as they are."""
    return str(int(text)) if text.isdecimal() else text


def _numbered(stem: str) -> tuple[str, str | None]:
    """Split ``KEY_3`` or ``KEY-3``; without a number, the second is None."""
    match = re.fullmatch(r"(.+)[_-](\d+)", stem)
    return (match[1], match[2]) if match else (stem, None)


def _use_file(reading: Reading, source: Source, file: Path) -> None:
    """Note that a file of prompts, or a folder of them, is used if it lies in the source."""
    name = os.path.relpath(file, source.path).replace(os.sep, "/")
    reading.used.update(one for one in source.files if one == name or one.startswith(f"{name}/"))


def _edits_of(source: Source) -> dict[str, str]:
    """Return the sources of edits, by the name of the edited picture without suffix.

    They are called KEY_SRCIMG beside KEY, or KEY in source/ beside edited/.
    """
    sources: dict[str, str] = {}
    has_edited = any(name.startswith("edited/") for name in source.pictures)
    for name in source.pictures:
        stem = stem_of(name)
        if stem.endswith("_SRCIMG"):
            sources[stem.removesuffix("_SRCIMG")] = name
        elif has_edited and stem.startswith("source/"):
            sources["edited/" + stem.removeprefix("source/")] = name
    return sources


def find_edits(source: Source) -> str | None:
    """Look for the sources of edits."""
    first = next(iter(_edits_of(source).values()), None)
    return f"{first!r} is the source of an edit" if first else None


def read_edits(source: Source) -> Reading:
    """Read all edits; a source without edited picture is a sample whose picture is missing."""
    reading = Reading()
    prompts = source.prompts
    if prompts is None:
        reading.without_prompts(source.path, "pass prompts=FILE with the instructions")
    sources = _edits_of(source)
    origins = set(sources.values())
    edited = {stem_of(name): name for name in source.pictures if name not in origins}
    for stem, origin in sources.items():
        name = edited.get(stem, f"{stem}.png")
        path = existing(source.path / name, source.path / origin, reading)
        match = _key_of(name, prompts) if prompts else None
        found = match[2] if match else FoundPrompt(None)
        # GEdit-Bench's folders are fullset/TASK/LANGUAGE.
        folders = [part for part in name.split("/")[:-1] if part not in ("fullset", "edited")]
        category = found.category or (folders[0] if folders else None)
        sample = Sample(stem, found.text, path, (source.path / origin,), stem, None, category)
        reading.add(sample, name, origin, why="there is no instruction for it")
    if prompts is not None:
        _use_file(reading, source, prompts.file)
    return reading


# --- pictures alone ---


def find_images(source: Source) -> str | None:
    """Take any pictures."""
    return f"{len(source.pictures)} pictures and no prompts" if source.pictures else None


def read_images(source: Source) -> Reading:
    """Read all pictures, without prompts."""
    reading = Reading()
    tables = [name for name in source.files if suffix_of(name) in (".txt", *MANIFESTS)]
    hint = f"; does {tables[0]} hold them? prompts={str(source.path / tables[0])!r}" if tables else ""
    reading.without_prompts(source.path, f"pass prompts=FILE for metrics that need prompts{hint}")
    for name in source.pictures:
        reading.add(Sample(stem_of(name), None, source.path / name), name)
    return reading
