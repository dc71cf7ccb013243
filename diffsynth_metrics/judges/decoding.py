"""Greedy decoding of many prompts at once, token for token what each gives alone.

Three ways to need fewer passes through the network, none of which changes an answer in float32:

- Prompts are decoded together. The first pass pads them behind their ends, where causal attention never
  looks and needs no mask; or in front, where there are recurrent states, which would see the padding.
- Prompts that begin alike and have the same images run through what they share once. Each kind of
  ending then continues on a copy of the cache, without padding in between, which the recurrent state of
  a linear-attention layer would not survive.
- Where a draft guesses the next tokens, one pass checks all of them: the longest run that the network
  would have chosen itself is kept. A recurrent state cannot be cropped, so it is restored where a guess
  was wrong, and the tokens that were right are fed again.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["Prompt", "decode_greedily"]


@dataclass(eq=False)
class Prompt:
    """What the network reads, and how the answer is to be decoded.

    Attributes:
        ids: Tokens; an image is a run of image tokens.
        positions: int64 ``[3, L]``, the rotary positions (time, height, width) of the tokens.
        pixel_values: Patches of all images ``[P, D]``, or None where there is no image.
        image_grid: int64 ``[images, 3]``: time, height and width of each image in patches.
        images: Equal for prompts that have the same images.
        text_start: Where the last image has ended.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens that the
            prompt or the answer has already.
        draft: Tokens of the answer so far to a guess of the next ones.
    """

    ids: list[int]
    positions: Tensor
    pixel_values: Tensor | None = None
    image_grid: Tensor | None = None
    images: tuple[int, ...] = ()
    text_start: int = 0
    repetition_penalty: float = 1.0
    draft: Callable[[list[int]], list[int]] | None = None


@dataclass(eq=False)
class _Row:
    """One answer in the making."""

    prompt: Prompt
    answer: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Chosen tokens that the cache does not have yet."""
    length: int = 0
    """Tokens that the cache has."""

    offset: int = field(init=False)
    """What is added to the place of a token after the images to have its rotary position."""

    def __post_init__(self) -> None:
        self.offset = int(self.prompt.positions.max()) + 1 - len(self.prompt.ids)


@dataclass(eq=False)
class _Batch:
    """Rows and what the network remembers of them; `mask` ``[B, T]`` says which columns are theirs."""

    rows: list[_Row]
    cache: Cache
    mask: Tensor
    logits: Tensor
    """float ``[B, V]``: of the token after the last one that was fed."""


@torch.inference_mode()
def decode_greedily(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    pad_id: int,
    device: torch.device,
    share_prefixes: bool = True,
) -> list[list[int]]:
    """Return the tokens of one answer per prompt; one that was not cut off ends with a stop token.

    Args:
        model: A network of transformers with rotary positions on three axes.
        prompts: All are decoded at once.
        max_new_tokens: The largest number of tokens of an answer.
        stop_ids: Tokens that end an answer.
        pad_id: Any token; it stands where a prompt is shorter than others.
        device: Where the network takes its inputs.
        share_prefixes: Run what prompts with the same images have in common once.
    """
    rows = [_Row(prompt) for prompt in prompts]
    batch = _prefill(model, rows, pad_id, device, share_prefixes)
    decoder = _Decoder(model, max_new_tokens, stop_ids, penalised=_seen(batch))
    decoder.choose_first(batch)
    while batch.rows:
        batch = decoder.without_finished(batch)
        if batch.rows:
            decoder.step(batch)
    return [row.answer for row in rows]


