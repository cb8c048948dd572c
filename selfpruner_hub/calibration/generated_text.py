"""Generate text with a model: continuations of prompts in batches, and plain text as windows of tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from selfpruner_hub.calibration.served_model import ServedModel
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.devices import free_memory
from selfpruner_hub.models.forward import check_ids, draw, head_chunks
from selfpruner_hub.models.patching import attending_by_group
from selfpruner_hub.progress import Progress

SAMPLE_BATCH = 256
"""Maximum number of sequences in a batch."""
SMALL_CACHE = 1 << 30
"""Bytes that a cache may take however small the model is."""
ENDED = 0.2
"""Share of finished sequences above which they leave the batch; each time, the rest of the cache is copied."""
CACHE_FREE = 0.5
"""Maximum size of a cache, as a share of the free memory of an accelerator."""
CACHE_STEP = 64
"""Number of tokens by which a cache grows at a time."""


TextModel = PreTrainedModel | ServedModel
"""A model that writes text, here or behind a server."""


@torch.inference_mode()
def continuations(
    model: TextModel,
    prompts: Sequence[Sequence[int]],
    most: int,
    *,
    ends: Collection[int] = (),
    banned: Collection[int] = (),
    temperature: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
    what: str = "writing text",
) -> list[list[int]]:
    """Generate a continuation of each prompt; prompts of similar length share a batch, finished sequences leave it.

    The cache grows in place, so a step copies no keys and values.

    Args:
        model: A causal language model; a served one is asked for all continuations at once.
        prompts: Token ids, at least one per prompt.
        most: Maximum number of new tokens per prompt, at least 1.
        ends: Token ids that end a continuation; the continuation includes them.
        banned: Token ids that are never generated.
        temperature: Temperature of sampling without truncation; 0 takes the likeliest token.
        seed: Random seed.
        progress: Callback that receives the number of prompts that are done.
        what: Name of the work, for `progress`.

    Returns:
        New token ids of each prompt, in the order of the prompts.

    Raises:
        ModelError: The model has no embedding of a token of the prompts.
        SelfPrunerError: The server of a model fails (`ServedModel.continuations`).
    """

    def report(done: int) -> None:
        if progress:
            progress(what, done, len(prompts))

    if isinstance(model, ServedModel):
        return cast(ServedModel, model).continuations(
            prompts, most, ends=ends, banned=banned, temperature=temperature, seed=seed, report=report
        )
    check_ids(model, max((max(prompt) for prompt in prompts), default=0))
    generator = torch.Generator(model.device).manual_seed(seed)
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # most memory is needed first
    written: list[list[int]] = [[] for _ in prompts]
    batch = _batch_size(model, max(map(len, prompts), default=0) + most)
    stops, never = (torch.tensor(sorted(ids), dtype=torch.long, device=model.device) for ids in (ends, banned))
    report(0)
    with attending_by_group(model):
        for done in range(0, len(prompts), batch):
            chosen = longest_first[done : done + batch]
            rows = _Rows(model, [prompts[index] for index in chosen])
            live = torch.tensor(chosen)
            for step in range(most):
                logits = rows.logits().index_fill(1, never, -torch.inf)
                new = draw(logits, temperature, generator)
                for index, token in zip(live.tolist(), new.tolist(), strict=True):
                    if not (written[index] and written[index][-1] in ends):
                        written[index].append(token)
                ended = rows.end(torch.isin(new, stops))
                if ended.all() or step == most - 1:
                    break
                left = (~ended).nonzero()[:, 0] if ended.float().mean() > ENDED else None
                if left is not None:
                    live, new = live[left.cpu()], new[left]
                rows.step(new, left)
            report(done + len(chosen))
    return written


@torch.inference_mode()
def sample_windows(
    model: TextModel,
    count: int,
    window: int,
    seed: int,
    progress: Progress | None = None,
    start: Sequence[int] = (),
) -> Tensor:
    """Generate `count` windows of `window` tokens, each from the model's start token (or a random token).

    Sampling is ancestral (temperature 1, no truncation), so the text is drawn from the model's own distribution. End
    tokens are banned, so that every window is full.

    Args:
        model: The dense model.
        count: Number of windows, at least 1.
        window: Tokens per window, at least 1; more than `start` has.
        seed: Random seed.
        progress: Callback that receives the number of windows that are done.
        start: Token ids that every window begins with (`text_sources.start_ids`), in place of the model's start token,
            which is no part of its window.

    Returns:
        Token ids, `[count, window]`.
    """
    config = model.config
    special: set[int] = set()
    ends = config.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for ids in (*ends, config.pad_token_id, config.bos_token_id):  # one id, several, or None
        special.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(config.vocab_size, (count, 1), generator=generator).tolist()
    prompts = first if config.bos_token_id is None else [[config.bos_token_id]] * count
    written = continuations(
        model,
        [list(start)] * count if start else prompts,
        window - len(start),
        banned=special,
        seed=seed,
        progress=progress,
        what="sampling text",
    )
    return torch.tensor([[*start, *ids] for ids in written])


class _Rows:
    """The sequences of one batch: left-padded, with a cache that grows in place.

    Args:
        model: The model that continues the sequences.
        prompts: Token ids.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
        lengths = torch.tensor([len(p) for p in prompts], device=model.device)
        self._mask = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()
        self._ended = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
        self._cache = DynamicCache(config=model.config)
        layers = self._cache.layers
        layers[:] = [_GrowingLayer() if type(each) is DynamicLayer else each for each in layers]  # type: ignore[no-untyped-call]
        self._run(ids, (self._mask.cumsum(1) - 1).clamp_min(0))

    def _run(self, ids: Tensor, positions: Tensor) -> None:
        out = self._model.get_decoder()(
            ids, attention_mask=self._mask, position_ids=positions, cache=self._cache, use_cache=True
        )
        self._hidden = out.last_hidden_state[:, -1:]

    def logits(self) -> Tensor:
        """Logits of the next token, `[N, V]`, float32, on the device of the model: a device map may move the head."""
        return torch.cat([logits for _, logits in head_chunks(self._model, self._hidden[:, 0])]).to(self._model.device)

    def end(self, now: Tensor) -> Tensor:
        """Mark the rows that end now; return all that have ended, `[N]`, bool."""
        self._ended |= now
        return self._ended

    def step(self, new: Tensor, left: Tensor | None) -> None:
        """Append a token to each row; `left` holds the indices of the rows to keep, None keeps all."""
        if left is not None:
            for layer in cast(list[DynamicLayer], self._cache.layers):  # a device map may spread them
                if layer.keys is not None:  # that of a block that was taken out stays empty
                    layer.batch_select_indices(left.to(layer.keys.device))
            self._mask, self._ended = self._mask[left], self._ended[left]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(new), 1)], 1)
        self._run(new[:, None], self._mask.sum(1, keepdim=True) - 1)


