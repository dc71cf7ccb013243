"""Each layout, with files as their writers make them, and a neighbour that is not taken for it."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.PngImagePlugin
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffsynth_metrics.evaluation.layouts import NAMES
from diffsynth_metrics.evaluation.samples import PackedImage, SampleSet, read_samples

A1111 = (
    "a red cat,\non a mat\nNegative prompt: dog, blurry\n"
    "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 2179987202, Size: 512x512, Model: sd15"
)


def draw(path: Path, color: str = "red", kind: str | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 3), color).save(path, kind, **options)
    return path


def encoded(color: str = "red") -> bytes:
    contents = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), color).save(contents, "PNG")
    return contents.getvalue()


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def text_in_png(path: Path, **texts: str) -> Path:
    chunks = PIL.PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    return draw(path, pnginfo=chunks)


def kinds(samples: SampleSet) -> list[str]:
    return [problem.kind for problem in samples.problems]


def fields(samples: SampleSet, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(sample, name) for name in names) for sample in samples]


# --- manifests ---


def test_a_manifest_is_read_in_every_format(tmp_path: Path) -> None:
    rows = [
        {
            "id": "x",
            "prompt": 'a "red", cat\non a mat',
            "image_path": "images/1.png",
            "seed": 7,
            "tags": ["a", "b"],
        },
        {"id": "y", "prompt": "ein Bär", "image_path": "images/2.png", "seed": 8, "tags": ["a"]},
    ]
    draw(tmp_path / "images/1.png")
    draw(tmp_path / "images/2.png")
    write(tmp_path / "a.json", rows)
    write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
    flat = [{**row, "tags": ", ".join(row["tags"])} for row in rows]  # type: ignore[arg-type]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "a.parquet")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(flat)
    for name in ("a.json", "a.jsonl", "a.parquet", "a.csv", "a.tsv"):
        samples = read_samples(tmp_path / name)
        assert samples.layout == "manifest", name
        assert fields(samples, "id", "prompt", "seed", "category") == [
            ("x", 'a "red", cat\non a mat', "7", "a, b"),
            ("y", "ein Bär", "8", "a"),
        ], name
        assert samples[0].image == tmp_path / "images/1.png"
        assert samples.problems == ()
        assert "image='image_path'" in samples.reason


def test_a_folder_with_one_manifest_is_read_by_it(tmp_path: Path) -> None:
    draw(tmp_path / "images/1.png")
    write(tmp_path / "data.csv", "image,prompt\nimages/1.png,a cat\n")
    write(tmp_path / "loss.csv", "step,loss\n1,0.5\n")
    (tmp_path / "log.csv").touch()
    samples = read_samples(tmp_path)
    assert (samples.layout, samples[0].prompt) == ("manifest", "a cat")
    assert [Path(p.file).name for p in samples.problems] == ["log.csv", "loss.csv"]
    write(tmp_path / "more.csv", "image,prompt\nimages/1.png,a cat\n")
    with pytest.raises(ValueError, match=r"pass one manifest .*data.csv and more.csv"):
        read_samples(tmp_path)


def test_sources_of_a_manifest(tmp_path: Path) -> None:
    for name in ("e.png", "s.png", "r1.png", "r2.png"):
        draw(tmp_path / name)
    row = {
        "image": "e.png",
        "instruction": "add a hat",
        "source_image": "s.png",
        "reference_file_names": ["r1.png", "r2.png"],
        "source": "LAION",  # no picture, so no source
    }
    write(tmp_path / "edits.jsonl", row)
    [sample] = read_samples(tmp_path / "edits.jsonl")
    assert sample.sources == tuple(tmp_path / name for name in ("s.png", "r1.png", "r2.png"))
    assert sample.prompt == "add a hat"
    assert sample.prompt_id is not None and sample.prompt_id.startswith("e-")


def test_an_imagefolder_as_datasets_reads_it(tmp_path: Path) -> None:
    for split in ("train", "test"):
        draw(tmp_path / split / "1.png")
        draw(tmp_path / split / "2.png")
        rows = [{"file_name": f"{number}.png", "text": f"{split} {number}"} for number in (1, 2)]
        write(tmp_path / split / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    samples = read_samples(tmp_path)
    assert samples.layout == "imagefolder"
    assert fields(samples, "id", "prompt") == [
        ("test/1", "test 1"),
        ("test/2", "test 2"),
        ("train/1", "train 1"),
        ("train/2", "train 2"),
    ]


def test_an_imagefolder_with_sources_and_pictures_that_it_does_not_name(tmp_path: Path) -> None:
    for name in ("out.png", "in.png", "extra.png"):
        draw(tmp_path / name)
    write(tmp_path / "metadata.csv", "file_name,input_file_name,text\nout.png,in.png,add a hat\n")
    samples = read_samples(tmp_path)
    assert samples[0].image == tmp_path / "out.png"
    assert samples[0].sources == (tmp_path / "in.png",)
    assert [(p.kind, p.file) for p in samples.problems] == [("unused", str(tmp_path / "extra.png"))]


def test_metadata_without_file_names_is_no_imagefolder(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    write(tmp_path / "metadata.jsonl", {"tag": "counting", "prompt": "two cats"})
    samples = read_samples(tmp_path)
    assert samples.layout == "images"
    assert kinds(samples) == ["no prompt", "unused"]


def with_pyarrow(rows: dict[str, list[Any]], file: Path) -> None:
    """Write as datasets does: it says in the schema's metadata which columns are pictures."""
    features = {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(rows).replace_schema_metadata(metadata), file, row_group_size=2)