class _Decoder:
    """The steps after the prompts were read."""

    def __init__(
        self,
        model: Any,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        penalised: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._stop_ids = stop_ids
        self._penalised = penalised

    def choose_first(self, batch: _Batch) -> None:
        for row, token in zip(batch.rows, self._choose(batch.logits[:, None])[0], strict=True):
            self._append(row, token)

    def without_finished(self, batch: _Batch) -> _Batch:
        keep = [i for i, row in enumerate(batch.rows) if not self._is_finished(row)]
        if len(keep) == len(batch.rows) or not keep:
            batch.rows = [batch.rows[i] for i in keep]
            return batch
        index = torch.tensor(keep, device=batch.mask.device)
        if self._penalised is not None:
            seen, penalties = self._penalised
            self._penalised = seen[index], penalties[index]
        rows = [batch.rows[i] for i in keep]
        return _Batch(rows, _select(batch.cache, index), batch.mask[index], batch.logits[index])

    def step(self, batch: _Batch) -> None:
        """Feed every row as many tokens as all of them have, chosen or guessed, and read the next."""
        rows = batch.rows
        guesses = [self._guess(row) for row in rows]
        known = [len(row.pending) for row in rows]
        width = min(a + len(b) for a, b in zip(known, guesses, strict=True))
        tokens = [(row.pending + guess)[:width] for row, guess in zip(rows, guesses, strict=True)]
        guessed = width > min(known)
        before = [state.clone() for state in _recurrent_states(batch.cache)] if guessed else []
        logits = _feed(self._model, batch, tokens)
        first = min(min(known), width) - 1
        choices = self._choose(logits[:, first:])
        rejected = []
        for i, row in enumerate(rows):
            if known[i] > width:  # all of it was known, and more is to come
                row.pending = row.pending[width:]
                row.length += width
                continue
            row.pending = row.pending.copy()
            accepted = known[i]
            self._append(row, choices[accepted - 1 - first][i])
            while accepted < width and row.answer[-1] == tokens[i][accepted]:
                if self._is_finished(row):
                    break
                accepted += 1
                self._append(row, choices[accepted - 1 - first][i])
            if accepted == width:
                row.pending = row.pending[width:]
                row.length += width
            else:
                rejected.append(i)
        if rejected:
            for state, old in zip(_recurrent_states(batch.cache), before, strict=True):
                state[rejected] = old[rejected]
            batch.mask[rejected, -width:] = 0

    def _guess(self, row: _Row) -> list[int]:
        # Behind another row, or with a penalty that depends on each choice, there is nothing to gain.
        if row.prompt.draft is None or self._penalised is not None or len(row.pending) != 1:
            return []
        return row.prompt.draft(row.answer)[: self._max_new_tokens - len(row.answer)]

    def _append(self, row: _Row, token: int) -> None:
        row.answer.append(token)
        row.pending.append(token)

    def _is_finished(self, row: _Row) -> bool:
        return row.answer[-1] in self._stop_ids or len(row.answer) >= self._max_new_tokens

    def _choose(self, logits: Tensor) -> list[list[int]]:
        """Return the best token of each column and row of logits ``[B, C, V]``, as C lists of B."""
        if self._penalised is None:
            columns: list[list[int]] = logits.argmax(-1).T.tolist()
            return columns
        seen, penalties = self._penalised
        scores = logits[:, -1].float()
        lowered = torch.where(scores < 0, scores * penalties, scores / penalties)
        chosen = torch.where(seen, lowered, scores).argmax(-1)
        seen.scatter_(1, chosen[:, None], True)
        return [chosen.tolist()]


def _prefill(
    model: Any,
    rows: list[_Row],
    pad_id: int,
    device: torch.device,
    share_prefixes: bool,
) -> _Batch:
    """Read the prompts: what is shared once, then each ending on a copy of the cache."""
    groups: dict[Any, list[_Row]] = defaultdict(list)
    for row in rows:
        groups[row.prompt.images if share_prefixes and row.prompt.images else id(row)].append(row)
    heads: list[_Row] = []
    owner: dict[int, int] = {}
    for group in groups.values():
        length = _shared_length([row.prompt for row in group])
        for members in [group] if length else [[row] for row in group]:
            for row in members:
                row.length = length if len(members) > 1 else len(row.prompt.ids)
                owner[id(row)] = len(heads)
            heads.append(members[0])
    batch = _read_heads(model, heads, pad_id, device)
    by_ending = defaultdict(list)
    for row in rows:
        by_ending[len(row.prompt.ids) - row.length].append(row)
    if list(by_ending) == [0]:
        return batch
    return _merge([_read_endings(model, batch, members, owner) for members in by_ending.values()])


def _shared_length(prompts: list[Prompt]) -> int:
    """Return how many tokens all prompts begin with, or 0 where it is not worth sharing them."""
    if len(prompts) == 1:
        return len(prompts[0].ids)
    columns = zip(*(prompt.ids for prompt in prompts), strict=False)
    length = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    # Every ending needs a token of its own, and images belong to the head as a whole.
    length = min(length, *(len(prompt.ids) - 1 for prompt in prompts))
    return length if length >= max(prompt.text_start for prompt in prompts) else 0


def _read_heads(model: Any, rows: list[_Row], pad_id: int, device: torch.device) -> _Batch:
    """Read the first ``row.length`` tokens of rows with images, padded to one width."""
    # The decoder's config tells which layers attend and which carry a state.
    cache = DynamicCache(config=model.config.get_text_config())
    pads_behind = _only_attends(cache)
    width = max(row.length for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    positions = torch.zeros((4, len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        start = 0 if pads_behind else width - row.length
        end = start + row.length
        ids[i, start:end] = torch.tensor(row.prompt.ids[: row.length])
        mask[i, start:end] = 1
        positions[0, i, start:] = torch.arange(width - start)
        positions[1:, i, start:end] = row.prompt.positions[:, : row.length]
    pixel_values = [r.prompt.pixel_values for r in rows if r.prompt.pixel_values is not None]
    grids = [row.prompt.image_grid for row in rows if row.prompt.image_grid is not None]
    vision = {}
    if pixel_values:
        vision = {
            "pixel_values": torch.cat(pixel_values).to(device),
            "image_grid_thw": torch.cat(grids).to(device),
        }
    mask = mask.to(device)
    states = _states(
        model,
        cache,
        input_ids=ids.to(device),
        attention_mask=None if pads_behind else mask,
        position_ids=positions.to(device),
        **vision,
    )
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = RoomyLayer
    last = torch.tensor([(row.length if pads_behind else width) - 1 for row in rows])
    logits = model.lm_head(states[torch.arange(len(rows)), last])
    return _Batch(rows, cache, mask, logits.to(device))


def _read_endings(model: Any, heads: _Batch, rows: list[_Row], owner: dict[int, int]) -> _Batch:
    """Read endings of one length, each after a copy of its head."""
    index = torch.tensor([owner[id(row)] for row in rows], device=heads.mask.device)
    batch = _Batch(rows, _select(heads.cache, index), heads.mask[index], heads.logits[index])
    endings = [row.prompt.ids[row.length :] for row in rows]
    if endings[0]:
        batch.logits = _feed(model, batch, endings, last=1)[:, -1]
        for row in rows:
            row.length = len(row.prompt.ids)
    return batch


def _feed(model: Any, batch: _Batch, tokens: list[list[int]], *, last: int = 0) -> Tensor:
    """Feed all rows the same number of tokens after their images; return logits ``[B, C, V]``.

    C is that number, or `last` where only so many of the last tokens are asked for.
    """
    device = batch.mask.device
    ids = torch.tensor(tokens, device=device)
    places = [range(row.length, row.length + ids.shape[1]) for row in batch.rows]
    rotary = [[place + row.offset for place in new] for row, new in zip(batch.rows, places, strict=True)]
    batch.mask = torch.cat([batch.mask, torch.ones_like(ids)], dim=1)
    states = _states(
        model,
        batch.cache,
        input_ids=ids,
        attention_mask=_attention_mask(batch.mask, ids.shape[1], batch.cache, batch.logits.dtype),
        position_ids=torch.tensor([[*map(list, places)], rotary, rotary, rotary], device=device),
    )
    logits: Tensor = model.lm_head(states[:, -last:])
    return logits.to(device)


def _states(model: Any, cache: Cache, **inputs: Any) -> Tensor:
    """Return the hidden states ``[B, C, D]``, from which the head makes the logits that are wanted."""
    body = model.model
    states: Tensor = body(use_cache=True, **{_cache_name(type(body).forward): cache}, **inputs)[0]
    return states


def _only_attends(cache: Cache) -> bool:
    return all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def _attention_mask(mask: Tensor, width: int, cache: Cache, dtype: torch.dtype) -> Tensor:
    """Return what the network takes: `mask` itself, or what is added to the products of attention.

    transformers takes the sum ``[B, 1, C, T]`` ready-made. It would make it anew in each pass as bools,
    and torch floats of them in each layer. A layer with a recurrent state wants `mask` itself.

    Args:
        mask: ``[B, T]``, 1 where a row has a token.
        width: C, how many of the T tokens are new.
        cache: What the network remembers.
        dtype: What the network computes in.
    """
    if mask.all() or not _only_attends(cache):
        return mask
    # Not infinite: a token that fills up a row sees nothing, and must not become NaN.
    lowest = torch.finfo(dtype).min
    hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask == 0, lowest)
    added = hidden[:, None, None].expand(-1, -1, width, -1)
    if width == 1:
        return added
    before = mask.shape[1] - width
    later = torch.ones(width, mask.shape[1], dtype=torch.bool, device=mask.device).triu_(before + 1)
    return added.masked_fill(later, lowest)


def _seen(batch: _Batch) -> tuple[Tensor, Tensor] | None:
    """Return which tokens ``[B, V]`` each prompt has, and the penalties ``[B, 1]``; None without any."""
    penalties = [row.prompt.repetition_penalty for row in batch.rows]
    if all(penalty == 1 for penalty in penalties):
        return None
    seen = torch.zeros_like(batch.logits, dtype=torch.bool)
    for i, row in enumerate(batch.rows):
        seen[i, torch.tensor(row.prompt.ids, device=seen.device)] = True
    return seen, torch.tensor(penalties, device=seen.device)[:, None]


# The cache of transformers: a network takes it as `past_key_values`, and from 5.24 on as `cache`. A
# layer has keys and values, or convolution and recurrent states; the states are tensors in 5.8 and dicts
# of tensors in 5.23.

_STATES = ("conv_states", "recurrent_states")
_ROOM = 256


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values with room behind them: a new token does not copy all that came before it."""

    keys: Tensor
    values: Tensor
    _rooms: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, H, C, D]``; return all of them ``[B, H, T + C, D]``."""
        rooms = self._rooms or (self.keys, self.values)
        self._rooms = (
            _appended(self.keys, key_states, rooms[0]),
            _appended(self.values, value_states, rooms[1]),
        )
        end = self.keys.shape[-2] + key_states.shape[-2]
        self.keys, self.values = (room.narrow(-2, 0, end) for room in self._rooms)
        return self.keys, self.values


def _appended(held: Tensor, new: Tensor, room: Tensor) -> Tensor:
    """Return a tensor that begins with both: `room`, or a larger one where it does not hold them."""
    length, end = held.shape[-2], held.shape[-2] + new.shape[-2]
    # Chosen or joined rows are a tensor of their own, and not the beginning of the room any more.
    begins = held.data_ptr() == room.data_ptr() and len(held) == len(room)
    if not begins or end > room.shape[-2]:
        room = held.new_empty(*held.shape[:-2], end + _ROOM, held.shape[-1])
        room.narrow(-2, 0, length).copy_(held)
    room.narrow(-2, length, end - length).copy_(new)
    return room


@functools.cache
def _cache_name(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _select(cache: Cache, index: Tensor) -> Cache:
    """Return a cache with copies of some rows, in the order of `index`; a row may occur repeatedly."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in selected.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(layer, name, dict(value))
        layer.reorder_cache(index)
    return selected


def _merge(batches: list[_Batch]) -> _Batch:
    """Join batches; keys and values are aligned at their ends, because rows go on from there."""
    width = max(batch.mask.shape[1] for batch in batches)
    missing = [width - batch.mask.shape[1] for batch in batches]
    cache = batches[0].cache
    for i, layer in enumerate(cache.layers):
        others = [batch.cache.layers[i] for batch in batches]
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                parts = [getattr(other, name) for other in others]
                padded = [pad(p, (0, 0, m, 0)) for p, m in zip(parts, missing, strict=True)]
                setattr(layer, name, torch.cat(padded))
        for name in _STATES:
            _set_state(layer, name, [_state(other, name) for other in others])
    mask = torch.cat([pad(batch.mask, (m, 0)) for batch, m in zip(batches, missing, strict=True)])
    rows = [row for batch in batches for row in batch.rows]
    return _Batch(rows, cache, mask, torch.cat([batch.logits for batch in batches]))


def _state(layer: Any, name: str) -> Tensor | None:
    value = getattr(layer, name, None)
    return value[0] if isinstance(value, dict) else value


def _set_state(layer: Any, name: str, parts: list[Tensor | None]) -> None:
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return
    if isinstance(getattr(layer, name), dict):
        getattr(layer, name)[0] = torch.cat(tensors)
    else:
        setattr(layer, name, torch.cat(tensors))


def _recurrent_states(cache: Cache) -> list[Tensor]:
    """Return the states of all layers; the cache overwrites these tensors."""
    states = [_state(layer, name) for layer in cache.layers for name in _STATES]
    return [state for state in states if state is not None]