class _GrowingLayer(DynamicLayer):
    """Keys and values in buffers with spare capacity: a step writes the new ones and does not copy the old ones."""

    _buffers: tuple[Tensor, ...] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, `[B, G, S, D]`, and return views of all keys and of all values."""
        before, new = self.get_seq_length(), (key_states, value_states)
        length = before + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._buffers is None or self._buffers[0].shape[-2] < length:
            self._buffers = tuple(x.new_empty(*x.shape[:-2], length + CACHE_STEP, x.shape[-1]) for x in new)
            if before and self.keys is not None and self.values is not None:
                for buffer, old in zip(self._buffers, (self.keys, self.values), strict=True):
                    buffer[..., :before, :] = old
        for buffer, x in zip(self._buffers, new, strict=True):
            buffer[..., before:length, :] = x
        keys, values = (buffer[..., :length, :] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)
        self._buffers = None


def _batch_size(model: PreTrainedModel, length: int) -> int:
    """Maximum number of sequences: the cache takes at most the weights or `SMALL_CACHE`, and half the free memory."""
    shape = shape_of(model.config)
    groups = sum(layer.num_key_value_heads for layer in shape.dense.layers)
    cached = 2 * groups * shape.head_dim * length * model.dtype.itemsize  # keys and values of one sequence, in bytes
    size = max(model.num_parameters() * model.dtype.itemsize, SMALL_CACHE)
    return max(1, min(SAMPLE_BATCH, int(min(size, CACHE_FREE * free_memory(model.device)) // cached)))
