"""Files on disk to verified weights inside a model, and every file that must not become a score."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn

import diffsynth_metrics
from diffsynth_metrics import AestheticMetric, CLIPMetric, ModelConfig, PickScoreMetric
from diffsynth_metrics.errors import CheckpointError, DownloadError
from diffsynth_metrics.networks.clip import build_clip, vit_h_14_config
from diffsynth_metrics.testing import tiny_checkpoint
from diffsynth_metrics.weights.checkpoint import (
    KNOWN_LAYOUTS,
    check_owner,
    find_non_finite,
    fingerprint,
    load_weights,
    read_config,
    read_layout,
    weight_files,
)

CPU = torch.device("cpu")
LAYOUTS = Path(__file__).parent / "data" / "layouts"
# Of timm's networks, which tests/test_image_similarity.py and tests/test_set_distances.py build.
OF_TIMM = {
    "7198e0b7ddf039df69e7f929273f1cc4",
    "82a6cf7de490aa417468a112b948b915",
    "856bd25d8a3273d081863814b01f3bdd",
    "a0a2939d93e15012f387ede63112756a",
    "e01f1dc7cb145d87030565d6da9588b2",
}
PUBLISHED = {
    "aesthetic": "306981222ec94302794e07cf676c84cc",
    "bioclip2": "3a020a3e47afb7c5e21c52f2d0692c09",
    "clip_h14": "b5e2c0bfcbf4085ccdb2feb8f0ba408a",
    "fid": "d4e9549be726259b444d1f62db4ce413",
    "hpsv2": "f79e72cec8ae5a540cff0304bfb21b00",
    "hpsv3": "5655d9cde15b759cfeefe7432d7a912c",
    "image_reward": "b3cc8e10b76ca98cde653daa5cf63139",
    "lpips_alex": "08a75c660c9b2e775c530a0955857f1f",
    "lpips_squeeze": "ff994b70a30599287a332105396d5004",
    "lpips_vgg": "5740953aaa8aba2ecd9b9c23da813591",
    "qwen_image_bench": "ff4ad0463675e96738483611f6dd551b",
    "unified_reward_2": "f9786d06eca5c0f1ece89843b2c4cc66",
    "unified_reward_edit": "2d11bf14bba8b4e87477c8199a895403",
}
"""Layout file to the fingerprint that DiffSynth-Studio publishes."""


def layout_of(name: str) -> dict[str, tuple[int, ...]]:
    content = json.loads((LAYOUTS / f"{name}.json").read_text(encoding="utf-8"))
    return {key: tuple(shape) for key, shape in content.items()}


def write_zeros(path: Path, layout: Mapping[str, Sequence[int]]) -> Path:
    """Write a float32 safetensors file of any size whose zeros take no room on the disk."""
    header, end = {}, 0
    for name, shape in layout.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return path


class Small(nn.Module):
    """Two parameters, a float head, a buffer that is saved and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("positions", torch.zeros(1, 4, dtype=torch.int64), persistent=False)


def small() -> Small:
    with torch.device("meta"):
        model = Small()
    model.positions = torch.arange(4)[None]
    return model


def small_tensors() -> dict[str, torch.Tensor]:
    return {
        "linear.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.1]]),
        "linear.bias": torch.tensor([0.5, 0.1]),
        "scale": torch.tensor(4.6052),
        "count": torch.tensor([7]),
    }


class MyMetric:
    """Any class does."""


def load(
    model: nn.Module,
    *files: Path,
    dtype: torch.dtype = torch.float32,
    config: str | None = "config.json",
    check_finite: bool = True,
) -> None:
    load_weights(
        model,
        files,
        metric="MyMetric",
        device=CPU,
        dtype=dtype,
        float32=("scale",),
        config=config,
        check_finite=check_finite,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(small_tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A tiny PickScore checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "PickScore"))


