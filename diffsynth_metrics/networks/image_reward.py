"""ImageReward's network: timm's ViT-L/16, BLIP's text encoder with cross-attention, a reward head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BlipConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from diffsynth_metrics.networks.score_head import score_head

__all__ = ["ImageRewardNetwork", "blip_vit_l_16_config", "build_image_reward"]

_PROJECTION_DIM = 256


def blip_vit_l_16_config() -> BlipConfig:
    """Return the published architecture: ``med_config.json`` and BLIP's "large" image tower."""
    return BlipConfig(
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 16,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": 30524,
            "hidden_size": 768,
            "encoder_hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
        },
    )


class ImageRewardNetwork(nn.Module):
    """The published module tree, so that the checkpoint's names are this network's names."""

    blip: Any
    mlp: Any

    def __init__(self, config: BlipConfig) -> None:
        """Build from transformers' BLIP config."""
        super().__init__()
        vision, text = config.vision_config, config.text_config
        # Without it there is no cross-attention; the encoder still attends in both directions.
        text.is_decoder = True
        # This encoder adds its mask to the attention scores, which only a float mask allows.
        text._attn_implementation = "eager"
        self.image_size = vision.image_size
        self.blip = nn.Module()
        self.blip.visual_encoder = VisionTransformer(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            norm_layer=partial(nn.LayerNorm, eps=vision.layer_norm_eps),
            num_classes=0,
            global_pool="",  # its forward returns all tokens
            weight_init="skip",
        )
        self.blip.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        # In the checkpoint, and unused by the reward.
        self.blip.vision_proj = nn.Linear(vision.hidden_size, _PROJECTION_DIM)
        self.blip.text_proj = nn.Linear(text.hidden_size, _PROJECTION_DIM)
        self.mlp = nn.Module()
        self.mlp.layers = score_head(text.hidden_size)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Map normalised pixels ``[B, 3, S, S]`` to image tokens ``[B, T, D]``."""
        tokens: Tensor = self.blip.visual_encoder(pixel_values)
        return tokens

    def read(self, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Map token ids ``[B, L]``, their mask and image tokens to rewards ``[B]``, float32 or wider.

        The feature is the last hidden state of the plain [CLS] token.
        """
        states = self.blip.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_tokens,
        ).last_hidden_state
        head = self.mlp.layers
        reward: Tensor = head(states[:, 0].to(head[0].weight.dtype)).squeeze(-1)
        return reward


def build_image_reward(config: dict[str, Any] | None) -> ImageRewardNetwork:
    """Build the network with its parameters on the meta device and its position ids in memory.

    Args:
        config: A parsed ``config.json`` of BLIP, or None for the published architecture.
    """
    # A tokenizer's folder may carry BERT's config.json, which does not describe this network.
    is_blip = config is not None and config.get("model_type") == "blip"
    with torch.device("meta"):
        network = ImageRewardNetwork(BlipConfig.from_dict(config) if is_blip else blip_vit_l_16_config())
    embeddings = network.blip.text_encoder.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    return network
