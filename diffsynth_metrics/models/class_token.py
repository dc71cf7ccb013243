"""The last block of an image tower, computed for the one token that is read behind it.

A CLIP embedding is the class token behind the last block, where all other tokens are thrown away. Of
these the last block needs keys and values alone, so it costs a sixth: of 24 blocks, a thirtieth of the
network's time is saved. The class token is the same, up to the rounding of products of another shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

__all__ = ["read_class_token_of_clip", "read_class_token_of_open_clip"]


def read_class_token_of_clip(tower: CLIPVisionModel) -> None:
    """Let the last block of transformers' ``CLIPVisionModel`` return the class token alone."""
    block: Any = tower.encoder.layers[-1]
    block.forward = _ClipBlock(block)


def read_class_token_of_open_clip(tower: Any) -> None:
    """Let the last block of open_clip's ``VisionTransformer`` return the class token alone.

    A tower that reads other tokens too, or keeps them in another order, is left as it is.
    """
    block = tower.transformer.resblocks[-1]
    if tower.pool_type == "tok" and tower.attn_pool is None and block.attn.batch_first:
        block.forward = _OpenClipBlock(block)


class _ClipBlock:
    """The forward of a block; an object and no closure, so that a copied block computes with itself."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, hidden_states: Tensor, *unused: Any, **options: Any) -> Tensor:
        attention = self.block.self_attn
        tokens = self.block.layer_norm1(hidden_states)

        def heads(projected: Tensor) -> Tensor:
            shape = (*projected.shape[:2], attention.num_heads, attention.head_dim)
            return projected.view(shape).transpose(1, 2)

        mixed = scaled_dot_product_attention(
            heads(attention.q_proj(tokens[:, :1])),
            heads(attention.k_proj(tokens)),
            heads(attention.v_proj(tokens)),
        )
        first = hidden_states[:, :1] + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        result: Tensor = first + self.block.mlp(self.block.layer_norm2(first))
        return result


class _OpenClipBlock(_ClipBlock):
    def __call__(self, hidden_states: Tensor, *unused: Any, **options: Any) -> Tensor:
        block = self.block
        tokens = block.ln_1(hidden_states)
        first = hidden_states[:, :1] + block.ls_1(block.attention(tokens[:, :1], tokens, tokens))
        result: Tensor = first + block.ls_2(block.mlp(block.ln_2(first)))
        return result
