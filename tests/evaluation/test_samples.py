"""Reading samples: what columns mean, what a manifest may name, and what is said of everything else."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffsynth_metrics import CLIPMetric, ModelConfig
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.evaluation import shards
from diffsynth_metrics.evaluation.samples import (
    PackedImage,
    Sample,
    SampleSet,
    open_reference,
    read_samples,
)


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 3), "red").save(path)
    return path


def manifest(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


# --- which files a manifest may name ---


def test_a_manifest_may_not_name_files_outside_its_folder(tmp_path: Path) -> None:
    outside = draw(tmp_path / "secret/1.png")
    folder = tmp_path / "data"
    draw(folder / "1.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    attacks = (
        "../secret/1.png",
        "sub/../../secret/1.png",
        "..",
        str(outside),
        "//server/share/1.png",
        "C:/secret/1.png",
        "C:1.png",
        "link.png",
        "linked/1.png",
        "linked/../1.png",
    )
    for attack in attacks:
        file = manifest(folder, {"image": "1.png", "prompt": "x"}, {"image": attack, "prompt": "x"})
        with pytest.raises(ValueError) as caught:
            read_samples(file)
        assert f"{file}, line 2" in str(caught.value), attack
        assert repr(attack) in str(caught.value)
        assert "allow_outside=True" in str(caught.value)
    for attack in ("..\\secret\\1.png", "images\\1.png", "\\\\server\\1.png"):
        with pytest.raises(ValueError, match=r"line 1: write .* with /"):
            read_samples(manifest(folder, {"image": attack, "prompt": "x"}))


def test_sources_and_paths_in_parquet_cells_are_held_to_the_same_rule(tmp_path: Path) -> None:
    draw(tmp_path / "secret.png")
    draw(tmp_path / "data/1.png")
    row = {"image": "1.png", "source_image": "../secret.png", "prompt": "x"}
    with pytest.raises(ValueError, match="outside"):
        read_samples(manifest(tmp_path / "data", row))
    table = pa.table({"image": [{"bytes": None, "path": "../secret.png"}]})
    pq.write_table(
        table.cast(pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})),
        tmp_path / "data/a.parquet",
    )
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: '\.\./secret\.png' is outside"):
        read_samples(tmp_path / "data/a.parquet")
    (tmp_path / "data/metadata.csv").write_text("file_name,text\n../secret.png,x\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2"):
        read_samples(tmp_path / "data", layout="imagefolder")


def test_a_trusted_manifest_may_name_any_file_but_no_address(tmp_path: Path) -> None:
    outside = draw(tmp_path / "other/1.png")
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"image": "../other/1.png"}, {"image": str(outside), "id": "b"}]
    samples = read_samples(manifest(folder, *rows), allow_outside=True)
    assert [os.path.samefile(str(sample.image), outside) for sample in samples] == [True, True]
    for address in ("https://example.org/1.png", "s3://bucket/1.png", "data:image/png;base64,AAAA"):
        for trusted in (False, True):
            with pytest.raises(ValueError, match=r"line 1: download .* first"):
                read_samples(manifest(folder, {"image": address}), allow_outside=trusted)


def test_what_is_no_file_name_is_an_error(tmp_path: Path) -> None:
    for wrong in (3, True, {"path": 1}, ["1.png"], "a\0b.png", "  "):
        with pytest.raises(ValueError, match=r"data\.jsonl, line 1: .* is no name of a picture file"):
            read_samples(manifest(tmp_path, {"image": wrong, "prompt": "x"}))


def test_dots_inside_a_name_are_harmless(tmp_path: Path) -> None:
    for name in ("wait...what.png", "..png.png", "a..b/1.png"):
        draw(tmp_path / name)
        assert read_samples(manifest(tmp_path, {"image": name}))[0].image == tmp_path / name


def test_a_folder_that_is_a_link_itself_is_read(tmp_path: Path) -> None:
    draw(tmp_path / "real/1.png")
    manifest(tmp_path / "real", {"image": "1.png", "prompt": "x"})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(read_samples(tmp_path / "link/data.jsonl")) == 1
    (tmp_path / "real/loop").symlink_to(tmp_path / "real")
    assert len(read_samples(tmp_path / "real", layout="images")) == 1


# --- columns ---


def test_columns_of_other_names_are_told(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    row = {"Bild": "1.png", "Wunsch": "a cat", "nr": 7, "alt": "1.png", "prompt": "another text"}
    file = manifest(tmp_path, row)
    columns = {"image": "Bild", "prompt": "Wunsch", "id": "nr", "source": "alt"}
    [sample] = read_samples(file, columns=columns)
    assert sample == Sample(
        id="7",
        prompt="a cat",
        image=tmp_path / "1.png",
        sources=(tmp_path / "1.png",),
        prompt_id=sample.prompt_id,
    )
    for wrong, message in (
        ({"image": "Foto"}, r"no column 'Foto' in .*it has 'Bild', 'Wunsch'"),
        ({"picture": "Bild"}, "columns has the keys image, prompt"),
        ({"prompt": "Wunsch"}, r"say which column of .*data\.jsonl names the pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            read_samples(file, columns=wrong)


def test_columns_that_are_no_mapping_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"columns must be a dict such as .* got list"):
        read_samples(manifest(tmp_path, {"image": "1.png"}), columns=["image"])  # type: ignore[arg-type]


def test_two_columns_for_one_thing_are_an_error(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    file = manifest(tmp_path, {"image": "1.png", "caption": "a", "prompt": "b"})
    with pytest.raises(ValueError, match=r"which column .* is the prompt, 'prompt' or 'caption'"):
        read_samples(file)
    assert read_samples(file, columns={"prompt": "caption"})[0].prompt == "a"


def test_capitals_of_columns_do_not_matter(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    row = {"File_Name": "1.png", "Prompt": "a", "Prompt_ID": 3, "Seed": 1.0, "Style": "x"}
    [sample] = read_samples(manifest(tmp_path, row))
    assert (sample.prompt, sample.prompt_id, sample.seed, sample.category) == ("a", "3", "1", "x")


def test_columns_that_are_not_read_are_said(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    samples = read_samples(manifest(tmp_path, {"image": "1.png", "prompt": "a", "steps": 20}))
    assert "not read: 'steps'" in samples.reason


# --- ids ---


def test_ids_that_repeat_with_one_prompt_are_those_of_the_prompt(tmp_path: Path) -> None:
    rows = [{"id": 1, "image": f"{name}.png", "prompt": "a cat"} for name in "ab"]
    for name in "ab":
        draw(tmp_path / f"{name}.png")
    samples = read_samples(manifest(tmp_path, *rows))
    assert [(sample.id, sample.prompt_id) for sample in samples] == [("a", "1"), ("b", "1")]
    [problem] = samples.problems
    assert problem.kind == "duplicate" and "line 2" in problem.file


def test_ids_that_repeat_with_another_prompt_are_an_error(tmp_path: Path) -> None:
    rows = [{"id": 1, "image": f"{name}.png", "prompt": name} for name in "ab"]
    with pytest.raises(ValueError, match=r"line 2: the id '1' is also that of .*line 1"):
        read_samples(manifest(tmp_path, *rows))


def test_one_picture_in_two_rows_needs_ids(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    rows = [{"image": "1.png", "prompt": prompt} for prompt in ("a", "b")]
    with pytest.raises(ValueError, match=r"'a', and .*1\.png with 'b'.* column 'id'"):
        read_samples(manifest(tmp_path, *rows))
    rows = [{**row, "id": row["prompt"]} for row in rows]
    assert [sample.id for sample in read_samples(manifest(tmp_path, *rows))] == ["a", "b"]


def test_pictures_of_one_name_keep_their_suffix_in_the_id(tmp_path: Path) -> None:
    for name in ("1.png", "1.jpg", "2.png"):
        draw(tmp_path / name)
    samples = read_samples(tmp_path)
    assert [sample.id for sample in samples] == ["1.jpg", "1.png", "2"]
    assert [problem.kind for problem in samples.problems] == ["no prompt", "duplicate", "duplicate"]


# --- what is missing or wrong ---


def test_rows_without_picture_or_prompt_stay_and_are_said(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    draw(tmp_path / "images/stray.png")
    draw(tmp_path / "images/2.png")
    (tmp_path / "data.csv").write_text("image,prompt\n1.png,\nimages/2.png,a\nnone.png,b\n,c\n")
    samples = read_samples(tmp_path / "data.csv")
    assert [sample.prompt for sample in samples] == [None, "a", "b", "c"]
    assert sorted((problem.kind, Path(problem.file).name) for problem in samples.problems) == [
        ("missing", "data.csv, line 4"),
        ("missing", "data.csv, line 5"),
        ("no prompt", "data.csv, line 2"),
        ("unused", "stray.png"),
    ]
    assert not any(Path(str(sample.image)).is_file() for sample in samples[2:])


def test_broken_tables_are_named_with_their_line(tmp_path: Path) -> None:
    wrong = {
        "a.csv": (b"", "no first line"),
        "b.csv": (b"image,prompt\n", "has no rows"),
        "i.csv": (
            b"image,prompt\n1.png,a\n2.png," + b"a" * 131_073 + b"\n",
            r"i\.csv, line 3: a value is longer than 131,072 characters, .* \.jsonl",
        ),
        "c.csv": (b"image,prompt\n1.png,a,b\n", r"c\.csv, line 2: it has 3 values, and .* 2 columns"),
        "d.csv": (b'image,prompt\n1.png,"a\n2.png,b\n', r"d\.csv, line 3: it is no table"),
        "e.csv": (b"image;prompt\n1.png;a\n", "semicolons"),
        "f.csv": (b"image,prompt,prompt\n1.png,a,b\n", "two columns that are called 'prompt'"),
        "g.csv": (
            b"image,prompt\n1.png,a\n2.png,caf\xe9\n",
            r"save .*g\.csv as UTF-8: byte 0xe9 in line 3",
        ),
        "h.csv": ("image,prompt\n1.png,a\n".encode("utf-16"), "as UTF-8"),
        "a.jsonl": (b'{"image": "1.png"}\n{"image": \n', r"a\.jsonl, line 2: it is no JSON"),
        "b.jsonl": (b'["1.png"]\n', r"b\.jsonl, line 1: it must be an object .* is a list"),
        "c.jsonl": (
            b'{"image": "1.png", "prompt": 3}',
            r"line 1: a prompt must be a text, and is a number",
        ),
        "d.jsonl": (
            b'{"image": "1.png", "prompt": "\\ud800"}',
            "line 1: the prompt is not valid Unicode",
        ),
        "e.jsonl": (b'{"image": "1.png", "seed": {"a": 1}}', "line 1: an id, seed or category must be"),
        "f.jsonl": (b"\n\n", "has no rows"),
        "a.json": (b" ", "is empty"),
        "b.json": (
            b'{"x": "a cat"}',
            r"must be a list of objects, .* is an object.* passed as prompts=",
        ),
        "c.json": (b'{"image": "1.png"}\n{"image": "2.png"}\n', r"call it \.jsonl"),
        "d.json": (b"[1]", r"d\.json, item 1: it must be an object"),
        "e.json": (b"[" * 100_000, r"e\.json is no JSON: .* nested too deeply"),
        "g.jsonl": (b"[" * 100_000, r"g\.jsonl, line 1: it is no JSON: .* nested too deeply"),
        "a.parquet": (b"PAR1", r"a\.parquet cannot be read as parquet"),
    }
    for name, (contents, message) in wrong.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=message):
            read_samples(tmp_path / name)


def test_line_ends_of_windows_and_byte_order_marks_are_no_part_of_values(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfimage,prompt\r\n1.png,"a\r\nb"\r\n\r\n')
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "1.png", "prompt": "a\\r\\nb"}\r\n')
    for name in ("a.csv", "a.jsonl"):
        assert [sample.prompt for sample in read_samples(tmp_path / name)] == ["a\r\nb"]


def test_spaces_behind_commas_belong_to_a_table_whose_names_have_them(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    (tmp_path / "b.csv").write_text("prompt,image,id\n a cat,1.png,x\n")
    (tmp_path / "a.csv").write_text('image, prompt, id\n1.png, "a cat, black", x\n1.png, a dog, y\n')
    assert [sample.prompt for sample in read_samples(tmp_path / "a.csv")] == ["a cat, black", "a dog"]
    assert [sample.prompt for sample in read_samples(tmp_path / "b.csv")] == [" a cat"]


def test_sources_that_are_nothing_to_read(tmp_path: Path) -> None:
    picture = draw(tmp_path / "data/1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").touch()
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "a.zip").touch()
    for source, message in (
        (picture, r"pass the folder of the pictures.*metric\.compute"),
        (tmp_path / "empty", r"no pictures in .*empty or below it; there is nothing"),
        (tmp_path / "notes", r"there is 1 \.md"),
        (tmp_path / "a.txt", r"pass the folder of the pictures, and prompts="),
        (tmp_path / "a.zip", "unpack or decompress it first"),
    ):
        with pytest.raises(ValueError, match=message):
            read_samples(source)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (
        ("nowhere", r"no file or folder .*nowhere'$"),
        ("a.txt/x", r"no file or folder .*a\.txt/x'$"),
        ("n" * 301, r"no file or folder .*nnn': File name too long"),
        ("loop", r"no file or folder .*loop': Too many levels of symbolic links"),
        ("a\0b", "no file or folder .*: embedded null"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            read_samples(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.csv")
    for special in ("/dev/null", tmp_path / "pipe.csv"):
        with pytest.raises(ValueError, match="is a device, a pipe or a socket"):
            read_samples(special)


def test_hidden_files_are_left_out_and_counted(tmp_path: Path) -> None:
    for name in ("1.png", ".2.png", ".checkpoints/3.png"):
        draw(tmp_path / name)
    samples = read_samples(tmp_path)
    assert len(samples) == 1
    assert "2 names that begin with a dot" in samples.problems[-1].message


def test_parquet_without_pyarrow_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"image": ["1.png"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install "diffsynth-metrics\[eval\]"'):
        read_samples(tmp_path / "a.parquet")


def test_no_picture_is_opened(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "data.csv").write_text("image,prompt\n1.png,a\n2.png,b\n")
    assert len(read_samples(tmp_path / "data.csv")) == 2
    assert len(read_samples(tmp_path, layout="images")) == 2


# --- packed images ---


@pytest.fixture(scope="module")
def shapes() -> CLIPMetric:
    return CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"))


def pack(folder: Path) -> tuple[list[PIL.Image.Image], list[list[PackedImage]]]:
    """Return three drawings, and the same in a tar shard and in a parquet file."""
    drawings = [draw_shape("circle", color) for color in ("red", "green", "blue")]
    contents = []
    for drawing in drawings:
        file = io.BytesIO()
        drawing.save(file, "PNG")
        contents.append(file.getvalue())
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, one in enumerate(contents):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(one)
            tar.addfile(info, io.BytesIO(one))
    pq.write_table(
        pa.table({"image": contents, "prompt": list("abc")}), folder / "a.parquet", row_group_size=2
    )
    read = [read_samples(folder / name) for name in ("a.tar", "a.parquet")]
    return drawings, [
        [image for sample in samples if isinstance(image := sample.image, PackedImage)]
        for samples in read
    ]


def test_metrics_take_packed_images_as_they_take_files(tmp_path: Path, shapes: CLIPMetric) -> None:
    drawings, packed = pack(tmp_path)
    expected = shapes.compute("a red circle", drawings)
    for images in packed:
        assert shapes.compute("a red circle", images) == pytest.approx(expected, abs=1e-4)
        assert shapes.compute("a red circle", images[0]) == pytest.approx(expected[:1], abs=1e-4)


def test_packed_images_come_back_from_their_names_and_from_pickle(tmp_path: Path) -> None:
    _, packed = pack(tmp_path)
    for images in packed:
        for image in images:
            for copy in (open_reference(str(image)), pickle.loads(pickle.dumps(image))):
                assert copy == image
                assert copy.read() == image.read()
    odd = PackedImage(tmp_path / "x.tar::y/a.tar", "b::c.png")
    assert str(open_reference(str(tmp_path / "1.png"))) == str(tmp_path / "1.png")
    assert str(open_reference(str(odd))) == str(odd)


def test_a_packed_image_that_is_not_there_is_named(tmp_path: Path, shapes: CLIPMetric) -> None:
    pack(tmp_path)
    for file, member in (("a.tar", "9.png"), ("a.parquet", "image[9]"), ("a.parquet", "other[0]")):
        image = PackedImage(tmp_path / file, member)
        with pytest.raises(FileNotFoundError, match=file):
            image.read()
        with pytest.raises(ImageError, match=r"image 0 \(.*a\.(tar|parquet)::"):
            shapes.compute("a red circle", [image])
    with pytest.raises(FileNotFoundError):
        PackedImage(tmp_path / "gone.tar", "1.png").read()


def test_a_shard_that_changed_is_read_again(tmp_path: Path) -> None:
    _, (in_tar, _) = pack(tmp_path)
    before = in_tar[0].read()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"new"))
    assert (before[:4], in_tar[0].read()) == (b"\x89PNG", b"new")


def test_neighbours_in_a_row_group_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (_, in_parquet) = pack(tmp_path)
    opened = []
    original = shards.open_parquet
    monkeypatch.setattr(shards, "open_parquet", lambda file: opened.append(file) or original(file))
    for image in in_parquet:
        image.read()
    assert len(opened) == 3  # the list of row groups, and the two groups


def test_a_part_of_a_set_keeps_how_it_was_read(tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / f"{number}.png")
    samples = read_samples(tmp_path)
    part = samples[1:]
    assert isinstance(part, SampleSet) and len(part) == 2
    assert (part.layout, part.reason, part.problems) == (
        samples.layout,
        samples.reason,
        samples.problems,
    )
    assert "3 samples, 1 problems; images" in repr(samples)
