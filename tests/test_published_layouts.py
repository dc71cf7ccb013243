"""Each network, as it is built without a config, takes exactly the tensors of the published file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from classes import metric_class

LAYOUTS = Path(__file__).parent / "data" / "layouts"
PUBLISHED = {
    "aesthetic": ("aesthetic", 403),
    "bioclip": ("bioclip2", 446),
    "clip": ("clip_h14", 912),
    "hpsv2": ("hpsv2", 686),
    "hpsv3": ("hpsv3", 736),
    "image_reward": ("image_reward", 625),
    "pickscore": ("clip_h14", 912),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_network_takes_exactly_the_published_layout(name: str) -> None:
    file, count = PUBLISHED[name]
    published = {
        key: tuple(shape) for key, shape in json.loads((LAYOUTS / f"{file}.json").read_text()).items()
    }
    metric = metric_class(name)
    network = metric.build(None)
    ours = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    computed = {key: tuple(buffer.shape) for key, buffer in network.named_buffers()}
    assert len(published) == count
    for key in published.keys() - ours.keys():
        assert key in metric.unused_weights or computed[key] == published[key], key
        del published[key]
    assert ours == published
    assert all(parameter.is_meta for parameter in network.parameters())
    assert not any(buffer.is_meta for buffer in network.buffers())