class TestLoading:
    def test_every_tensor_has_the_value_of_the_file(self, file: Path) -> None:
        model = small()
        load(model, file)
        for name, expected in small_tensors().items():
            assert torch.equal(model.state_dict()[name], expected), name

    def test_the_files_together_are_the_model(self, tmp_path: Path) -> None:
        names = list(small_tensors())
        for number, part in enumerate((names[:1], names[1:])):
            tensors = {name: small_tensors()[name] for name in part}
            save_file(tensors, tmp_path / f"model-{number}.safetensors")
        model = small()
        load(model, tmp_path / "model-0.safetensors", tmp_path / "model-1.safetensors")
        assert model.state_dict().keys() == small_tensors().keys()
        assert model.linear.weight.tolist() == small_tensors()["linear.weight"].tolist()

    def test_nothing_is_left_on_the_meta_device(self, tiny_metric: PickScoreMetric) -> None:
        tensors = [*tiny_metric.model.parameters(), *tiny_metric.model.buffers()]
        assert {tensor.device for tensor in tensors} == {CPU}

    def test_a_computed_buffer_keeps_its_value(self, file: Path) -> None:
        model = small()
        load(model, file)
        assert model.positions.tolist() == [[0, 1, 2, 3]]

    def test_a_computed_buffer_in_the_file_is_passed_over(self, tmp_path: Path) -> None:
        tensors = small_tensors() | {"positions": torch.full((1, 4), 9)}
        save_file(tensors, tmp_path / "model.safetensors")
        model = small()
        load(model, tmp_path / "model.safetensors")
        assert model.positions.tolist() == [[0, 1, 2, 3]]

    def test_the_dtype_is_that_which_was_asked_for_and_heads_are_float32_or_wider(
        self, file: Path
    ) -> None:
        widths = {torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float32: 0.0, torch.float64: 0.0}
        for dtype, tolerance in widths.items():
            model = small()
            load(model, file, dtype=dtype)
            assert model.linear.weight.dtype == model.linear.bias.dtype == dtype
            weight, expected = model.linear.weight.double(), small_tensors()["linear.weight"].double()
            torch.testing.assert_close(weight, expected, rtol=0, atol=tolerance)
            assert model.scale.dtype == torch.promote_types(dtype, torch.float32)
            # Not rounded on its way through a narrower dtype.
            assert float(model.scale) == float(small_tensors()["scale"])

    def test_integers_keep_their_dtype(self, file: Path) -> None:
        model = small()
        load(model, file, dtype=torch.bfloat16)
        assert (model.count.dtype, model.count.item()) == (torch.int64, 7)

    def test_a_half_precision_file_is_widened(self, tmp_path: Path) -> None:
        tensors = {name: tensor.half() for name, tensor in small_tensors().items() if name != "count"}
        save_file(tensors | {"count": torch.tensor([7])}, tmp_path / "model.safetensors")
        model = small()
        load(model, tmp_path / "model.safetensors")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_no_parameter_requires_a_gradient(self, file: Path) -> None:
        model = small()
        load(model, file)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_the_model_is_in_evaluation_mode(self, file: Path) -> None:
        model = small()
        load(model, file)
        assert not any(module.training for module in model.modules())

    @pytest.mark.parametrize(
        "context",
        [
            lambda: torch.device("meta"),
            init_empty_weights,
            lambda: init_empty_weights(include_buffers=True),
        ],
    )
    def test_loading_where_new_tensors_are_made_empty(
        self, context: Callable[[], AbstractContextManager[object]], file: Path
    ) -> None:
        model = small()
        with context():
            load(model, file)
        for name, expected in small_tensors().items():
            assert torch.equal(model.state_dict()[name], expected), name
        assert model.positions.tolist() == [[0, 1, 2, 3]]
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_a_metric_that_is_loaded_inside_init_empty_weights_scores(
        self, tiny_folder: Path, tiny_metric: PickScoreMetric
    ) -> None:
        image = torch.full((3, 40, 30), 0.5)
        with init_empty_weights():
            metric = PickScoreMetric.from_pretrained(ModelConfig(path=tiny_folder), device="cpu")
        assert metric.compute("a", image) == pytest.approx(tiny_metric.compute("a", image), rel=1e-4)

    @pytest.mark.skipif(
        not Path("/proc/self/smaps_rollup").exists(), reason="the memory figures are Linux's"
    )
    def test_no_second_copy_is_made_on_the_cpu(self, tmp_path: Path) -> None:
        def anonymous_bytes() -> int:
            rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
            return 1024 * int(re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.MULTILINE)[1])  # type: ignore[index]

        shape = (7000, 7000)
        path = write_zeros(tmp_path / "model.safetensors", {"weight": shape})
        with torch.device("meta"):
            model = nn.Linear(*shape, bias=False)
        before = anonymous_bytes()
        load(model, path)
        assert model.weight.sum() == 0  # every page was read
        assert anonymous_bytes() - before < 0.2 * path.stat().st_size
        path.unlink()

    def test_the_towers_are_narrow_and_the_heads_are_not(self, tiny_folder: Path) -> None:
        metric = PickScoreMetric.from_pretrained(
            ModelConfig(path=tiny_folder), device="cpu", torch_dtype=torch.bfloat16
        )
        narrow = {name for name, p in metric.model.named_parameters() if p.dtype == torch.bfloat16}
        wide = {name for name, p in metric.model.named_parameters() if p.dtype == torch.float32}
        assert wide == {"logit_scale", "text_projection.weight", "visual_projection.weight"}
        assert len(narrow) + len(wide) == len(list(metric.model.parameters()))