def with_datasets(rows: dict[str, list[Any]], file: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "embedding": datasets.Sequence(datasets.Value("float32")),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file), batch_size=2)


@pytest.mark.parametrize("writer", [with_pyarrow, with_datasets])
def test_parquet_files_with_pictures(tmp_path: Path, writer: Callable[..., None]) -> None:
    colors = ("red", "blue", "green")
    rows = {
        "image": [{"bytes": encoded(color), "path": f"{color}.png"} for color in colors],
        "caption": list(colors),
        "embedding": [[0.5] * 4] * 3,
    }
    file = tmp_path / "data/train-00000-of-00001.parquet"
    file.parent.mkdir()
    writer(rows, file)
    for source in (file.parent, file):
        samples = read_samples(source)
        assert samples.layout == "parquet"
        assert [sample.id[-2:] for sample in samples] == ["-0", "-1", "-2"]
        assert "not read: 'embedding'" in samples.reason
        for sample, color in zip(samples, colors, strict=True):
            assert isinstance(sample.image, PackedImage)
            assert (sample.prompt, sample.image.read()) == (color, encoded(color))


def test_a_parquet_cell_may_hold_a_path_or_nothing(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    cells = [{"bytes": None, "path": "1.png"}, {"bytes": encoded(), "path": None}, None]
    table = pa.table({"image": cells, "prompt": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    samples = read_samples(tmp_path / "a.parquet")
    assert samples[0].image == tmp_path / "1.png"
    assert samples[1].image == PackedImage(tmp_path / "a.parquet", "image[1]")
    assert kinds(samples) == ["missing"]
    assert "row 3" in samples.problems[0].file


def test_a_parquet_file_with_a_column_of_bytes_and_sources(tmp_path: Path) -> None:
    table = pa.table(
        {"image": [encoded("red")], "source_image": [encoded("blue")], "instruction": ["x"]}
    )
    pq.write_table(table, tmp_path / "edits.parquet")
    [sample] = read_samples(tmp_path / "edits.parquet")
    [source] = sample.sources
    assert isinstance(source, PackedImage) and source.read() == encoded("blue")


def test_the_only_column_of_pictures_may_have_any_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [encoded()], "text": ["a cat"]}), tmp_path / "a.parquet")
    [sample] = read_samples(tmp_path / "a.parquet")
    assert sample.image == PackedImage(tmp_path / "a.parquet", "jpg[0]")
    pq.write_table(pa.table({"a": [encoded()], "b": [encoded()]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"say which column of .* names the pictures"):
        read_samples(tmp_path / "b.parquet")


# --- shards ---


def shard(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, contents in files:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path


def test_webdataset_shards(tmp_path: Path) -> None:
    labels = json.dumps({"caption": "a cat", "seed": 3, "style": "photo"}).encode()
    first = [
        ("000.png", encoded("red")),
        ("000.txt", b"a cat\n"),
        ("000.json", labels),
        ("000.npy", b"0"),
    ]
    second = [("a/001.v2.png", encoded("blue")), ("a/002.png", encoded("green")), ("a/002.json", labels)]
    shard(tmp_path / "s-0.tar", first)
    shard(tmp_path / "s-1.tar", second)
    samples = read_samples(tmp_path)
    assert samples.layout == "webdataset"
    assert fields(samples, "id", "prompt", "seed", "category") == [
        ("000", "a cat", "3", "photo"),
        ("a/002", "a cat", "3", "photo"),
    ]
    assert samples[1].image == PackedImage(tmp_path / "s-1.tar", "a/002.png")
    assert samples[1].image.read() == encoded("green")  # type: ignore[union-attr]
    # 001.v2.png belongs to the sample 001 and is no picture of its own.
    assert kinds(samples) == ["unused", "unused"]


def test_a_text_goes_before_another_prompt_in_the_labels(tmp_path: Path) -> None:
    labels = json.dumps({"caption": "a dog"}).encode()
    shard(tmp_path / "a.tar", [("0.png", encoded()), ("0.txt", b"a cat"), ("0.json", labels)])
    samples = read_samples(tmp_path / "a.tar")
    assert (samples[0].prompt, kinds(samples)) == ("a cat", ["ambiguous"])


def test_keys_that_occur_in_several_shards_get_the_name_of_the_shard(tmp_path: Path) -> None:
    for name in ("s-0.tar", "s-1.tar"):
        shard(tmp_path / name, [("000.png", encoded()), ("000.txt", b"a cat")])
    samples = read_samples(tmp_path)
    assert fields(samples, "id") == [("s-0/000",), ("s-1/000",)]
    assert kinds(samples) == ["duplicate"]


def test_damaged_and_compressed_shards_are_named(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", [("0.png", encoded() * 50), ("0.txt", b"x")])
    cut = tmp_path / "cut/b.tar"
    cut.parent.mkdir()
    cut.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"b\.tar"):
        read_samples(cut)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(whole, "0.png")
    with pytest.raises(ValueError, match="decompress it first"):
        read_samples(tmp_path / "c.tar.gz")
    (tmp_path / "c.tar.gz").rename(tmp_path / "d.tar")
    with pytest.raises(ValueError, match=r"d\.tar .* may not be compressed"):
        read_samples(tmp_path / "d.tar")
    twice = shard(tmp_path / "e.tar", [("0.png", encoded()), ("0.jpg", encoded())])
    with pytest.raises(ValueError, match="several pictures of '0'"):
        read_samples(twice)


def test_a_tar_file_beside_pictures_is_no_shard(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    shard(tmp_path / "backup.tar", [("1.png", encoded())])
    samples = read_samples(tmp_path)
    assert samples.layout == "images"
    assert kinds(samples) == ["no prompt", "unused"]


# --- prompts beside pictures ---


def test_sidecars(tmp_path: Path) -> None:
    draw(tmp_path / "a/1.png")
    draw(tmp_path / "a/2.jpg")
    draw(tmp_path / "3.png")
    (tmp_path / "a/1.txt").write_bytes(b"\xef\xbb\xbfa cat,\r\nsitting\r\n")
    write(tmp_path / "a/2.txt", " \n")
    write(tmp_path / "4.txt", "a prompt without picture")
    samples = read_samples(tmp_path)
    assert samples.layout == "sidecar"
    assert fields(samples, "id", "prompt") == [("3", None), ("a/1", "a cat,\r\nsitting"), ("a/2", None)]
    assert [(p.kind, Path(p.file).name) for p in samples.problems] == [
        ("no prompt", "3.png"),
        ("no prompt", "2.txt"),
        ("unused", "4.txt"),
    ]


def test_sidecars_that_a1111_wrote_are_the_prompt_only(tmp_path: Path) -> None:
    draw(tmp_path / "1.jpg")
    write(tmp_path / "1.txt", A1111)
    [sample] = read_samples(tmp_path)
    assert (sample.prompt, sample.seed) == ("a red cat,\non a mat", "2179987202")


def test_a_readme_is_no_sidecar(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    write(tmp_path / "prompts.txt", "a cat")
    samples = read_samples(tmp_path)
    assert samples.layout == "images"
    assert (
        f"does prompts.txt hold them? prompts={str(tmp_path / 'prompts.txt')!r}"
        in samples.problems[0].message
    )


def test_text_that_a1111_writes_into_png_files(tmp_path: Path) -> None:
    text_in_png(tmp_path / "1.png", parameters=A1111)
    text_in_png(
        tmp_path / "2.png", parameters=A1111.replace("a red cat", "<lora:mine:0.8> a (red:1.3) cat")
    )
    draw(tmp_path / "3.png")
    samples = read_samples(tmp_path)
    assert samples.layout == "png_text"
    assert fields(samples, "prompt", "seed")[0] == ("a red cat,\non a mat", "2179987202")
    assert kinds(samples) == ["markup", "no prompt"]


def test_png_files_with_other_texts_hold_no_prompt(tmp_path: Path) -> None:
    text_in_png(tmp_path / "1.png", Software="GIMP", Comment="a cat")
    assert read_samples(tmp_path).layout == "images"


def comfyui_graph(**changes: Any) -> dict[str, Any]:
    """The default workflow, as ComfyUI saves it in its API's format."""
    graph = {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 42,
                "steps": 20,
                "model": ["4", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red cat", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    }
    return {**graph, **changes}


def test_the_one_positive_text_of_a_comfyui_graph(tmp_path: Path) -> None:
    sampler = comfyui_graph()["3"]
    second = {**sampler, "inputs": {**sampler["inputs"], "latent_image": ["3", 0]}}
    through = {**sampler, "inputs": {**sampler["inputs"], "positive": ["9", 0]}}
    guidance = {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}}
    control = {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["6", 0], "negative": ["7", 0]},
    }
    linked = {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0], "clip": ["4", 1]}}
    text = {"class_type": "PrimitiveString", "inputs": {"value": "a red cat"}}
    guider = {"class_type": "BasicGuider", "inputs": {"model": ["4", 0], "conditioning": ["9", 0]}}
    noise = {"class_type": "RandomNoise", "inputs": {"noise_seed": 42}}
    graphs = {
        "default": comfyui_graph(),
        "two passes": comfyui_graph(**{"10": second}),
        "guidance": comfyui_graph(**{"3": through, "9": guidance}),
        "control": comfyui_graph(**{"3": through, "9": control}),
        "linked": comfyui_graph(**{"6": linked, "8": text}),
        "flux": comfyui_graph(**{"3": guider, "9": guidance, "10": noise}),
    }
    for name, graph in graphs.items():
        text_in_png(tmp_path / f"{name}.png", prompt=json.dumps(graph), workflow="{}")
    samples = read_samples(tmp_path)
    assert samples.layout == "png_text"
    for sample in samples:
        assert (sample.prompt, sample.seed) == ("a red cat", "42"), sample.id


def test_a_comfyui_graph_whose_prompt_is_not_known_says_why(tmp_path: Path) -> None:
    sampler = comfyui_graph()["3"]
    other = {**sampler, "inputs": {**sampler["inputs"], "positive": ["7", 0]}}
    through = {**sampler, "inputs": {**sampler["inputs"], "positive": ["9", 0]}}
    combine = {
        "class_type": "ConditioningCombine",
        "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["7", 0]},
    }
    unknown = {"class_type": "MagicPrompt", "inputs": {"seed": 1}}
    linked = {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0], "clip": ["4", 1]}}
    wildcard = {"class_type": "Wildcards", "inputs": {"text": "a {red|blue} cat", "seed": 3}}
    loop = {"class_type": "FluxGuidance", "inputs": {"conditioning": ["9", 0]}}
    negative = {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["6", 0], "negative": ["7", 0]},
    }
    second_output = {**sampler, "inputs": {**sampler["inputs"], "positive": ["9", 1]}}
    graphs = {
        "2 different positive prompts": comfyui_graph(**{"10": other}),
        "2 different positive prompts, one sampler": comfyui_graph(**{"3": through, "9": combine}),
        "a node 'MagicPrompt' before the sampler": comfyui_graph(**{"3": through, "9": unknown}),
        "computes the text": comfyui_graph(**{"6": linked, "8": wildcard}),
        "a broken link": comfyui_graph(**{"3": through, "9": loop}),
        "a node 'ControlNetApplyAdvanced'": comfyui_graph(**{"3": second_output, "9": negative}),
        "no positive prompt": {"1": {"class_type": "LoadImage", "inputs": {"image": "x.png"}}},
        "is no graph of ComfyUI": ["a red cat"],
    }
    for number, graph in enumerate(graphs.values()):
        text_in_png(tmp_path / f"{number}.png", prompt=json.dumps(graph))
    text_in_png(tmp_path / "9.png", prompt="a red cat")
    samples = read_samples(tmp_path)
    assert [sample.prompt for sample in samples] == [None] * 9
    assert set(kinds(samples)) == {"no prompt"}
    for problem, expected in zip(samples.problems, [*graphs, "it is no JSON"], strict=True):
        assert expected.split(", one")[0] in problem.message


