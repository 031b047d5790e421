"""Forwards of a fixed shape, recorded once as CUDA graphs and replayed: for rollouts, scoring and updates.

A step of one row under a dual cache is some hundred kernels of a few microseconds, and launching them one by one takes
longer than running them. A graph is launched at once. It reads and writes fixed addresses: ids, keys that exist and
kept positions are copied into them, and the cache that a recorded forward fills is the graph's own storage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from d1lit.models.cache import KVCache
from d1lit.models.transformer import MaskedDiffusionLM
from d1lit.models.update_graphs import DROPS, Forward, Inputs, UpdateGraphs, capture_pair, drops

_log = logging.getLogger(__name__)

Replay = Callable[[], object]
Run = Callable[[], Sequence[Tensor]]


def capture(run: Run, pool: Any) -> tuple[Replay, Sequence[Tensor]]:
    """Record what `run` launches; its results stand where every replay writes them.

    It runs once before: compilation and the choice of kernels launch work of their own, which must not be recorded.
    """
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = run()
    return graph.replay, results


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass
class _Recording:
    """One shape's graph with the places it reads from and writes to."""

    replay: Replay
    inputs: Inputs
    hidden: Tensor
    storage: KVCache | None
    """What a forward that fills a cache fills."""
    pool: Any
    holder: dict[int, Tensor] | None = None
    """Keys of the cache that was handed this storage last: the only one whose contents are still its own."""


