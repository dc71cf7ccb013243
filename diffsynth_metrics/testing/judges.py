"""Tiny checkpoints of the judges. What they write is noise that no metric can read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

from diffsynth_metrics.testing.random_weights import randomize
from diffsynth_metrics.tokens import write_canaries

__all__ = ["write_qwen3_5", "write_qwen3_vl"]


def write_qwen3_5(folder: Path, seed: int) -> None:
    """Write a four-layer Qwen3.5, as of UnifiedReward 2.0 and Qwen-Image-Bench."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3_5Tokenizer

    tokens = _write_qwen_processor(folder, Qwen3_5Tokenizer, _QWEN3_5_TEMPLATE)
    rope = {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    }
    text = {
        "full_attention_interval": 4,
        "head_dim": 64,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "rope_parameters": rope,
    }
    config = Qwen3_5Config(**_tiny_judge_config(text, tokens))
    _write_judge(folder, Qwen3_5ForConditionalGeneration(config), seed, tokens)


def write_qwen3_vl(folder: Path, seed: int) -> None:
    """Write a three-layer Qwen3-VL, as of UnifiedReward-Edit."""
    from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokens = _write_qwen_processor(folder, Qwen2Tokenizer, _QWEN3_VL_TEMPLATE)
    rope = {
        "rope_type": "default",
        "rope_theta": 5000000,
        "mrope_interleaved": True,
        "mrope_section": [8, 4, 4],
    }
    text = {
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
    }
    config = Qwen3VLConfig(**_tiny_judge_config(text, tokens, deepstack_visual_indexes=[0, 1]))
    _write_judge(folder, Qwen3VLForConditionalGeneration(config), seed, tokens)


def _tiny_judge_config(
    text: dict[str, object], tokens: dict[str, int], **vision: object
) -> dict[str, object]:
    """Return what both architectures of judges have in common at their tiny size."""
    hidden_size = 128
    shared = {
        "eos_token_id": tokens["<|endoftext|>"],
        "hidden_size": hidden_size,
        "intermediate_size": 96,
        "max_position_embeddings": 32768,
        "vocab_size": -(-len(tokens) // 64) * 64,
    }
    sight = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": hidden_size,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "text_config": shared | text,
        "vision_config": sight | vision,
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def _write_judge(folder: Path, model: PreTrainedModel, seed: int, tokens: dict[str, int]) -> None:
    """Write random weights in two files, as the published ones are split, and what a server reads."""
    from transformers import GenerationConfig

    randomize(model, seed)
    with torch.no_grad():  # so that an answer ends after some tokens of noise, and not at the limit
        model.lm_head.weight[tokens["<|im_end|>"]] *= 2
    state = model.state_dict()
    names = sorted(state)
    half = len(names) // 2
    places: dict[str, str] = {}
    for part, chosen in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{part:05}-of-00002.safetensors"
        shard = {name: state[name].contiguous() for name in chosen}
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    ends = [tokens["<|im_end|>"], tokens["<|endoftext|>"]]
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[1]).save_pretrained(folder)


_QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
_QWEN_ADDED = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

# Written for the tiny checkpoints: what the judges need of the published templates.
_CONTENT = (
    "{%- macro write(content) %}{%- if content is string %}{{- content }}{%- else %}"
    "{%- for part in content %}{%- if part.type == 'image' %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endmacro %}"
)
_QWEN3_VL_TEMPLATE = (
    _CONTENT + "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}{{- write(message.content) }}{{- '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_QWEN3_5_TEMPLATE = (
    _CONTENT + "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}{{- write(message.content)|trim }}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- else %}{{- '<think>\n' }}{%- endif %}{%- endif %}"
)


def _write_qwen_processor(
    folder: Path, tokenizer_class: type[PreTrainedTokenizerFast], template: str
) -> dict[str, int]:
    """Write a small tokenizer in the files of Qwen's, and the settings of its image processor.

    Returns:
        All tokens and their ids.
    """
    from transformers import AddedToken

    vocabulary, merges = _byte_pairs()
    tokenizer = tokenizer_class(
        vocab=dict(vocabulary),
        merges=list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _QWEN_ADDED])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    write_canaries(tokenizer, folder, ["a red circle", "The cat's photo, in 4k!", "naïve café 世界"])
    images = {
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 4096, "longest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    files = {
        "preprocessor_config.json": images | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": images | {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2))
    tokens: dict[str, int] = tokenizer.get_vocab()
    return tokens


@cache
def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte-level vocabulary that merges the words of the judges' prompts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    folder = Path(__file__).parent.parent / "judges" / "prompts"
    texts = [
        (folder / f"{name}.json").read_text(encoding="utf-8").replace("\\n", "\n")
        for name in ("qwen_image_bench", "unified_reward_2", "unified_reward_edit")
    ]
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