# --- benchmarks ---


def test_geneval(tmp_path: Path) -> None:
    for index, prompt in enumerate(("a photo of a bench", "two cats")):
        folder = tmp_path / f"{index:0>5}"
        write(folder / "metadata.jsonl", {"tag": "single_object", "include": [], "prompt": prompt})
        for number in range(2):
            draw(folder / "samples" / f"{number:05}.png")
        draw(folder / "grid.png")
    samples = read_samples(tmp_path)
    assert samples.layout == "geneval"
    assert fields(samples, "id", "prompt", "prompt_id", "seed", "category")[1] == (
        "00000/00001",
        "a photo of a bench",
        "00000",
        "00001",
        "single_object",
    )
    assert len(samples) == 4
    assert [(p.kind, Path(p.file).name) for p in samples.problems] == [("unused", "grid.png")] * 2


def test_geneval_without_samples_is_something_else(tmp_path: Path) -> None:
    draw(tmp_path / "00000/image.png")
    write(tmp_path / "00000/metadata.jsonl", {"file_name": "image.png", "prompt": "a cat"})
    assert read_samples(tmp_path).layout == "imagefolder"


def test_hpdv2(tmp_path: Path) -> None:
    for style in ("anime", "photo"):
        write(tmp_path / "benchmark" / f"{style}.json", [f"{style} {index}" for index in range(3)])
        for index in range(2):
            draw(tmp_path / "images/mine" / style / f"{index:05d}.jpg")
    samples = read_samples(tmp_path / "images/mine", prompts=tmp_path / "benchmark")
    assert samples.layout == "hpdv2"
    assert fields(samples, "id", "prompt", "prompt_id", "category")[4] == (
        "photo/00001",
        "photo 1",
        "photo/00001",
        "photo",
    )
    # A picture that is not there is a sample, so that its score is missing and not left out.
    assert len(samples) == 6 and kinds(samples) == ["missing"] * 2
    for style in ("anime", "photo"):
        (tmp_path / "benchmark" / f"{style}.json").rename(tmp_path / "images/mine" / f"{style}.json")
    beside = read_samples(tmp_path / "images/mine")
    assert (beside.layout, list(beside)) == ("hpdv2", list(samples))


