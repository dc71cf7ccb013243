"""Five packages that compute FID, each with the weights that it is given instead of a download.

    pip install --no-deps clean-fid==0.1.35 diffsynth==2.1.12 lightning-utilities==0.15.3 \
        pytorch-fid==0.3.0 torch-fidelity==0.4.0 torchmetrics==1.9.0

Nothing that computes a feature or a distance is replaced, with one exception: clean-fid's network is a
TorchScript file that cannot be had here, so clean-fid gets pytorch-fid's network in its place; scaling
and everything before and after is clean-fid's own. Of diffsynth, the one file with its FID is imported,
because the rest needs a dozen packages.

All convolutions get their tensors with the channels last in memory, which makes them faster and
nothing else.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from official_image_reward import import_past_init, installed_folder
from torch import Tensor, nn

__all__ = ["OFFICIAL_DISTANCES", "OFFICIAL_FEATURES"]

_SMALL_BATCH = 16


@contextlib.contextmanager
def official(module: str, install: str) -> Iterator[None]:
    """Skip without the package (fail in CI); hold back what it prints and warns of."""
    installed_folder(module, install)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _pytorch_fid_network(weights: dict[str, Tensor]) -> Any:
    from pytorch_fid import inception

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: weights):
        network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    return network.eval().to(memory_format=torch.channels_last)


def pytorch_fid_features(weights: dict[str, Tensor], files: Sequence[Path]) -> np.ndarray:
    with official("pytorch_fid", "pytorch-fid==0.3.0"):
        from pytorch_fid.fid_score import get_activations

        # It resizes inside the network, so a batch has images of one size.
        network = _pytorch_fid_network(weights)
        return get_activations(list(files), network, batch_size=1, num_workers=0)


def clean_fid_features(weights: dict[str, Tensor], files: Sequence[Path]) -> np.ndarray:
    installed_folder("pytorch_fid", "pytorch-fid==0.3.0")
    with official("cleanfid", "clean-fid==0.1.35"):
        from cleanfid import fid, inception_torchscript

        script = nn.Module()
        script.layers = nn.Sequential(*(_pytorch_fid_network(weights).blocks), nn.Flatten())
        with (
            mock.patch.object(inception_torchscript, "check_download_inception"),
            mock.patch.object(torch.jit, "load", lambda _: script),
        ):
            network = fid.build_feature_extractor("clean", torch.device("cpu"), use_dataparallel=False)
        return fid.get_files_features(
            list(files),
            network,
            num_workers=0,
            batch_size=_SMALL_BATCH,
            device=torch.device("cpu"),
            mode="clean",
            verbose=False,
        )


def torch_fidelity_features(weights: dict[str, Tensor], files: Sequence[Path]) -> np.ndarray:
    with official("torch_fidelity", "torch-fidelity==0.4.0"):
        from torch_fidelity import datasets, feature_extractor_inceptionv3, utils

        with mock.patch.object(
            feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: weights
        ):
            network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], verbose=False
            )
        features = utils.get_featuresdict_from_dataset(
            datasets.ImagesPathDataset([str(file) for file in files]),
            network.to(memory_format=torch.channels_last),
            batch_size=1,
            cuda=False,
            save_cpu_ram=True,
            verbose=False,
        )
        return features["2048"].numpy()


def torchmetrics_features(weights: dict[str, Tensor], files: Sequence[Path]) -> np.ndarray:
    installed_folder("torch_fidelity", "torch-fidelity==0.4.0")
    with official("torchmetrics", "torchmetrics==1.9.0 lightning-utilities==0.15.3"):
        from torch_fidelity import datasets, feature_extractor_inceptionv3
        from torchmetrics.image.fid import FrechetInceptionDistance

        with mock.patch.object(
            feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: weights
        ):
            metric = FrechetInceptionDistance()
        network = metric.inception.to(memory_format=torch.channels_last)
        with torch.no_grad():
            images = datasets.ImagesPathDataset([str(file) for file in files])
            return torch.cat([network(images[i][None]) for i in range(len(images))]).numpy()


def diffsynth_features(weights: dict[str, Tensor], files: Sequence[Path]) -> np.ndarray:
    folder = installed_folder("diffsynth", "diffsynth==2.1.12")
    with official("diffsynth", "diffsynth==2.1.12"):
        module = import_past_init("official_diffsynth", folder, "models.fid", ("models",))
        network = module.FIDInceptionModel()
        own = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
        network.model.load_state_dict(own)
        network = network.eval().to(memory_format=torch.channels_last)
        model = module.FIDModel(network, batch_size=_SMALL_BATCH)
        return model.get_activations([str(file) for file in files]).numpy()


OFFICIAL_FEATURES: dict[str, Callable[[dict[str, Tensor], Sequence[Path]], np.ndarray]] = {
    "clean": clean_fid_features,
    "pytorch-fid": pytorch_fid_features,
    "torch-fidelity": torch_fidelity_features,
    "torchmetrics": torchmetrics_features,
    "diffsynth": diffsynth_features,
}
"""Name of our preprocessing to the features ``[N, 2048]`` of the package it is named after."""


def pytorch_fid_distance(first: np.ndarray, second: np.ndarray) -> float:
    with official("pytorch_fid", "pytorch-fid==0.3.0"):
        from pytorch_fid import fid_score

        moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (first, second)]
        with mock.patch.object(fid_score.linalg, "sqrtm", sqrtm_of_old(fid_score.linalg.sqrtm)):
            return float(fid_score.calculate_frechet_distance(*moments[0], *moments[1]))


def clean_fid_distance(first: np.ndarray, second: np.ndarray) -> float:
    with official("cleanfid", "clean-fid==0.1.35"):
        from cleanfid import fid

        with mock.patch.object(fid.linalg, "sqrtm", sqrtm_of_old(fid.linalg.sqrtm)):
            return float(fid.fid_from_feats(first, second))


def sqrtm_of_old(sqrtm: Callable[..., Any]) -> Callable[..., Any]:
    """Return scipy's ``sqrtm`` with the ``disp`` of scipy before 1.18: the root, and an error."""
    return lambda matrix, disp=True: sqrtm(matrix) if disp else (sqrtm(matrix), 0.0)


def torch_fidelity_distance(first: np.ndarray, second: np.ndarray) -> float:
    with official("torch_fidelity", "torch-fidelity==0.4.0"):
        from torch_fidelity import metric_fid

        sides = [metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (first, second)]
        result = metric_fid.fid_statistics_to_metric(*sides, verbose=False)
        return float(result[metric_fid.KEY_METRIC_FID])


def torchmetrics_distance(first: np.ndarray, second: np.ndarray) -> float:
    installed_folder("torch_fidelity", "torch-fidelity==0.4.0")
    with official("torchmetrics", "torchmetrics==1.9.0 lightning-utilities==0.15.3"):
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=_Given())
        for features, real in ((first, True), (second, False)):
            metric.update(torch.from_numpy(features).double(), real=real)
        return float(metric.compute())


class _Given(nn.Module):
    """A network whose images are features already."""

    num_features = 2048

    def forward(self, features: Tensor) -> Tensor:
        return features


OFFICIAL_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "clean": clean_fid_distance,
    "pytorch-fid": pytorch_fid_distance,
    "torch-fidelity": torch_fidelity_distance,
    "torchmetrics": torchmetrics_distance,
}
"""Name of our preprocessing to its namesake's FID of two sets of features; diffsynth's is biased."""
