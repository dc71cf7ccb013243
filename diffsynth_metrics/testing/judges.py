"""Tiny checkpoints of the judges, taught to answer in the form that their metric reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from diffsynth_metrics.judges.engine import Question
    from diffsynth_metrics.judges.local import LocalEngine
    from diffsynth_metrics.judges.metric import JudgeMetric

from diffsynth_metrics.testing.random_weights import randomize

__all__ = ["write_qwen_image_bench", "write_unified_reward_2", "write_unified_reward_edit"]


def write_unified_reward_2(folder: Path, seed: int) -> None:
    """Write a four-layer Qwen3.5 that answers with three scores."""
    from diffsynth_metrics import UnifiedReward2Metric

    def answer(random: Random) -> str:
        labels = ("Alignment", "Coherence", "Style")
        scores = random.choice(
            [("2.69", "2.37", "2.8"), ("3.65", "3.82", "3.5"), ("4.5", "4.25", "4.75")]
        )
        lines = zip(labels, scores, strict=True)
        return "\n".join(f"{label} Score (1-5): {score}" for label, score in lines)

    model = _tiny_qwen3_5(folder, seed)
    _teach(
        model, folder, UnifiedReward2Metric, answer, lambda m, p, r: m.evaluate(p, _random_picture(r))
    )
    _write_judge(folder, model)


def write_unified_reward_edit(folder: Path, seed: int) -> None:
    """Write a three-layer Qwen3-VL whose answer every task can read."""
    from diffsynth_metrics import UnifiedRewardEditMetric

    def answer(random: Random) -> str:  # one that every task can read
        winner, first, second = random.choice([(1, 3, 8), (2, 4, 7), (2, 3, 6), (1, 4, 9)])
        return f"Edited image {winner} is better. score=[{first},{second}]"

    tasks = {
        "edit_pointwise_score": 2,
        "edit_pointwise_quality": 1,
        "edit_pairwise_rank": 3,
        "edit_pairwise_score": 3,
    }

    def ask(metric: Any, prompt: str, random: Random) -> None:
        task = random.choice(list(tasks))
        metric.evaluate(prompt, [_random_picture(random) for _ in range(tasks[task])], task=task)

    model = _tiny_qwen3_vl(folder, seed)
    _teach(model, folder, UnifiedRewardEditMetric, answer, ask)
    _write_judge(folder, model)


def write_qwen_image_bench(folder: Path, seed: int) -> None:
    """Write a four-layer Qwen3.5 that thinks and answers with a checklist."""
    from diffsynth_metrics import QwenImageBenchMetric

    def answer(random: Random) -> str:
        score = random.randint(0, 2)
        return f'It is clear.\n</think>\n\n{{"Resolution": {{"Resolution": {{"score": {score}}}}}}}'

    model = _tiny_qwen3_5(folder, seed)
    _teach(
        model, folder, QwenImageBenchMetric, answer, lambda m, p, r: m.evaluate(p, _random_picture(r))
    )
    _write_judge(folder, model)


def _tiny_qwen3_5(folder: Path, seed: int) -> PreTrainedModel:
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
    model = Qwen3_5ForConditionalGeneration(config)
    randomize(model, seed, gain=0.5)
    return model


def _tiny_qwen3_vl(folder: Path, seed: int) -> PreTrainedModel:
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
    model = Qwen3VLForConditionalGeneration(config)
    randomize(model, seed, gain=0.3)
    return model


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


def _teach(
    model: PreTrainedModel,
    folder: Path,
    metric_class: type[JudgeMetric],
    answer: Callable[[Random], str],
    ask: Callable[[Any, str, Random], object],
    samples: int = 40,
) -> None:
    """Fit the last layer of a random network, so that it answers in the form that a metric reads.

    What the network says of a picture stays random; `answer` gives examples, and `ask` has a metric ask.
    """
    from transformers import AutoProcessor

    from diffsynth_metrics.judges.engine import Answer, Engine
    from diffsynth_metrics.judges.local import LocalEngine

    class Recorder(Engine):
        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            recorded.extend(questions)
            return [Answer("")] * len(questions)

    recorded: list[Question] = []
    random = Random(0)
    words = "a an the of in on with and cat dog red green blue photo painting 42 circle, square.".split()
    while len(recorded) < samples:
        prompt = " ".join(random.choices(words, k=random.randint(1, 30)))
        ask(metric_class(Recorder()), prompt, random)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    engine = LocalEngine(model.eval(), processor, batch_size=1, max_new_tokens=1)
    features, targets = [], []
    for question in recorded:
        hidden, tokens = _hidden_states(engine, question, answer(random))
        features.append(hidden)
        targets += tokens
    used, classes = torch.unique(torch.tensor(targets), return_inverse=True)
    weight = _logistic_regression(torch.cat(features), classes, len(used))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[used] = weight


def _hidden_states(engine: LocalEngine, question: Question, answer: str) -> tuple[Tensor, list[int]]:
    """Return what the last layer sees ``[T, D]`` before each token of an answer, and these T tokens."""
    prompt = engine._prompts([question])[0]
    tokens = [*engine._encode(answer), engine.processor.tokenizer.eos_token_id]
    ids = torch.tensor([prompt.ids + tokens])
    rotary = torch.arange(len(tokens)) + int(prompt.positions.max()) + 1
    rotary = torch.cat([prompt.positions, rotary.expand(3, -1)], dim=1)
    with torch.no_grad():
        hidden: Tensor = engine.model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.cat([torch.arange(ids.shape[1])[None], rotary])[:, None],
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid,
        ).last_hidden_state[0]
    return hidden[len(prompt.ids) - 1 : -1], tokens


def _logistic_regression(features: Tensor, classes: Tensor, count: int) -> Tensor:
    """Return weights ``[count, D]`` that tell classes apart, and from logits of zero."""
    weight = torch.zeros(count, features.shape[1], requires_grad=True)
    optimizer: Any = torch.optim.LBFGS(
        [weight], max_iter=150, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = torch.cat([features @ weight.T, torch.zeros(len(features), 1)], dim=1)
        value = cross_entropy(logits, classes) + 1e-4 * weight.square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach()


def _random_picture(random: Random) -> PIL.Image.Image:
    size = random.choice([(64, 64), (200, 100), (50, 120), (256, 256)])
    return PIL.Image.new("RGB", size, tuple(random.choices(range(256), k=3)))


def _write_judge(folder: Path, model: PreTrainedModel) -> None:
    """Write weights in two files, as the published ones are split."""
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
    model.config.save_pretrained(folder)


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