def test_numbered_pictures_in_classes_are_not_hpdv2(tmp_path: Path) -> None:
    draw(tmp_path / "dog/00000.jpg")
    write(tmp_path / "dogs.json", ["a dog"])
    assert read_samples(tmp_path).layout == "images"


def test_image_reward(tmp_path: Path) -> None:
    prompts = [{"id": "001234-0078", "prompt": "a cat"}, {"id": "000904-0035", "prompt": "a dog"}]
    file = write(tmp_path / "benchmark-prompts.json", prompts)
    for prompt in prompts:
        for number in range(2):
            draw(tmp_path / "sd1-4" / f"{prompt['id']}_{number}.png")
    samples = read_samples(tmp_path / "sd1-4", prompts=file)
    assert samples.layout == "image_reward"
    assert fields(samples, "id", "prompt", "prompt_id", "seed")[3] == (
        "001234-0078_1",
        "a cat",
        "001234-0078",
        "1",
    )
    assert samples.problems == ()
    file.rename(tmp_path / "sd1-4/prompts.json")
    beside = read_samples(tmp_path / "sd1-4")
    assert (beside.layout, beside.problems) == ("image_reward", ())


def test_a_list_without_ids_is_not_image_rewards(tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.json", [{"prompt": "a cat"}, {"prompt": "a dog"}])
    draw(tmp_path / "images/0_0.png")
    samples = read_samples(tmp_path / "images", prompts=file)
    assert (samples.layout, samples[0].prompt) == ("prompts", "a cat")


def test_t2i_compbench(tmp_path: Path) -> None:
    number = 0
    for prompt in ("a green bench and a blue bowl", "a red_ish car"):
        for _ in range(2):
            draw(tmp_path / "samples" / f"{prompt}_{number:06}.png")
            number += 1
        draw(tmp_path / f"{prompt}-grid-00000.png")
    samples = read_samples(tmp_path)
    assert samples.layout == "t2i_compbench"
    assert fields(samples, "prompt", "seed")[3] == ("a red_ish car", "000003")
    assert kinds(samples) == ["unused", "unused"]
    assert read_samples(tmp_path / "samples").layout == "t2i_compbench"


def test_numbered_photographs_are_not_t2i_compbench(tmp_path: Path) -> None:
    for name in ("IMG_000001.png", "my_photo_000002.png"):
        draw(tmp_path / name)
    assert read_samples(tmp_path).layout == "images"


def test_dpg_bench_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for number in range(4):
        draw(tmp_path / "cut" / f"partiprompts1_{number}.png")
    with pytest.raises(ValueError, match="cut each grid into its four pictures"):
        read_samples(tmp_path / "cut", layout="dpg-bench")
    write(tmp_path / "prompts/partiprompts1.txt", "a cat\n")
    samples = read_samples(tmp_path / "cut", prompts=tmp_path / "prompts")
    assert fields(samples, "prompt", "prompt_id", "seed")[2] == ("a cat", "partiprompts1", "2")


# --- edits ---


def test_gedit(tmp_path: Path) -> None:
    folder = tmp_path / "fullset/color_alter/en"
    for key in ("k1", "k2"):
        draw(folder / f"{key}.png")
        draw(folder / f"{key}_SRCIMG.png")
    draw(folder / "k3_SRCIMG.png")
    rows = [
        {
            "key": key,
            "task_type": "color_alter",
            "instruction_language": "en",
            "instruction": f"do {key}",
        }
        for key in ("k1", "k2", "k3")
    ]
    file = write(tmp_path / "info.jsonl", "\n".join(map(json.dumps, rows)))
    for samples in (read_samples(tmp_path), read_samples(tmp_path, prompts=file)):
        assert samples.layout == "edits"
        assert samples[0].sources == (folder / "k1_SRCIMG.png",)
        assert fields(samples, "id", "prompt", "category")[1] == (
            "fullset/color_alter/en/k2",
            "do k2",
            "color_alter",
        )
        assert kinds(samples) == ["missing"]
        assert samples[2].image == folder / "k3.png"


def test_imgedit(tmp_path: Path) -> None:
    draw(tmp_path / "results/1082.png")
    draw(tmp_path / "results/1082_SRCIMG.png")
    content = {
        "1082": {
            "id": "animal/000342021.jpg",
            "prompt": "Change the tortoise's shell.",
            "edit_type": "adjust",
        }
    }
    file = write(tmp_path / "basic_edit.json", content)
    [sample] = samples = read_samples(tmp_path / "results", prompts=file)
    assert samples.layout == "edits"
    assert (sample.prompt, sample.category) == ("Change the tortoise's shell.", "adjust")


def test_edited_and_source_folders(tmp_path: Path) -> None:
    draw(tmp_path / "edited/1.png")
    draw(tmp_path / "source/1.jpg")
    write(tmp_path / "prompts.json", {"1": "add a hat"})
    [sample] = samples = read_samples(tmp_path)
    assert samples.layout == "edits"
    assert (sample.id, sample.prompt) == ("edited/1", "add a hat")
    assert sample.sources == (tmp_path / "source/1.jpg",)
    assert samples.problems == ()


def test_a_folder_called_source_alone_is_no_edit(tmp_path: Path) -> None:
    draw(tmp_path / "source/1.png")
    draw(tmp_path / "SRCIMG.png")
    assert read_samples(tmp_path).layout == "images"


# --- prompts in a file of their own ---


def test_prompts_by_index(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("00000.png", "00001-4294.png", "00001-4295.png"):
        draw(folder / name)
    expected = [("a cat", "0", None), ("a dog", "1", "4294"), ("a dog", "1", "4295")]
    files = [
        write(tmp_path / "p.txt", "\ufeffa cat\r\na dog\r\nnone\r\n"),
        write(tmp_path / "p.json", ["a cat", "a dog", "none"]),
        write(
            tmp_path / "p.jsonl",
            "\n".join(json.dumps({"prompt": p}) for p in ("a cat", "a dog", "none")),
        ),
        write(tmp_path / "p.tsv", "Prompt\tCategory\na cat\tAnimals\na dog\tAnimals\nnone\tOther\n"),
    ]
    for file in files:
        samples = read_samples(folder, prompts=file)
        assert (samples.layout, "by index" in samples.reason) == ("prompts", True)
        assert fields(samples, "prompt", "prompt_id", "seed") == expected
        assert [(p.kind, p.message) for p in samples.problems] == [
            ("missing", "there is no picture for the prompt '2'")
        ]
    assert samples[0].category == "Animals"


def test_prompts_by_index_are_counted_from_0(tmp_path: Path) -> None:
    for number in (1, 2):
        draw(tmp_path / "images" / f"{number}.png")
    with pytest.raises(ValueError, match="counted from 0"):
        read_samples(tmp_path / "images", prompts=write(tmp_path / "p.txt", "a cat\na dog\nnone"))
    samples = read_samples(
        tmp_path / "images", prompts=write(tmp_path / "p.json", {"1": "a cat", "2": "b"})
    )
    assert fields(samples, "prompt") == [("a cat",), ("b",)]


def test_indexes_behind_a_word(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "a cat\n\na dog")
    for name in ("image_00000.png", "image_00001.png", "image_00002_7.png", "v2_1.png"):
        draw(tmp_path / "images" / name)
    samples = read_samples(tmp_path / "images", prompts=file)
    assert fields(samples, "prompt", "prompt_id", "seed") == [
        ("a cat", "0", None),
        (None, "1", None),
        ("a dog", "2", "7"),
        (None, None, None),
    ]
    assert kinds(samples) == ["no prompt", "no prompt"]
    draw(tmp_path / "images/grid-0001.png")
    with pytest.raises(ValueError, match="begin with 'grid-' and 'image_'"):
        read_samples(tmp_path / "images", prompts=file)


def test_prompts_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("cat.png", "sub/dog_3.png", "stray.png"):
        draw(folder / name)
    files = [
        write(tmp_path / "p.json", {"cat": "a cat", "sub/dog": {"prompt": "a dog"}}),
        write(tmp_path / "p.csv", "file_name,prompt\ncat.png,a cat\nsub/dog,a dog\n"),
        write(
            tmp_path / "p.jsonl", '{"id": "cat", "prompt": "a cat"}\n{"id": "dog", "prompt": "a dog"}\n'
        ),
    ]
    for file in files:
        samples = read_samples(folder, prompts=file)
        assert samples.layout == "prompts"
        assert fields(samples, "id", "prompt", "seed") == [
            ("cat", "a cat", None),
            ("stray", None, None),
            ("sub/dog_3", "a dog", "3"),
        ]
        assert kinds(samples) == ["no prompt"]


def test_prompts_that_belong_to_other_pictures_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "images/cat.png")
    for content in ({"dog": "a dog"}, ["a dog"]):
        file = write(tmp_path / "p.json", content)
        with pytest.raises(ValueError, match=r"p\.json go with no picture"):
            read_samples(tmp_path / "images", prompts=file)


def test_files_of_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    draw(tmp_path / "images/0.png")
    wrong = {
        "a.txt": ("", "there are no prompts in"),
        "a.json": ('{"a": 3}', "'a': a prompt must be a text, and is a number"),
        "b.json": ('"text"', "must hold a list of prompts"),
        "c.json": ("", "is empty"),
        "e.json": ('{"0": "a cat", "0": "a dog"}', "'0' occurs twice"),
        "d.json": (
            '[{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}]',
            "item 2: '1' has another prompt",
        ),
        "a.csv": ("id,title\n0,a cat\n", "has no column of prompts"),
        "a.yaml": ("0: a cat", "are a .txt, .json"),
    }
    for name, (content, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            read_samples(tmp_path / "images", prompts=write(tmp_path / name, content))
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_samples(tmp_path / "images", prompts=tmp_path / "none.txt")


# --- finding ---


def test_pictures_alone_have_no_prompts(tmp_path: Path) -> None:
    draw(tmp_path / "a/1.png")
    draw(tmp_path / "b/1.webp")
    samples = read_samples(tmp_path)
    assert (samples.layout, samples.reason) == ("images", "2 pictures and no prompts")
    assert fields(samples, "id", "prompt") == [("a/1", None), ("b/1", None)]
    assert kinds(samples) == ["no prompt"]


def test_two_layouts_are_an_error_that_lists_them(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    write(tmp_path / "1.txt", "a cat")
    write(tmp_path / "metadata.csv", "file_name,text\n1.png,a dog\n")
    with pytest.raises(ValueError, match=r"layout='imagefolder' \(.*, or layout='sidecar' \("):
        read_samples(tmp_path)
    samples = read_samples(tmp_path, layout="sidecar")
    assert (samples[0].prompt, samples.reason) == ("a cat", "it was asked for")
    assert [(p.kind, Path(p.file).name) for p in samples.problems] == [("unused", "metadata.csv")]


def test_every_layout_that_is_asked_for_and_does_not_fit_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "nothing")
    for name in NAMES:
        with pytest.raises(ValueError, match=str(tmp_path)):
            read_samples(tmp_path, layout=name)
    with pytest.raises(ValueError, match="did you mean 'sidecar'"):
        read_samples(tmp_path, layout="sidecars")


def test_prompts_and_columns_that_a_layout_does_not_use_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    write(tmp_path / "1.txt", "a cat")
    manifest = write(tmp_path / "m.csv", "image,prompt\n1.png,a\n")
    with pytest.raises(ValueError, match="leave prompts= out"):
        read_samples(tmp_path, layout="sidecar", prompts=manifest)
    with pytest.raises(ValueError, match=r"m\.csv' holds prompts itself"):
        read_samples(manifest, prompts=manifest)
    with pytest.raises(ValueError, match="columns= goes with tables"):
        read_samples(tmp_path, layout="sidecar", columns={"image": "x"})