@dataclass
class ForwardGraphs:
    """Replays forwards whose shape was seen before; everything else runs as it would without it.

    The first forward of a shape runs plainly (and warms up libraries and compilers), the second is recorded. A filled
    cache is valid until the next cache of its shape is filled; reading an older one is an error. Outside inference mode
    there are no caches; what is differentiated is replayed with its backward pass (update_graphs.py).
    """

    max_graphs: int = 256
    """Shapes recorded; any more run plainly."""
    keep_multiple: int = 32
    """Kept positions are filled up to a multiple: a block's steps, which keep fewer and fewer, share a graph."""
    device_type: str = "cuda"
    record: Callable[[Run, Any], tuple[Replay, Sequence[Tensor]]] = capture
    record_pair: Callable[[Forward, Replay, Any], tuple[Replay, Replay, Tensor]] = capture_pair
    updates: UpdateGraphs = field(init=False)
    _recorded: dict[Hashable, _Recording] = field(default_factory=dict)
    _seen: set[Hashable] = field(default_factory=set)
    _storages: dict[int, _Recording] = field(default_factory=dict)
    """By the address of their first layer's keys."""
    _addresses: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _notes: set[str] = field(default_factory=set)
    _is_off: bool = False

    def __post_init__(self) -> None:
        self.updates = UpdateGraphs(self.max_graphs, self.device_type, self.record_pair)

    @property
    def num_graphs(self) -> int:
        """Shapes recorded so far."""
        return len(self._recorded) + self.updates.num_graphs

    def forget(self) -> None:
        """Give every graph and its memory back."""
        self.updates.forget()
        self._recorded.clear()
        self._seen.clear()
        self._storages.clear()

    def hidden(
        self,
        network: MaskedDiffusionLM,
        variant: Hashable,
        ids: Tensor,
        attention: Tensor | None,
        position_ids: Tensor | None,
        keep: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """As `network.hidden`; `variant` tells apart what else decides which kernels run (adapter merged, off)."""

        def plainly() -> Tensor:
            return network.hidden(ids, attention, position_ids, keep, cache)

        caches_outside = cache is not None and not torch.is_inference_mode_enabled()
        if position_ids is not None or caches_outside or not self._may_record(network, ids.device.type):
            return plainly()
        self._forget_if_moved(network)
        source = self._source(cache)
        if cache is not None and cache.span is not None and source is None:
            return plainly()  # its cache was filled without a graph
        width = None if keep is None else min(ids.shape[1], _rounded_up(keep.shape[1], self.keep_multiple))
        seen = None if attention is None else tuple(attention.shape)
        role = None if cache is None else (cache.span, None if source is None else id(source))
        cast = torch.get_autocast_dtype(ids.device.type) if torch.is_autocast_enabled(ids.device.type) else None
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())  # inference tensors stay among themselves
        key = (id(network), variant, cast, mode, tuple(ids.shape), seen, width, role)
        if torch.is_grad_enabled():
            if self._may_differentiate(network, key, ids, attention, keep, width):
                return self.updates.hidden(key, ids, attention, keep)
            return plainly()
        if key not in self._recorded:
            if key not in self._seen:
                self._seen.add(key)
                return plainly()
            recording = self._recording(network, ids, attention, keep, width, cache, source)
            if recording is None:
                return plainly()
            self._recorded[key] = recording
        return self._replayed(self._recorded[key], ids, attention, keep, cache)

    def _may_record(self, network: MaskedDiffusionLM, device_type: str) -> bool:
        if self._is_off:
            return False
        first = network.model.layers[0]
        if device_type != self.device_type:
            self._note(f"the network is on {device_type}")
        elif isinstance(first.input_layernorm.weight, DTensor):  # type: ignore[union-attr]
            self._note("parameters are sharded")
        elif first.training and first.gradient_checkpointing:
            self._note("blocks are recomputed (model.gradient_checkpointing)")
        else:
            return True
        return False

    def _may_differentiate(
        self,
        network: MaskedDiffusionLM,
        key: Hashable,
        ids: Tensor,
        attention: Tensor | None,
        keep: Tensor | None,
        width: int | None,
    ) -> bool:
        """Whether forward and backward pass of this shape are recorded, which they are at its second forward."""
        if self.updates.is_off:
            return False
        reason = self.updates.reason_against(network, key)
        if reason is not None:
            self._note(reason)
            return False
        if key not in self._seen:
            self._seen.add(key)
            return False
        if not self.updates.has(key):
            try:
                self.updates.record_shape(network, key, ids, attention, keep, width)
            except RuntimeError as error:
                self.updates.forget()
                self.updates.is_off = True
                self._note(f"recording an update failed ({str(error).strip().splitlines()[0]})")
                return False
        return True

    def _note(self, reason: str) -> None:
        """Say once why forwards are not replayed."""
        if reason not in self._notes:
            self._notes.add(reason)
            _log.warning("model.cuda_graphs: %s; forwards are launched one kernel at a time", reason)

    def _forget_if_moved(self, network: MaskedDiffusionLM) -> None:
        """Graphs hold addresses: weights may change in place, but not move."""
        weights = [block.input_layernorm.weight for block in network.model.layers]  # type: ignore[union-attr]
        addresses = (network.head_weight.data_ptr(), *(weight.data_ptr() for weight in weights))  # type: ignore[operator]
        if addresses != self._addresses.get(id(network), addresses):
            self.forget()
        self._addresses[id(network)] = addresses

    def _source(self, cache: KVCache | None) -> _Recording | None:
        """The recording in whose storage a span's cache lives."""
        if cache is None or cache.span is None:
            return None
        source = self._storages.get(cache.keys[0].data_ptr())
        if source is not None and source.holder is not cache.keys:
            raise RuntimeError(
                "cache: a later one of the same shape was filled, which overwrote it. Use one at a time."
            )
        return source

    def _recording(
        self,
        network: MaskedDiffusionLM,
        ids: Tensor,
        attention: Tensor | None,
        keep: Tensor | None,
        width: int | None,
        cache: KVCache | None,
        source: _Recording | None,
    ) -> _Recording | None:
        """Record a shape; None where that is not possible."""
        if drops(network):
            self._note(DROPS)
            return None
        if len(self._recorded) >= self.max_graphs:
            self._note(
                f"{self.max_graphs} shapes are recorded already (pad prompts to a multiple: data.length_multiple)"
            )
            return None
        inputs = Inputs.like(ids, attention, keep, width)
        places = _Recording(
            replay=lambda: None,
            inputs=inputs,
            hidden=ids,
            storage=None,
            pool=self._pool(cache, source),
        )
        held = None
        if cache is not None:
            held = KVCache() if source is None or source.storage is None else source.storage.at(*(cache.span or (0, 0)))

        def run() -> list[Tensor]:
            # Autocast keeps casts of trained weights until it ends; a graph has to cast anew.
            device_type = ids.device.type
            cast = torch.is_autocast_enabled(device_type)
            with torch.autocast(device_type, enabled=cast, cache_enabled=False):
                hidden = network.hidden(inputs.ids, inputs.attention, None, inputs.keep, held)
            if held is None or source is not None:
                return [hidden]
            stored = [*held.keys.values(), *held.values.values(), *held.canvas.values()]
            return [hidden, *stored]

        try:
            places.replay, results = self.record(run, places.pool)
        except RuntimeError as error:
            self._is_off = True
            self._note(f"recording failed ({str(error).strip().splitlines()[0]})")
            return None
        places.hidden = results[0]
        if held is not None and source is None:
            places.storage = KVCache(None, dict(held.keys), dict(held.values), dict(held.canvas))
            self._storages[held.keys[0].data_ptr()] = places
        return places

    def _pool(self, cache: KVCache | None, source: _Recording | None) -> Any:
        """Graphs without a cache share memory for what they hold in passing; a cache and its spans have their own.

        A graph's scratch may lie where a graph recorded earlier in the same pool has its scratch. That must never be
        where a cache lives that is still read.
        """
        if source is not None:
            return source.pool
        if cache is None:
            shared = next((r.pool for r in self._recorded.values() if r.storage is None and r.pool is not None), None)
            in_caches = {id(r.pool) for r in self._storages.values()}
            if shared is not None and id(shared) not in in_caches:
                return shared
        return torch.cuda.graph_pool_handle() if self.device_type == "cuda" else object()

    def _replayed(
        self,
        recording: _Recording,
        ids: Tensor,
        attention: Tensor | None,
        keep: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        recording.inputs.load(ids, attention, keep)
        recording.replay()
        if cache is not None and recording.storage is not None:
            recording.holder = cache.keys
            cache.keys.update(recording.storage.keys)
            cache.values.update(recording.storage.values)
            cache.canvas.update(recording.storage.canvas)
        # A copy: the next replay writes to the same place.
        return recording.hidden.clone() if keep is None else recording.hidden[:, : keep.shape[1]].clone()