class TestDamagedFiles:
    def test_a_truncated_file_or_one_of_another_kind_is_named_with_its_size(self, file: Path) -> None:
        whole = file.read_bytes()
        truncated = [whole[:bytes_left] for bytes_left in (0, 4, 8, 40, -100, -1)]
        for content in [*truncated, b"\0" * 1000, b"<html>404</html>" * 100, b"version https://"]:
            file.write_bytes(content)
            message = rf"^Delete {file} and .* it \({len(content)} bytes\) is truncated or not"
            with pytest.raises(CheckpointError, match=message):
                load(small(), file)

    def test_a_truncated_checkpoint_never_becomes_a_metric(self, copy: Path) -> None:
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=rf"^Delete {path} .*bytes\) is truncated"):
            PickScoreMetric.from_pretrained(ModelConfig(path=copy), device="cpu")

    def test_other_weight_formats_are_refused_by_name(self, copy: Path) -> None:
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
        message = r"because unpickling .*no \.safetensors file among .*pytorch_model\.bin"
        with pytest.raises(CheckpointError, match=message):
            PickScoreMetric.from_pretrained(ModelConfig(path=copy), device="cpu")

    def test_the_files_of_other_formats_are_listed(self) -> None:
        with pytest.raises(CheckpointError, match=r"among a\.bin, b\.pt, c\.ckpt and 1 more$"):
            weight_files(["x/a.bin", "x/b.pt", "x/c.ckpt", "x/d.pth"])

    def test_files_beside_the_weights_are_passed_over(self) -> None:
        files = weight_files(["x/config.json", "x/a.safetensors", "x/pytorch_model.bin"])
        assert files == [Path("x/a.safetensors")]


