"""Compare FID end to end with five packages in one run: ``python benchmarks/fid.py``.

Two folders of JPEGs go in, one number comes out; every package gets the same files and weights, its own
defaults, and a process of its own, one at a time. Packages: tests/parity/requirements.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import torch

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work" / "fid"
PACKAGES = {
    "ours": "diffsynth-metrics",
    "pytorch-fid": "pytorch-fid",
    "clean": "clean-fid",
    "torch-fidelity": "torch-fidelity",
    "torchmetrics": "torchmetrics",
    "diffsynth": "diffsynth",
}
CORES = len(os.sched_getaffinity(0))

FID = Callable[[Path, Path], float]


# Each of these returns the package's way from two folders to a FID, with the network built and loaded.


def ours(weights: Path) -> FID:
    from diffsynth_metrics import FIDMetric, ModelConfig

    metric = FIDMetric.from_pretrained(ModelConfig(path=weights), device="cpu")
    return lambda reference, generated: metric.compute(reference, generated)


def pytorch_fid(weights: Path) -> FID:
    from pytorch_fid import fid_score, inception

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: read(weights)):
        network = inception.InceptionV3([3])

    def fid(*folders: Path) -> float:
        sides = [
            fid_score.compute_statistics_of_path(str(folder), network, 50, 2048, "cpu", min(CORES, 8))
            for folder in folders
        ]
        with mock.patch.object(fid_score.linalg, "sqrtm", old_sqrtm(fid_score.linalg.sqrtm)):
            return float(fid_score.calculate_frechet_distance(*sides[0], *sides[1]))

    return fid


def clean(weights: Path) -> FID:
    from cleanfid import fid, inception_torchscript
    from pytorch_fid import inception

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: read(weights)):
        blocks = inception.InceptionV3([3]).eval().blocks
    # Its TorchScript file cannot be had offline; this is the same network.
    script = torch.nn.Module()
    script.layers = torch.nn.Sequential(*blocks, torch.nn.Flatten())

    def compute(*folders: Path) -> float:
        with (
            mock.patch.object(inception_torchscript, "check_download_inception"),
            mock.patch.object(torch.jit, "load", lambda _: script),
            mock.patch.object(fid.linalg, "sqrtm", old_sqrtm(fid.linalg.sqrtm)),
        ):
            device = torch.device("cpu")
            return float(fid.compute_fid(*map(str, folders), device=device, verbose=False))

    return compute


def torch_fidelity(weights: Path) -> FID:
    from torch_fidelity import calculate_metrics, feature_extractor_inceptionv3

    state = read(weights)

    def fid(*folders: Path) -> float:
        with mock.patch.object(
            feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: state
        ):
            result = calculate_metrics(
                input1=str(folders[0]),
                input2=str(folders[1]),
                fid=True,
                cuda=False,
                cache=False,
                verbose=False,
            )
        return float(result["frechet_inception_distance"])

    return fid


def torchmetrics(weights: Path) -> FID:
    from torch.utils.data import DataLoader
    from torch_fidelity import feature_extractor_inceptionv3
    from torch_fidelity.datasets import ImagesPathDataset
    from torchmetrics.image.fid import FrechetInceptionDistance

    with mock.patch.object(
        feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: read(weights)
    ):
        metric = FrechetInceptionDistance()

    def fid(*folders: Path) -> float:
        metric.reset()
        for folder, real in zip(folders, (True, False), strict=True):
            files = ImagesPathDataset([str(file) for file in sorted(folder.glob("*.jpg"))])
            for batch in DataLoader(files, batch_size=32, num_workers=CORES):
                metric.update(batch, real=real)
        return float(metric.compute())

    return fid


def diffsynth(weights: Path) -> FID:
    # The one file with its FID; its package imports a dozen others.
    spec = importlib.util.find_spec("diffsynth")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "models" / "fid.py"
    module_spec = importlib.util.spec_from_file_location("diffsynth_fid", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["diffsynth_fid"] = module
    module_spec.loader.exec_module(module)
    network = module.FIDInceptionModel()
    network.model.load_state_dict(
        {name: value for name, value in read(weights).items() if not name.startswith("fc.")}
    )
    model = module.FIDModel(network, batch_size=16)
    return lambda reference, generated: float(model.compute(reference, generated))


LOADERS: dict[str, Callable[[Path], FID]] = {
    "ours": ours,
    "pytorch-fid": pytorch_fid,
    "clean": clean,
    "torch-fidelity": torch_fidelity,
    "torchmetrics": torchmetrics,
    "diffsynth": diffsynth,
}


def read(weights: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(weights / "model.safetensors")


def old_sqrtm(sqrtm: Callable[..., Any]) -> Callable[..., Any]:
    return lambda matrix, disp=True: sqrtm(matrix) if disp else (sqrtm(matrix), 0.0)


def measure(package: str, sizes: list[int], count: int) -> dict[str, Any]:
    """Run one package on every size, after a short warm-up."""
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        fid = LOADERS[package](WORK / "weights")
        fid(WORK / "warm-up" / "reference", WORK / "warm-up" / "generated")
        seconds, scores = {}, {}
        for size in sizes:
            begin = time.perf_counter()
            scores[size] = fid(*folders_of(size, count))
            seconds[size] = time.perf_counter() - begin
    return {"seconds": seconds, "scores": scores}


def stages(sizes: list[int], count: int) -> dict[str, Any]:
    """Time the parts of our way one after the other, and the machine's matrix product."""
    warnings.simplefilter("ignore")
    from torch.utils.flop_counter import FlopCounterMode

    from diffsynth_metrics import FIDMetric, FIDStatistics, ModelConfig
    from diffsynth_metrics.fid.preprocessing import PREPROCESSINGS

    metric = FIDMetric.from_pretrained(ModelConfig(path=WORK / "weights"), device="cpu")
    prepare = PREPROCESSINGS["clean"]
    result: dict[str, Any] = {"decode": {}, "resize": {}}
    for size in sizes:
        files = sorted(folders_of(size, count)[0].glob("*.jpg"))[:32]
        images, result["decode"][size] = timed(
            lambda f=files: [PIL.Image.open(x).convert("RGB") for x in f]
        )
        batch, result["resize"][size] = timed(lambda i=images: [prepare(image) for image in i])
        for stage in ("decode", "resize"):
            result[stage][size] /= len(files)
    pixels = torch.from_numpy(np.stack(batch[:16])).permute(0, 3, 1, 2)
    with torch.no_grad():
        metric.model(pixels)
        times = [timed(lambda: metric.model(pixels))[1] for _ in range(5)]
        result["network"] = min(times) / len(pixels)
        with FlopCounterMode(display=False) as counter:
            metric.model(pixels)
    result["flop"] = counter.get_total_flops() / len(pixels)
    result["peak"] = matrix_products(1024) | matrix_products(4096)
    result["distance"] = {}
    for number in (count // 2, 4000):
        generator = np.random.default_rng(0)
        mixing = generator.normal(size=(2048, 2048)) * (np.arange(1, 2049) ** -0.7)[:, None]
        sides = []
        for _ in range(2):
            values = np.maximum(generator.normal(size=(number, 2048)) @ mixing, 0)
            sides.append((FIDStatistics().update(values.astype(np.float32)), values))
        score, seconds = timed(lambda s=sides: metric.compute(s[0][0], s[1][0]))
        peer, peer_seconds = timed(lambda s=sides: sqrtm_distance(s[0][1], s[1][1]))
        result["distance"][number] = [seconds, peer_seconds, abs(score - peer) / peer]
    return result


def matrix_products(size: int) -> dict[str, float]:
    """Return the FLOP/s of a square float32 matrix product in each library that has one here."""
    matrix = torch.rand(size, size)
    array = matrix.numpy()
    # A 1 x 1 convolution with the channels last is a matrix product in oneDNN.
    image = matrix.view(1, 64, size // 64, size).permute(0, 3, 1, 2)
    kernel = matrix.view(size, size, 1, 1).contiguous(memory_format=torch.channels_last)
    products: dict[str, Callable[[], Any]] = {
        "torch.matmul": lambda: matrix @ matrix,
        "numpy.matmul": lambda: array @ array,
        "oneDNN 1×1 convolution": lambda: torch.nn.functional.conv2d(image, kernel),
    }
    return {
        f"{name} {size}³": 2 * size**3 / min(timed(product)[1] for _ in range(7))
        for name, product in products.items()
    }


def sqrtm_distance(first: np.ndarray, second: np.ndarray) -> float:
    from pytorch_fid import fid_score

    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (first, second)]
    with mock.patch.object(fid_score.linalg, "sqrtm", old_sqrtm(fid_score.linalg.sqrtm)):
        return float(fid_score.calculate_frechet_distance(*moments[0], *moments[1]))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    value = call()
    return value, time.perf_counter() - begin


def folders_of(size: int, count: int) -> tuple[Path, Path]:
    folder = WORK / f"{size}x{count}"
    return folder / "reference", folder / "generated"


def write_pictures(folder: Path, size: int, count: int, seed: int) -> None:
    """Write crops of photographs as JPEG, quality 90, unless they are there."""
    from skimage import data

    if folder.exists():
        return
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    photographs = [
        PIL.Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "rocket")
    ]
    for index in range(count):
        photograph = photographs[index % 3]
        side = int(generator.integers(200, 390))
        left = int(generator.integers(0, photograph.width - side))
        top = int(generator.integers(0, photograph.height - side))
        crop = photograph.crop((left, top, left + side, top + side))
        grain = generator.normal(0, 6, (size, size, 3))
        pixels = np.asarray(crop.resize((size, size), PIL.Image.Resampling.LANCZOS)) + grain
        image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{index:04}.jpg", quality=90)


