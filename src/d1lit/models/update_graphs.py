"""Forward and backward passes of a fixed shape, recorded as two CUDA graphs: for updates of few, short views.

One view of a few hundred tokens through an 8B network is less work than launching its kernels one by one. The recorded
forward leaves its activations where the recorded backward pass finds them, so a second forward must not run before the
backward pass of the first has: it runs plainly instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d1lit.models.transformer import MaskedDiffusionLM

DROPS = "dropout draws anew in every forward"
Replay = Callable[[], object]
Forward = Callable[[], Tensor]
MAX_GRADIENT_BYTES = 4 * 2**30
"""Gradients stand once more where graphs write them: fine for an adapter, too much for all weights of a large model."""


def capture_pair(forward: Forward, backward: Replay, pool: Any) -> tuple[Replay, Replay, Tensor]:
    """Record what both launch; the forward's result stands where every replay writes it.

    Both run once before: compilation and the choice of kernels launch work of their own, which must not be recorded.
    """
    forward()
    backward()
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first, pool=pool, capture_error_mode="thread_local"):
        hidden = forward()
    with torch.cuda.graph(second, pool=pool, capture_error_mode="thread_local"):
        backward()
    return first.replay, second.replay, hidden


def drops(network: nn.Module) -> bool:
    """Whether dropout is at work."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in network.modules())


class _Pass:
    """From a forward to its backward pass, or until nobody can ask for that any more."""


@dataclass(frozen=True)
class Inputs:
    """Where the graphs of one shape read what they are given."""

    ids: Tensor
    attention: Tensor | None
    keep: Tensor | None

    @classmethod
    def like(cls, ids: Tensor, attention: Tensor | None, keep: Tensor | None, width: int | None) -> Inputs:
        """Places for inputs of these shapes, which are loaded; `width` columns of kept positions."""
        padded = None if keep is None or width is None else keep.new_zeros(len(keep), width)
        places = cls(ids.clone(), None if attention is None else attention.clone(), padded)
        places.load(ids, attention, keep)
        return places

    def load(self, ids: Tensor, attention: Tensor | None, keep: Tensor | None) -> None:
        """Inputs to their places; columns of `keep` beyond those given repeat the last."""
        self.ids.copy_(ids)
        if self.attention is not None and attention is not None:
            self.attention.copy_(attention)
        if self.keep is not None and keep is not None:
            self.keep[:, : keep.shape[1]] = keep
            self.keep[:, keep.shape[1] :] = keep[:, -1:]


@dataclass
class _Places:
    """What one shape's graphs read and write."""

    inputs: Inputs
    gradient: Tensor | None = None
    """Of the hidden states."""
    hidden: Tensor | None = None
    forward: Replay = lambda: None
    backward: Replay = lambda: None
    used: tuple[int, ...] = ()
    """Which trained parameters the hidden states depend on."""