class TestWrongTensors:
    def change(self, file: Path, **tensors: torch.Tensor | None) -> None:
        changed = load_file(file) | {name.replace("__", "."): t for name, t in tensors.items()}
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file)

    def test_a_missing_tensor_is_named(self, file: Path) -> None:
        self.change(file, linear__bias=None)
        with pytest.raises(
            CheckpointError, match=rf"{file} does not fit MyMetric: missing linear\.bias$"
        ):
            load(small(), file)

    def test_an_unexpected_tensor_is_named(self, file: Path) -> None:
        self.change(file, extra=torch.zeros(2))
        with pytest.raises(CheckpointError, match=r"does not fit MyMetric: unexpected extra$"):
            load(small(), file)

    def test_a_wrong_shape_is_told_with_the_right_one(self, file: Path) -> None:
        self.change(file, linear__weight=torch.zeros(2, 4))
        message = r"does not fit MyMetric: wrong shape: linear\.weight \[2, 4\] instead of \[2, 3\]$"
        with pytest.raises(CheckpointError, match=message):
            load(small(), file)

    def test_a_transposed_tensor_is_a_wrong_shape(self, file: Path) -> None:
        self.change(file, linear__weight=torch.zeros(3, 2))
        with pytest.raises(CheckpointError, match=r"linear\.weight \[3, 2\] instead of \[2, 3\]"):
            load(small(), file)

    def test_everything_that_is_wrong_is_told_at_once(self, file: Path) -> None:
        self.change(file, count=None, extra=torch.zeros(2), linear__bias=torch.zeros(5))
        with pytest.raises(
            CheckpointError, match=r"missing count; unexpected extra; wrong shape: linear\.bias"
        ):
            load(small(), file)

    def test_many_names_are_cut_to_three(self, file: Path) -> None:
        self.change(file, **{name: torch.zeros(1) for name in "abcdefg"})
        with pytest.raises(CheckpointError, match=r"unexpected a, b, c and 4 more$"):
            load(small(), file)

    def test_a_missing_config_is_said_first(self, file: Path) -> None:
        self.change(file, linear__bias=None)
        hint = rf"^Put the config\.json of these weights into {file.parent}: there is none"
        with pytest.raises(CheckpointError, match=rf"{hint}.*does not fit MyMetric: missing linear\.b"):
            load(small(), file)
        with pytest.raises(CheckpointError, match=r"^Put the open_clip_config\.json of"):
            load(small(), file, config="open_clip_config.json")
        with pytest.raises(CheckpointError, match=rf"^{file} does not fit"):
            load(small(), file, config=None)  # a network of one size has no config
        (file.parent / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=rf"^{file} does not fit"):
            load(small(), file)

    def test_float8_weights_are_refused(self, file: Path) -> None:
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            self.change(file, linear__weight=torch.ones(2, 3).to(dtype))
            message = rf"^Use the unquantized .*{file} holds linear\.weight as {dtype}, which is not"
            with pytest.raises(CheckpointError, match=message):
                load(small(), file)

    def test_values_that_are_not_finite_are_found(self, file: Path) -> None:
        model = small()
        load(model, file)
        assert find_non_finite(model) == []
        nan, infinity = torch.full((2, 3), torch.nan), torch.tensor([1.0, -torch.inf])
        self.change(file, linear__weight=nan, linear__bias=infinity)
        with pytest.raises(CheckpointError, match=rf"{file} holds NaN or infinity in linear"):
            load(small(), file)
        load(model := small(), file, check_finite=False)
        assert find_non_finite(model) == ["linear.weight", "linear.bias"]
        assert find_non_finite(small()) == []  # nothing is known of tensors that are elsewhere

    def test_a_tensor_in_two_shards_is_named(self, file: Path) -> None:
        second = file.with_name("second.safetensors")
        save_file({"scale": torch.zeros(())}, second)
        with pytest.raises(CheckpointError, match=rf"{second} repeats tensors of another file: scale"):
            load(small(), file, second)

    def test_the_model_stays_empty_after_an_error(self, file: Path) -> None:
        self.change(file, linear__bias=None)
        model = small()
        with pytest.raises(CheckpointError):
            load(model, file)
        assert all(parameter.is_meta for parameter in model.parameters())


