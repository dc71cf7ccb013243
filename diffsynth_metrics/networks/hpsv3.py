"""HPSv3's network: Qwen2-VL without its language-model head, and a reward head on one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLRotaryEmbedding,
    Qwen2VLTextModel,
)

from diffsynth_metrics.errors import CheckpointError

__all__ = [
    "HPSv3Network",
    "build_hpsv3",
    "patches_of",
    "qwen2_vl_7b_config",
    "qwen2_vl_config",
    "set_frequencies",
]

_VISION_THETA = 10000.0


def qwen2_vl_7b_config() -> Qwen2VLConfig:
    """Return the published architecture: Qwen2-VL-7B with one token more, ``<|Reward|>``."""
    return Qwen2VLConfig(
        text_config={
            "vocab_size": 151658,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 3584,
            "mlp_ratio": 4,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    )


def qwen2_vl_config(config: dict[str, Any] | None) -> Qwen2VLConfig:
    """Return the architecture of a parsed ``config.json``, or the published one for None.

    Raises:
        CheckpointError: It describes another kind of network.
    """
    if config is None:
        return qwen2_vl_7b_config()
    if config.get("model_type") != "qwen2_vl":
        raise CheckpointError(
            f"the config.json next to the weights describes a {config.get('model_type')!r} network, and "
            "HPSv3 is a 'qwen2_vl'"
        )
    return Qwen2VLConfig.from_dict(config)


class HPSv3Network(nn.Module):
    """The published module tree, without the language-model head that a score does not need."""

    _no_split_modules = ("Qwen2VLDecoderLayer", "Qwen2VLVisionBlock")

    def __init__(self, config: Qwen2VLConfig) -> None:
        """Build from transformers' Qwen2-VL config."""
        super().__init__()
        self.config = config
        self.visual: Any = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        self.model: Any = Qwen2VLTextModel(config.text_config)
        self.rm_head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def encode_images(self, pixels: list[Tensor]) -> list[Tensor]:
        """Map normalised images ``[3, H, W]`` of any sizes to image tokens ``[T, D]`` of each.

        H and W are multiples of 28, and T is H/28 * W/28.
        """
        vision = self.config.vision_config
        patch, merge = vision.patch_size, vision.spatial_merge_size
        patches = torch.cat([patches_of(image, self.config) for image in pixels])
        sides = [[1, *(side // patch for side in image.shape[-2:])] for image in pixels]
        grid = torch.tensor(sides, device="cpu")
        tokens: Any = self.visual(patches, grid_thw=grid.to(patches.device)).pooler_output
        return list(tokens.split((grid.prod(dim=-1) // merge**2).tolist()))

    def forward(
        self,
        input_ids: Tensor,
        is_image: Tensor,
        last: Tensor,
        position_ids: Tensor,
        image_tokens: Tensor,
    ) -> Tensor:
        """Read the reward head at the last token of each row.

        Args:
            input_ids: ``[B, L]``, padded on the right; causal attention keeps padding out of scores.
            is_image: bool ``[B, L]``, where image tokens go.
            last: ``[B]``, the position of ``<|Reward|>`` in each row.
            position_ids: ``[3, B, L]``.
            image_tokens: ``[T, D]`` of all rows, in their order.

        Returns:
            ``[B, 2]``, float32 or wider: the mean of the score and the logarithm of its deviation.
        """
        weight = self.model.embed_tokens.weight
        # accelerate keeps offloaded weights on "meta", and then moves the inputs itself.
        embeddings = self.model.embed_tokens(
            input_ids if weight.is_meta else input_ids.to(weight.device)
        )
        where = is_image.to(embeddings.device).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(where, image_tokens.to(embeddings))
        states = self.model(
            inputs_embeds=embeddings, position_ids=position_ids.to(embeddings.device), use_cache=False
        ).last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        read: Tensor = self.rm_head(states[rows, last.to(states.device)].to(self._head_dtype))
        return read

    @property
    def _head_dtype(self) -> torch.dtype:
        return next(self.rm_head.parameters()).dtype


def patches_of(image: Tensor, config: Qwen2VLConfig) -> Tensor:
    """Cut an image ``[3, H, W]`` into the patches of the vision tower ``[P, 3 * 2 * 14 * 14]``.

    The patches of one image token follow each other; the picture stands for both frames of a patch.
    """
    vision = config.vision_config
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    channels, height, width = image.shape
    across, down = width // patch // merge, height // patch // merge
    cut = image.reshape(channels, down, merge, patch, across, merge, patch)
    cut = cut.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # down, across, merge, merge, 3, 1, 14, 14
    return cut.expand(*[-1] * 5, frames, -1, -1).reshape(down * across * merge**2, -1)


class _VisionAngles(nn.Module):
    """Angles of the vision tower's rotation, in the dtype of its frequencies."""

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        half = head_dim // 2
        inv_freq = 1.0 / (_VISION_THETA ** (torch.arange(0, half, 2, dtype=torch.float) / half))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, *arguments: Any) -> Any:
        """Return cosines and sines ``[P, head_dim]``, or for older transformers a table of angles."""
        if len(arguments) == 1:
            steps = torch.arange(arguments[0], device=self.inv_freq.device, dtype=self.inv_freq.dtype)
            return torch.outer(steps, self.inv_freq)
        positions = arguments[1].to(self.inv_freq.device, self.inv_freq.dtype)
        angles = (positions.unsqueeze(-1) * self.inv_freq).flatten(1)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def build_hpsv3(config: Qwen2VLConfig) -> HPSv3Network:
    """Build the network with its parameters on the meta device and its frequencies in memory."""
    with torch.device("meta"):
        network = HPSv3Network(config)
    set_frequencies(network, torch.float32)
    return network


def set_frequencies(network: HPSv3Network, dtype: torch.dtype) -> None:
    """Compute the rotary frequencies for a dtype of the towers.

    The authors' ``model.to(bfloat16)`` rounds the frequencies, and in the vision tower their code then
    multiplies in bfloat16. The network was trained like this, so a score in bfloat16 depends on it.
    """
    narrow = dtype if dtype.itemsize < 4 else torch.float32
    device = next(network.rm_head.parameters()).device
    rotary = Qwen2VLRotaryEmbedding(config=network.config.text_config)
    rotary.inv_freq.copy_(rotary.inv_freq.to(narrow))
    vision = network.config.vision_config
    angles = _VisionAngles(vision.embed_dim // vision.num_heads)
    angles.inv_freq = angles.inv_freq.to(narrow)
    if not device.type == "meta":
        rotary, angles = rotary.to(device), angles.to(device)
    network.model.rotary_emb = rotary
    network.visual.rotary_pos_emb = angles
