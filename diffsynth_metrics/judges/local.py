"""The engine that runs a network of transformers here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from diffsynth_metrics.base import check_batch_size
from diffsynth_metrics.judges.decoding import Prompt, decode_greedily
from diffsynth_metrics.judges.engine import Answer, Engine, Question
from diffsynth_metrics.judges.plain_text import without_added_tokens
from diffsynth_metrics.weights.placement import execution_device

__all__ = ["LocalEngine", "check_max_new_tokens"]

# A text of a question, while the chat template is rendered: from Unicode's private use area.
_MARK = "\ue000"


class LocalEngine(Engine):
    """Greedy, batched answers of a network in memory.

    Attributes:
        model: The network.
        processor: transformers' processor of its images and chat template.
        batch_size: The largest number of questions that are decoded at once.
        max_new_tokens: The largest number of tokens of an answer.
    """

    def __init__(self, model: Any, processor: Any, *, batch_size: int, max_new_tokens: int) -> None:
        """Wrap a loaded network and its processor."""
        self.model: Any = model
        self.processor = processor
        self.batch_size = check_batch_size(batch_size)
        self.max_new_tokens = check_max_new_tokens(max_new_tokens)
        tokenizer = processor.tokenizer
        added = tokenizer.get_added_vocab()
        self._added_ids: dict[str, int] = added
        self._added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
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
    def device(self) -> torch.device:
        """Where the network takes its inputs."""
        return execution_device(self.model)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer in batches; neither the batches nor their order change an answer in float32."""
        answers: list[Answer | None] = [None] * len(questions)
        for indices in self._batches(questions):
            tokens = decode_greedily(
                self.model,
                self._prompts([questions[index] for index in indices]),
                max_new_tokens=self.max_new_tokens,
                stop_ids=self._stop_ids,
                pad_id=self._pad_id,
                device=self.device,
            )
            for index, ids in zip(indices, tokens, strict=True):
                answers[index] = self._answer(ids)
        return [answer for answer in answers if answer is not None]

    def _batches(self, questions: Sequence[Question]) -> Iterator[list[int]]:
        """Yield positions of questions, those about the same images together."""
        groups: dict[Any, list[int]] = {}
        for index, question in enumerate(questions):
            groups.setdefault(_image_key(question) or index, []).append(index)
        batch: list[int] = []
        for group in groups.values():
            if batch and len(batch) + len(group) > self.batch_size:
                yield batch
                batch = []
            batch = batch + group
            while len(batch) > self.batch_size:
                yield batch[: self.batch_size]
                batch = batch[self.batch_size :]
        if batch:
            yield batch

    def _answer(self, ids: list[int]) -> Answer:
        stopped = ids[-1] in self._stop_ids
        return Answer(self._text(ids), "stop" if stopped else "length")

    def _text(self, ids: list[int]) -> str:
        text: str = self.processor.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def _prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        """Make questions into tokens and pixels; images that several ask about are prepared once."""
        groups = {
            _image_key(question): [part for part in question.content if not isinstance(part, str)]
            for question in questions
        }
        pixels = self._pixels({key: images for key, images in groups.items() if images})
        return [self._prompt(question, pixels) for question in questions]

    def _pixels(
        self, groups: dict[tuple[int, ...], list[PIL.Image.Image]]
    ) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
        """Return the patches and the grids of each group of images, all prepared in one call."""
        if not groups:
            return {}
        images = [image for group in groups.values() for image in group]
        # They are RGB, of which a conversion would make a copy.
        features = self.processor.image_processor(
            images=images, return_tensors="pt", do_convert_rgb=False
        )
        grids = features["image_grid_thw"].split([len(group) for group in groups.values()])
        pixels = features["pixel_values"].split([int(grid.prod(-1).sum()) for grid in grids])
        return dict(zip(groups, zip(pixels, grids, strict=True), strict=True))

    def _prompt(
        self, question: Question, pixels: Mapping[tuple[int, ...], tuple[Tensor, Tensor]]
    ) -> Prompt:
        key = _image_key(question)
        pixel_values, grid = pixels.get(key, (None, None))
        ids = self._tokens(question, grid)
        is_image = torch.tensor(ids).eq(self._image_id)
        positions, _ = self.model.model.get_rope_index(
            torch.tensor([ids]), mm_token_type_ids=is_image[None].int(), image_grid_thw=grid
        )
        draft = question.draft
        return Prompt(
            ids=ids,
            positions=positions[:, 0],
            pixel_values=pixel_values,
            image_grid=grid,
            images=key,
            text_start=int(is_image.nonzero().max()) + 1 if key else 0,
            repetition_penalty=question.repetition_penalty,
            draft=None if draft is None else lambda answer: self._encode(draft(self._text(answer))),
        )

    def _tokens(self, question: Question, grid: Tensor | None) -> list[int]:
        """Tokenize a question as the official tokenizer does, except that its texts are plain text.

        The chat template is rendered with marks in place of the texts, so that what is a special token
        in the result is the template's. What lies between two special tokens is tokenized as a whole.
        """
        texts: list[str] = []
        rendered = self.processor.apply_chat_template(
            _messages(question, texts),
            tokenize=False,
            add_generation_prompt=True,
            **({} if question.thinking is None else {"enable_thinking": question.thinking}),
        )
        merge = self.processor.image_processor.merge_size**2
        counts = iter([] if grid is None else (grid.prod(-1) // merge).tolist())
        remaining = iter(texts)
        ids: list[int] = []
        done = 0
        for found in [*self._added.finditer(rendered), None]:
            end = len(rendered) if found is None else found.start()
            if end > done:
                text = re.sub(_MARK, lambda _: next(remaining), rendered[done:end])
                ids += self._encode(text)
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


def _messages(question: Question, texts: list[str]) -> list[dict[str, Any]]:
    """Write a question as messages whose texts are marks, and collect the texts in their order.

    Space around a text stays outside its mark, because chat templates strip messages.
    """

    def mark(text: str) -> str:
        core = text.strip()
        if not core:
            return text
        texts.append(core)
        start = text.index(core)
        return text[:start] + _MARK + text[start + len(core) :]

    messages: list[dict[str, Any]] = []
    if question.system is not None:
        messages.append({"role": "system", "content": mark(question.system)})
    content = [
        {"type": "text", "text": mark(part)} if isinstance(part, str) else {"type": "image"}
        for part in question.content
    ]
    return [*messages, {"role": "user", "content": content}]


def _image_key(question: Question) -> tuple[int, ...]:
    return tuple(id(part) for part in question.content if isinstance(part, PIL.Image.Image))