@contextmanager
def _aliased(network: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Within the context the network computes with new leaves on the same memory.

    What hangs on the parameters themselves (the streams and hooks of earlier backward passes) stays out of a recording.
    """
    known = {id(parameter): parameter.detach().requires_grad_() for parameter in parameters}
    replaced = []
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in known:
                replaced.append((module, name, parameter))
                module._parameters[name] = known[id(parameter)]  # type: ignore[assignment] - a leaf, if no Parameter
    try:
        yield list(known.values())
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


class _Replayed(torch.autograd.Function):
    """The forward graph now, the backward graph when the gradient arrives."""

    @staticmethod
    def forward(ctx: Any, graphs: UpdateGraphs, places: _Places, width: int | None, *parameters: Tensor) -> Tensor:
        places.forward()
        ctx.graphs, ctx.places, ctx.width, ctx.token = graphs, places, width, _Pass()
        graphs.pending = weakref.ref(ctx.token)
        assert places.hidden is not None
        return places.hidden[:, :width].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        graphs, places, width = ctx.graphs, ctx.places, ctx.width
        if graphs.pending is None or graphs.pending() is not ctx.token:
            raise RuntimeError("backward: the activations of a replayed forward are gone after its first backward pass")
        places.gradient[:, :width] = grad_outputs[0]
        if width is not None:
            places.gradient[:, width:] = 0
        places.backward()
        graphs.pending = None
        # Copies: the next replay writes to the same places, and these may become the parameters' own gradients.
        gradients = torch._foreach_mul([graphs.gradients[i] for i in places.used], 1.0)  # pyright: ignore[reportPrivateImportUsage]
        return None, None, None, *gradients


@dataclass
class UpdateGraphs:
    """Replays differentiated forwards of shapes seen before, with their backward passes.

    Parameters may change in place. After freezing or unfreezing some, or moving them, the graphs must be forgotten;
    moved ones are noticed.
    """

    max_graphs: int
    device_type: str
    record: Callable[[Forward, Replay, Any], tuple[Replay, Replay, Tensor]] = capture_pair
    pending: weakref.ref[_Pass] | None = None
    gradients: list[Tensor] = field(default_factory=list)
    """Of all trained parameters: every backward graph writes here."""
    is_off: bool = False
    _network: int = 0
    _trained: list[Tensor] = field(default_factory=list)
    _addresses: tuple[int, ...] = ()
    _recorded: dict[Hashable, _Places] = field(default_factory=dict)
    _pool: Any = None

    @property
    def num_graphs(self) -> int:
        """Shapes recorded so far."""
        return len(self._recorded)

    def has(self, key: Hashable) -> bool:
        """Whether a shape is recorded."""
        return key in self._recorded

    def forget(self) -> None:
        """Give every graph and its memory back; a backward pass that is due can then not run."""
        self._recorded.clear()
        self.gradients, self._trained, self._addresses = [], [], ()
        self.pending = self._pool = None

    def reason_against(self, network: MaskedDiffusionLM, key: Hashable) -> str | None:
        """Why this forward has to run plainly."""
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # pyright: ignore[reportAttributeAccessIssue]
            return "activations are recomputed or kept elsewhere for the backward pass"
        if self.pending is not None and self.pending() is not None:
            return "the backward pass of the forward before is still to come"
        moved = self._addresses != tuple(parameter.data_ptr() for parameter in self._trained)
        if moved or self._network != id(network):
            self.forget()
        if key in self._recorded:
            return None
        if len(self._recorded) >= self.max_graphs:
            return f"{self.max_graphs} shapes of updates are recorded already"
        if drops(network):
            return DROPS
        size = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
        if not 0 < size <= MAX_GRADIENT_BYTES:
            return f"{size / 2**30:.1f} GiB of gradients would stand twice" if size else "nothing is trained"
        return None

    def record_shape(
        self,
        network: MaskedDiffusionLM,
        key: Hashable,
        ids: Tensor,
        attention: Tensor | None,
        keep: Tensor | None,
        width: int | None,
    ) -> None:
        """Record forward and backward pass of a shape.

        Raises:
            RuntimeError: where that is not possible.
        """
        if not self._trained:
            self._network = id(network)
            self._trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
            self._addresses = tuple(parameter.data_ptr() for parameter in self._trained)
            self.gradients = [torch.zeros_like(parameter) for parameter in self._trained]
            self._pool = torch.cuda.graph_pool_handle() if self.device_type == "cuda" else object()
        places = _Places(Inputs.like(ids, attention, keep, width))
        inputs, kind = places.inputs, ids.device.type
        casts, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        latest: list[tuple[Tensor, list[Tensor]]] = []

        def forward() -> Tensor:
            latest.clear()
            # Autocast keeps casts of trained weights until it ends; a graph has to cast anew.
            autocast = torch.autocast(kind, dtype, casts, cache_enabled=False)
            with torch.enable_grad(), autocast, _aliased(network, self._trained) as aliases:
                hidden = network.hidden(inputs.ids, inputs.attention, None, inputs.keep)
            latest.append((hidden, aliases))
            return hidden.detach()

        def backward() -> None:
            hidden, aliases = latest.pop()
            if places.gradient is None:
                places.gradient = torch.zeros_like(hidden)
            with torch.autocast(kind, enabled=False):
                found = torch.autograd.grad(hidden, aliases, places.gradient, allow_unused=True)
            places.used = tuple(i for i, gradient in enumerate(found) if gradient is not None)
            there = [g for g in found if g is not None]
            torch._foreach_copy_([self.gradients[i] for i in places.used], there)  # pyright: ignore[reportPrivateImportUsage]

        places.forward, places.backward, places.hidden = self.record(forward, backward, self._pool)
        self._recorded[key] = places

    def hidden(self, key: Hashable, ids: Tensor, attention: Tensor | None, keep: Tensor | None) -> Tensor:
        """Of a shape that is recorded."""
        places = self._recorded[key]
        places.inputs.load(ids, attention, keep)
        width = None if keep is None else keep.shape[1]
        result = _Replayed.apply(self, places, width, *(self._trained[i] for i in places.used))
        assert isinstance(result, Tensor)
        return result