class TestConfig:
    def test_a_folder_without_config_has_none(self, file: Path) -> None:
        assert read_config([file]) is None

    def test_a_broken_config_is_named(self, copy: Path) -> None:
        (copy / "config.json").write_text('{"model_type": "clip",')
        with pytest.raises(CheckpointError, match=rf"{copy / 'config.json'} is not valid JSON"):
            PickScoreMetric.from_pretrained(ModelConfig(path=copy), device="cpu")

    def test_a_config_that_is_no_text_is_named(self, copy: Path) -> None:
        (copy / "config.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(CheckpointError, match=rf"{copy / 'config.json'} is not valid JSON"):
            PickScoreMetric.from_pretrained(ModelConfig(path=copy), device="cpu")

    def test_a_config_that_is_no_object_is_named(self, copy: Path) -> None:
        (copy / "config.json").write_text("[1, 2]")
        with pytest.raises(
            CheckpointError, match=rf"{copy / 'config.json'} must hold a JSON object, got list"
        ):
            PickScoreMetric.from_pretrained(ModelConfig(path=copy), device="cpu")

    def test_a_config_of_another_kind_of_model_is_named(self, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
        with pytest.raises(
            CheckpointError, match=r"config\.json.* describes a 'siglip' model, not 'clip'"
        ):
            PickScoreMetric.from_pretrained(ModelConfig(path=copy), device="cpu")

    def test_a_config_of_another_model_has_no_image_tower(self, tmp_path: Path) -> None:
        folder = tiny_checkpoint("aesthetic", tmp_path)
        for config in ({"vision_config": {"model_type": "qwen2_vl", "hidden_size": 32}}, {}):
            (folder / "config.json").write_text(json.dumps(config))
            with pytest.raises(CheckpointError, match="describes no CLIP image tower"):
                AestheticMetric.from_pretrained(ModelConfig(path=folder), device="cpu")

    def test_a_config_of_another_size_does_not_fit(self, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        config["vision_config"]["num_hidden_layers"] = 3
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            CheckpointError, match=r"does not fit PickScoreMetric: missing vision_model\.\S+layers\.2\."
        ):
            PickScoreMetric.from_pretrained(ModelConfig(path=copy), device="cpu")

    def test_a_small_checkpoint_without_config_does_not_fit_the_published_size(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        with pytest.raises(
            CheckpointError,
            match=rf"^Put the config\.json of these weights into {copy}: .*does not fit PickScoreM",
        ):
            PickScoreMetric.from_pretrained(ModelConfig(path=copy), device="cpu")


class TestPublishedLayouts:
    @pytest.mark.parametrize("path", sorted(LAYOUTS.glob("*.json")), ids=lambda path: path.stem)
    def test_the_fingerprint_is_the_published_one(self, path: Path) -> None:
        assert fingerprint(layout_of(path.stem)) == PUBLISHED[path.stem]

    def test_every_published_layout_belongs_to_a_metric(self) -> None:
        assert set(PUBLISHED.values()) | OF_TIMM == KNOWN_LAYOUTS.keys()

    def test_the_fingerprint_of_a_scalar_has_no_dimensions(self) -> None:
        # md5 of "a,a:2_3,scale,scale:"
        assert fingerprint({"scale": (), "a": (2, 3)}) == "68995e5a1b54ca2e450e904f3b73fd7d"

    def test_the_fingerprint_does_not_depend_on_the_order_of_the_file(self) -> None:
        layout = layout_of("clip_h14")
        assert fingerprint(dict(reversed(layout.items()))) == fingerprint(layout)

    @pytest.mark.parametrize("change", [{"logit_scale": (1,)}, {"extra": (2,)}])
    def test_the_fingerprint_covers_names_and_shapes(self, change: dict[str, tuple[int, ...]]) -> None:
        layout = layout_of("clip_h14")
        assert fingerprint(layout | change) != fingerprint(layout)

    def test_the_layout_is_read_from_the_header(self, tmp_path: Path) -> None:
        layout = layout_of("clip_h14")
        path = write_zeros(tmp_path / "model.safetensors", layout)
        assert read_layout([path]) == layout
        path.unlink()

    def test_the_published_clip_is_exactly_the_file_and_its_position_ids(self) -> None:
        model = build_clip(vit_h_14_config())
        saved = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        computed = {name: tuple(b.shape) for name, b in model.named_buffers() if name not in saved}
        assert saved | computed == layout_of("clip_h14")
        assert sorted(computed) == [
            "text_model.embeddings.position_ids",
            "vision_model.embeddings.position_ids",
        ]

    def test_the_position_ids_count_from_zero(self) -> None:
        for name, buffer in build_clip(vit_h_14_config()).named_buffers():
            assert buffer.tolist() == [list(range(buffer.shape[-1]))], name

    def test_both_towers_of_the_published_clip_use_the_exact_gelu(self) -> None:
        config = vit_h_14_config()
        assert config.text_config.hidden_act == config.vision_config.hidden_act == "gelu"

    @pytest.mark.parametrize("metric_class", [PickScoreMetric, CLIPMetric])
    def test_pickscore_and_clip_take_the_same_file(
        self, metric_class: type[CLIPMetric], tiny_folder: Path, tmp_path: Path
    ) -> None:
        path = write_zeros(tmp_path / "model.safetensors", layout_of("clip_h14"))
        metric = metric_class.from_pretrained(
            ModelConfig(path=path), ModelConfig(path=tiny_folder), device="cpu"
        )
        assert sum(p.numel() for p in metric.model.parameters()) == 986_109_441
        path.unlink()

    def test_the_file_of_another_metric_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        """Without a processor beside it, and without a question to a hub."""
        for name in sorted({name for names in KNOWN_LAYOUTS.values() for name in names}):
            theirs, owner = ("hpsv2", "HPSv2Metric") if name != "HPSv2Metric" else ("fid", "FIDMetric")
            path = write_zeros(tmp_path / "model.safetensors", layout_of(theirs))
            message = rf"^Use {owner} for {path}: these are weights of {owner}, not of {name}$"
            with pytest.raises(CheckpointError, match=message):
                metric = getattr(diffsynth_metrics, name)
                metric.from_pretrained(model_config=ModelConfig(path=path), device="cpu")
            path.unlink()

    def test_the_small_checkpoint_of_another_metric_is_named(
        self, file: Path, tiny_folder: Path
    ) -> None:
        """With its published names and other sizes; each layout has one mark."""
        for name, key in PUBLISHED.items():
            owners = KNOWN_LAYOUTS[key]
            shapes = dict.fromkeys(layout_of(name), ())
            save_file({tensor: torch.zeros(shape) for tensor, shape in shapes.items()}, file)
            other = AestheticMetric if name == "clip_h14" else PickScoreMetric
            with pytest.raises(CheckpointError, match=rf"^Use .*{owners[0]}.* for {file}: "):
                check_owner([file], other)
            for owner in owners:
                check_owner([file], getattr(diffsynth_metrics, owner))
        with pytest.raises(CheckpointError, match="PickScoreMetric or CLIPMetric, not of Aes"):
            AestheticMetric.from_pretrained(ModelConfig(path=tiny_folder), device="cpu")

    def test_a_metric_of_your_own_takes_the_file_of_its_base(
        self, tiny_folder: Path, tmp_path: Path
    ) -> None:
        class Mine(PickScoreMetric):
            pass

        path = write_zeros(tmp_path / "model.safetensors", layout_of("clip_h14"))
        Mine.from_pretrained(ModelConfig(path=path), ModelConfig(path=tiny_folder), device="cpu")
        path.unlink()

    def test_a_file_is_loaded_whatever_lies_beside_it(self, tiny_folder: Path, tmp_path: Path) -> None:
        for file in tiny_folder.iterdir():
            (tmp_path / file.name).symlink_to(file)
        (tmp_path / "other-00001-of-00003.safetensors").touch()
        PickScoreMetric.from_pretrained(ModelConfig(path=tmp_path / "model.safetensors"), device="cpu")

    def test_weights_of_another_kind_of_dtype_are_refused(self, tmp_path: Path) -> None:
        tensors = {**small_tensors(), "scale": torch.tensor(4, dtype=torch.int8)}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"holds scale as torch\.int8, and the network needs"):
            load(small(), tmp_path / "model.safetensors")

    def test_what_is_wrong_with_the_weights_is_said_before_a_processor_is_looked_for(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(CheckpointError, match=r"there is no \.safetensors file among pytorch_model"):
            PickScoreMetric.from_pretrained(ModelConfig(path=tmp_path), device="cpu")

    def test_a_processor_that_is_missing_beside_the_weights_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
        monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
        path = write_zeros(tmp_path / "model.safetensors", layout_of("clip_h14"))
        message = rf"(?s)^Put tokenizer\.json or vocab\.json beside {path}.*no local file matches"
        with pytest.raises(DownloadError, match=message):
            PickScoreMetric.from_pretrained(ModelConfig(path=path), device="cpu")
        path.unlink()

    def test_a_file_of_two_metrics_names_both(self, tmp_path: Path) -> None:
        path = write_zeros(tmp_path / "model.safetensors", layout_of("clip_h14"))
        with pytest.raises(
            CheckpointError, match=r"weights of PickScoreMetric or CLIPMetric, not of Aes"
        ):
            check_owner([path], AestheticMetric)
        check_owner([path], MyMetric)  # a metric of your own may be built on any published weights
        path.unlink()


def test_weights_with_nan_are_named_at_the_first_score_that_is_no_number(tmp_path: Path) -> None:
    folder = tiny_checkpoint("pickscore", tmp_path)
    weights = load_file(folder / "model.safetensors")
    broken = "vision_model.encoder.layers.0.mlp.fc1.weight"
    weights[broken][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for verb in ("compute", "evaluate", "reward"):
        metric = PickScoreMetric.from_pretrained(
            ModelConfig(path=folder), device="cpu", check_finite=False
        )
        with pytest.raises(CheckpointError, match=rf"(?s)weights again: .* NaN or infinity in {broken}"):
            getattr(metric, verb)("a cat", torch.rand(3, 32, 32))
