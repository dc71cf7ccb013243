"""The engine that runs a network of transformers here."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import GenerationConfig

from diffsynth_metrics.base import check_batch_size
from diffsynth_metrics.judges.architectures import without_kernel_hints
from diffsynth_metrics.judges.engine import Answer, Engine, Question
from diffsynth_metrics.judges.plain_text import without_added_tokens
from diffsynth_metrics.weights.files import sha256_of
from diffsynth_metrics.weights.placement import execution_device

__all__ = ["LocalEngine", "check_max_new_tokens"]

logger = logging.getLogger(__name__)

# Replaces what looks like a special token in a text: from Unicode's private use area.
_MARK = "\ue000"
# Modules that Qwen3.5 runs its linear attention with, and the packages that have them.
_KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}


class LocalEngine(Engine):
    """Greedy, batched answers of a network in memory.

    Attributes:
        processor: transformers' processor of its images and chat template.
        batch_size: The largest number of questions that are decoded at once.
        max_new_tokens: The largest number of tokens of an answer.
        weight_files: What the network was loaded from; empty where that is not known.
    """

    weight_files: tuple[Path, ...] = ()

    def __init__(self, model: Any, processor: Any, *, batch_size: int, max_new_tokens: int) -> None:
        """Wrap a loaded network and its processor."""
        self._model: Any = model
        self.processor = processor
        self.batch_size = check_batch_size(batch_size)
        self.max_new_tokens = check_max_new_tokens(max_new_tokens)
        tokenizer = processor.tokenizer
        added = tokenizer.get_added_vocab()
        self._added_ids: dict[str, int] = added
        self._added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
        self._hidden = re.compile(f"{self._added.pattern}|{_MARK}")
        self._plain = without_added_tokens(tokenizer.backend_tokenizer)
        self._image_id = model.config.image_token_id
        eos = model.config.get_text_config().eos_token_id
        stops = {
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            *(eos if isinstance(eos, list) else [eos]),
        }
        self._stop_ids = frozenset(stop for stop in stops if stop is not None)
        pad_id = tokenizer.pad_token_id
        self._pad_id = tokenizer.eos_token_id if pad_id is None else pad_id

    @property
    def model(self) -> Any:
        """The network."""
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        self._model = model
        self.weight_files = ()

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, architecture, processor, dtype and the limit of tokens; not versions of libraries.

        ``"weights"`` is the sha256 of the files, or None for a network that was not loaded from files.
        Weights that were changed in memory are not noticed.
        """
        return {
            "engine": type(self).__name__,
            "weights": sha256_of(self.weight_files) if self.weight_files else None,
            "settings": self._settings(),
            "dtype": str(self.model.lm_head.weight.dtype).removeprefix("torch."),
            "max_new_tokens": self.max_new_tokens,
        }

    def _settings(self) -> str:
        """Return a digest of what stands beside the weights: architecture, processor and tokens."""
        config = self.model.config.to_diff_dict()
        config.pop("transformers_version", None)
        processor, tokenizer = self.processor.image_processor, self.processor.tokenizer
        parts = [
            json.dumps(config, sort_keys=True, default=str),
            json.dumps(processor.to_dict(), sort_keys=True, default=str),
            str(self.processor.chat_template),
            tokenizer.backend_tokenizer.to_str(),
            str(sorted(self._stop_ids)),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the network takes its inputs."""
        return execution_device(self.model)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer in batches; neither the batches nor their order change an answer in float32."""
        if self.model.config.model_type == "qwen3_5":
            _name_missing_kernels(self.device.type)
        answers: list[Answer] = []
        # generate() has one repetition penalty for a batch.
        for _, group in groupby(questions, lambda question: question.repetition_penalty):
            alike = list(group)
            for start in range(0, len(alike), self.batch_size):
                answers += self._answer_batch(alike[start : start + self.batch_size])
        return answers

    def _answer_batch(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer questions with the same repetition penalty together."""
        shown = self._patches(questions)
        prompts = [
            self._tokens(question, [grid for _, grid in patches])
            for question, patches in zip(questions, shown, strict=True)
        ]
        width = max(map(len, prompts))
        # Padded with a token of the prompt, because transformers 5.8 penalises padding, too.
        ids = torch.tensor([prompt[:1] * (width - len(prompt)) + prompt for prompt in prompts])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.tensor(
                [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            ),
        }
        if any(shown):
            inputs |= {
                "mm_token_type_ids": ids.eq(self._image_id).int(),
                "pixel_values": torch.cat([pixels for patches in shown for pixels, _ in patches]),
                "image_grid_thw": torch.stack([grid for patches in shown for _, grid in patches]),
            }
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=float(questions[0].repetition_penalty),
            eos_token_id=sorted(self._stop_ids),
            pad_token_id=self._pad_id,
        )
        with without_kernel_hints():
            written = self.model.generate(
                **{name: tensor.to(self.device) for name, tensor in inputs.items()},
                generation_config=settings,
            )
        return [self._answer(tokens) for tokens in written[:, width:].tolist()]

    def _answer(self, tokens: list[int]) -> Answer:
        """Read the tokens before the first stop token; those behind it are padding."""
        end = next((i for i, token in enumerate(tokens) if token in self._stop_ids), None)
        text = self.processor.tokenizer.decode(
            tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Answer(text, "length" if end is None else "stop")

    def _patches(self, questions: Sequence[Question]) -> list[list[tuple[Tensor, Tensor]]]:
        """Return the patches ``[P, D]`` and the grid ``[3]`` of each image of each question.

        All images are prepared in one call, and one that several questions share is prepared once.
        """
        shown = [[part for part in q.content if isinstance(part, PIL.Image.Image)] for q in questions]
        images = {id(image): image for group in shown for image in group}
        if not images:
            return [[] for _ in questions]
        # They are RGB, of which a conversion would make a copy.
        features = self.processor.image_processor(
            images=list(images.values()), return_tensors="pt", do_convert_rgb=False
        )
        grids = features["image_grid_thw"]
        pixels = features["pixel_values"].split(grids.prod(-1).tolist())
        prepared = dict(zip(images, zip(pixels, grids, strict=True), strict=True))
        return [[prepared[id(image)] for image in group] for group in shown]

    def _tokens(self, question: Question, grids: list[Tensor]) -> list[int]:
        """Tokenize a question as the official tokenizer does, except that its texts are plain text.

        While the chat template is rendered, a mark replaces what looks like a special token in a text,
        so that what is one in the result is the template's. What lies between two special tokens is
        tokenized as a whole.
        """
        hidden: list[str] = []

        def hide(text: str) -> str:
            hidden.extend(self._hidden.findall(text))
            return self._hidden.sub(_MARK, text)

        rendered = self.processor.apply_chat_template(
            _messages(question, hide),
            tokenize=False,
            add_generation_prompt=True,
            **({} if question.thinking is None else {"enable_thinking": question.thinking}),
        )
        merge = self.processor.image_processor.merge_size**2
        counts = (int(grid.prod()) // merge for grid in grids)
        remaining = iter(hidden)
        ids: list[int] = []
        done = 0
        for found in [*self._added.finditer(rendered), None]:
            end = len(rendered) if found is None else found.start()
            if end > done:
                text = re.sub(_MARK, lambda _: next(remaining), rendered[done:end])
                ids += self._plain.encode(text, add_special_tokens=False).ids
            if found is not None:
                token = self._added_ids[found.group()]
                ids += [token] * (next(counts) if token == self._image_id else 1)
                done = found.end()
        return ids


def check_max_new_tokens(max_new_tokens: int) -> int:
    """Return a limit of tokens.

    Raises:
        ValueError: It is not a positive int.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a positive int, got {max_new_tokens!r}")
    return max_new_tokens


@cache
def _name_missing_kernels(device: str) -> None:
    """Say once, on a GPU, which optional packages make Qwen3.5 faster."""
    missing = [name for module, name in _KERNELS.items() if find_spec(module) is None]
    if device == "cuda" and missing:
        logger.warning("Qwen3.5 is much faster on a GPU with: pip install %s", " ".join(missing))


def _messages(question: Question, hide: Callable[[str], str]) -> list[dict[str, Any]]:
    """Write a question as messages, with every text changed by a function, in their order."""
    messages: list[dict[str, Any]] = []
    if question.system is not None:
        messages.append({"role": "system", "content": hide(question.system)})
    content = [
        {"type": "text", "text": hide(part)} if isinstance(part, str) else {"type": "image"}
        for part in question.content
    ]
    return [*messages, {"role": "user", "content": content}]