def report(
    results: dict[str, dict[str, Any]], parts: dict[str, Any], sizes: list[int], count: int
) -> str:
    lines = [
        "# FID against five packages",
        "",
        f"`python benchmarks/fid.py --sizes {' '.join(map(str, sizes))} --count {count}`, "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, "
        f"{CORES} cores, float32 on the CPU, torch {torch.__version__}, load average at the start "
        f"{parts['load']:.2f}. Two folders of {count // 2} JPEGs each go in, one FID comes out; every "
        "package has its own defaults, the same random weights and a process of its own, one at a time.",
        "",
        "## End to end",
        "",
        "| package | " + " | ".join(f"{size} px, images/s | FID" for size in sizes) + " |",
        "|---|" + "--:|--:|" * len(sizes),
    ]
    for package, result in results.items():
        cells = [
            f"{count / result['seconds'][str(size)]:.2f} | {result['scores'][str(size)]:.4f}"
            for size in sizes
        ]
        lines.append(f"| {PACKAGES[package]} {version(PACKAGES[package])} | {' | '.join(cells)} |")
    lines.append("")
    for size in sizes:
        best = min(result["seconds"][str(size)] for name, result in results.items() if name != "ours")
        ratio = best / results["ours"]["seconds"][str(size)]
        lines.append(f"- {size} px: {ratio:.2f} times the best of the others.")
    network = parts["flop"] / parts["network"]
    fastest = max(parts["peak"], key=parts["peak"].__getitem__)
    peak = parts["peak"][fastest]
    peaks = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in parts["peak"].items())
    lines += [
        "",
        "## Where the time goes",
        "",
        "| part of our way, per image | " + " | ".join(f"{size} px, ms" for size in sizes) + " |",
        "|---|" + "--:|" * len(sizes),
        "| decode, one core | " + " | ".join(f"{1e3 * parts['decode'][s]:.1f}" for s in sizes) + " |",
        "| resize (clean), one core | "
        + " | ".join(f"{1e3 * parts['resize'][s]:.1f}" for s in sizes)
        + " |",
        "| network, all cores, batches of 16 |" + f" {1e3 * parts['network']:.1f} |" * len(sizes),
        "| end to end | "
        + " | ".join(f"{1e3 * results['ours']['seconds'][str(s)] / count:.1f}" for s in sizes)
        + " |",
        "",
        f"The network needs {parts['flop'] / 1e9:.2f} GFLOP per image and runs at "
        f"{network / 1e9:.0f} GFLOP/s. This machine's float32 matrix product, in GFLOP/s: {peaks}. "
        f"The network reaches {network / peak:.0%} of the fastest, {fastest}.",
        "",
        "## Distance alone",
        "",
        "| images per side | ours, s | pytorch-fid's `sqrtm`, s | ratio | relative difference |",
        "|--:|--:|--:|--:|--:|",
    ]
    for number, (seconds, peer, difference) in parts["distance"].items():
        lines.append(
            f"| {number} | {seconds:.2f} | {peer:.2f} | {peer / seconds:.1f} | {difference:.1e} |"
        )
    few, (_, root, _) = next(iter(parts["distance"].items()))
    lines += [
        "",
        f"With {few} images per side the matrix root is {root:.0f} s of the time of pytorch-fid and "
        "clean-fid. clean-fid runs pytorch-fid's network here: its own TorchScript file cannot be had "
        "offline.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every package in its own process, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--count", type=int, default=200, help="images of each size, on both sides together"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--only", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS_FID.md")
    parser.add_argument("--worker", choices=[*PACKAGES, "stages"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        call = stages if arguments.worker == "stages" else lambda *a: measure(arguments.worker, *a)
        print("\n" + json.dumps(call(arguments.sizes, arguments.count)))
        return
    from diffsynth_metrics.testing import tiny_checkpoint

    load = os.getloadavg()[0]
    tiny_checkpoint("fid", WORK / "weights")
    for seed, side in enumerate(("reference", "generated")):
        write_pictures(WORK / "warm-up" / side, 256, 8, seed)
        for size in arguments.sizes:
            folder = folders_of(size, arguments.count)[seed]
            write_pictures(folder, size, arguments.count // 2, seed)
    answers: dict[str, Any] = {}
    for worker in [*arguments.only, "stages"]:
        command = [sys.executable, __file__, "--worker", worker, "--count", str(arguments.count)]
        command += ["--sizes", *map(str, arguments.sizes)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        answers[worker] = json.loads(output.splitlines()[-1])
        print(worker, answers[worker], file=sys.stderr, flush=True)
    parts = answers.pop("stages") | {"load": load}
    parts["decode"] = {int(size): value for size, value in parts["decode"].items()}
    parts["resize"] = {int(size): value for size, value in parts["resize"].items()}
    text = report(answers, parts, arguments.sizes, arguments.count)
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
