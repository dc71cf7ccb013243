"""The tiny checkpoint of HPSv3."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffsynth_metrics.testing.random_weights import randomize
from diffsynth_metrics.tokens import write_canaries

__all__ = ["write_hpsv3"]


def write_hpsv3(folder: Path, seed: int) -> None:
    """Write a three-layer Qwen2-VL with the reward head."""
    from transformers import Qwen2VLConfig

    from diffsynth_metrics.networks.hpsv3 import HPSv3Network

    tokens = _write_qwen2_vl_tokenizer(folder)
    # The keys of Qwen2-VL's own config.json, which is older than transformers' nested configs.
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "image_token_id": tokens["<|image_pad|>"],
        "intermediate_size": 96,
        "max_position_embeddings": 32768,
        "max_window_layers": 3,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "video_token_id": tokens["<|video_pad|>"],
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "in_chans": 3,
            "mlp_ratio": 4,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": tokens["<|vision_end|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_token_id": tokens["<|vision_pad|>"],
        "vocab_size": len(tokens) + 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model = HPSv3Network(Qwen2VLConfig.from_dict(config))
    randomize(model, seed)
    head = torch.zeros(len(tokens) + 1, 64)  # in the published file, and not needed
    weights = model.state_dict() | {"lm_head.weight": head}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_qwen2_vl_tokenizer(folder: Path) -> dict[str, int]:
    """Write a small tokenizer and the processor's settings in Qwen2-VL's files; return its tokens.

    It reads any text byte by byte, and the words of HPSv3's instruction in a few pieces.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from diffsynth_metrics.pixels.transforms import CLIP_MEAN, CLIP_STD

    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = Path(__file__).parent.parent / "judges" / "prompts" / "hpsv3.json"
    learner.train_from_iterator([json.loads(texts.read_text(encoding="utf-8"))["instruction"]], trainer)
    learned = json.loads(learner.to_str())["model"]
    special = [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
        *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
        *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    ]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        model_max_length=32768,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    write_canaries(tokenizer, folder, ["a red circle", "The cat's photo, in 4k!", "naïve café 世界"])
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "max_pixels": 12845056,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "temporal_patch_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    template = (
        "{% for message in messages %}{% if loop.first %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}, indent=2))
    tokens: dict[str, int] = tokenizer.get_vocab()
    return tokens
