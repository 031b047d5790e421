"""The network as the rest of d1lit sees it: hidden states, head, log-probabilities and the reference policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor, nn

from d1lit.costs import (
    Extent,
    NetworkShape,
    Work,
    adapter_flops,
    body_backward_flops,
    body_flops,
    head_flops,
    logprob_flops,
)
from d1lit.models.cache import KVCache
from d1lit.models.graphs import ForwardGraphs
from d1lit.models.head import chunked_entropy, chunked_logprobs, default_budget, few_logits
from d1lit.models.lora import ADAPTER, base_weight, factors, keep_exact, lora_layers, merged_weight
from d1lit.models.order_head import OrderHead, fresh_order_head
from d1lit.models.quantizing import is_quantized
from d1lit.models.transformer import MaskedDiffusionConfig, MaskedDiffusionLM
from d1lit.types import POSITION

REFERENCE_ADAPTER = "reference"


def bytes_without_gradient(config: MaskedDiffusionConfig, length: int, itemsize: int) -> int:
    """Bytes of activations of one view of `length` tokens at the widest moment of a block that keeps nothing."""
    return length * itemsize * (14 * config.hidden_size + 4 * config.intermediate_size)


class Policy(nn.Module):
    """A masked diffusion network, plain or with a LoRA adapter, behind the `MaskPredictor` protocol."""

    def __init__(
        self,
        model: MaskedDiffusionLM | PeftModel,
        attend_padding: bool = False,
        head_budget: int | None = None,
        graphs: ForwardGraphs | None = None,
    ) -> None:
        """Wrap a network.

        Args:
            model: plain, or adapted by PEFT.
            attend_padding: ignore key masks [R T], as d1 does: its left pads are attended like any token.
            head_budget: bytes that the logits of one chunk of positions may take; None leaves it to the device.
            graphs: replays forwards of a known shape, and the backward passes of those that are differentiated.
        """
        super().__init__()
        self.model = model
        self.attend_padding = attend_padding
        self.head_budget = head_budget
        self.graphs = graphs
        self.reference_model: MaskedDiffusionLM | None = None
        self.reference_order_head: OrderHead | None = None
        """The frozen copy beside a kept adapter; a kept network has its own."""
        self.work = Work()
        """Everything the network has computed so far, backward passes included."""
        self.keeps_dropout = False
        """Rollouts leave the network in training mode (see `keeping_dropout`)."""
        self._in_reference = False
        self._is_merged = False

    # ------------------------------------------------------------------------------------------------- what it is

    @property
    def network(self) -> MaskedDiffusionLM:
        """The transformer itself, LoRA layers included; the frozen copy inside `reference()`."""
        if self._in_reference and self.reference_model is not None:
            return self.reference_model
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        assert isinstance(base, MaskedDiffusionLM)
        return base

    @property
    def is_adapted(self) -> bool:
        """True where a LoRA adapter is trained and the base is frozen."""
        return isinstance(self.model, PeftModel)

    @property
    def mask_token_id(self) -> int:
        """Id of [MASK]."""
        return self.network.config.mask_token_id

    @property
    def eos_token_id(self) -> int:
        """Id that ends a completion."""
        return self.network.config.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """Id that fills prompts on the left."""
        return self.network.config.pad_token_id

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.network.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.network.head_weight.dtype

    # ---------------------------------------------------------------------------------------------- what it says

    def hidden(
        self,
        ids: Int[Tensor, "R Q"],
        attention: Bool[Tensor, "R T"] | Bool[Tensor, "R Q T"] | None = None,
        position_ids: Int[Tensor, "R Q"] | None = None,
        keep: Int[Tensor, "R M"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "R M D"]:
        """Final hidden states that predict the tokens AT the kept positions; see MaskedDiffusionLM.hidden."""
        if self.attend_padding and attention is not None and attention.dim() == 2:
            attention = None
        backward = self._count_forward(ids, keep, cache)
        if self.graphs is None:
            hidden = self.network.hidden(ids, attention, position_ids, keep, cache)
        else:
            variant = (self._is_merged, self._in_reference, self.training)
            hidden = self.graphs.hidden(self.network, variant, ids, attention, position_ids, keep, cache)
        self._count_when_differentiated(hidden, backward)
        return hidden

    def head(self, hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M V"]:
        """Logits, in fp32 (fp64 for a fp64 network)."""
        self.work.flops += head_flops(self.shape, hidden.shape[:-1].numel())
        logits = few_logits(hidden, self.network.head_weight)
        if logits is None:
            logits = self.network.lm_head(hidden.to(self.dtype))
        return logits if logits.dtype == torch.float64 else logits.float()

    def logprobs(
        self,
        hidden: Float[Tensor, "M D"],
        targets: Int[Tensor, "M J"],
        temperature: float = 1.0,
        exclude_mask: bool = False,
    ) -> Float[Tensor, "M J"]:
        """Log-probabilities of J targets at each position, chunked over positions; of all tokens or all but [MASK].

        Where a target is `POSITION`: the order head's score, which no temperature divides.
        """
        excluded, tokens = self.mask_token_id if exclude_mask else None, targets.clamp(min=0)
        values = chunked_logprobs(hidden, self.network.head_weight, tokens, temperature, self._head_bytes, excluded)
        trains_head = self.network.head_weight.requires_grad
        forward, backward = logprob_flops(self.shape, len(hidden), values.requires_grad, trains_head)
        self.work.flops += forward
        self._count_when_differentiated(values, backward)
        # Asked for or not, so that a head that trains has a gradient in every process.
        scores = self.order_scores(hidden)
        positions = values.new_zeros(()) if scores is None else scores.to(values.dtype)[:, None]
        return torch.where(targets == POSITION, positions, values)

    def order_scores(self, hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M"] | None:
        """A score for each position by the order head, the higher the earlier it is fixed; None without a head."""
        kept = self.reference_order_head
        head = kept if self._in_reference and kept is not None else self.network.order_head
        if head is None:
            return None
        scores = head(hidden)
        flops = 2 * scores.numel() * sum(p.numel() for p in head.parameters())
        self.work.flops += flops
        self._count_when_differentiated(scores, 2 * flops)
        return scores

    def entropy(
        self, hidden: Float[Tensor, "M D"], temperature: float = 1.0, exclude_mask: bool = False
    ) -> Float[Tensor, " M"]:
        """Entropy of the prediction at each position, in nats; no gradient."""
        self.work.flops += head_flops(self.shape, len(hidden))
        excluded = self.mask_token_id if exclude_mask else None
        return chunked_entropy(hidden, self.network.head_weight, temperature, self._head_bytes, excluded)

    @property
    def _head_bytes(self) -> int:
        return default_budget(self.device.type) if self.head_budget is None else self.head_budget

    def view_bytes(self, length: int) -> int:
        """Estimated peak bytes of activations for one view of `length` tokens, without gradient.

        Logits are not in it: they have a budget of their own.
        """
        return bytes_without_gradient(self.network.config, length, torch.finfo(self.dtype).bits // 8)

    # ------------------------------------------------------------------------------------------------- what it costs

    @property
    def shape(self) -> NetworkShape:
        """The sizes that cost formulas read."""
        config = self.network.config
        head_width = config.hidden_size // config.num_attention_heads
        return NetworkShape(
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            kv_width=config.num_key_value_heads * head_width,
            num_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
        )

    def _count_forward(self, ids: Tensor, keep: Tensor | None, cache: KVCache | None) -> int:
        """Count a forward, before it runs: a recomputation stops as soon as it can. Gives its backward pass's cost."""
        rows, queries = ids.shape
        keys = queries if cache is None or cache.span is None else cache.canvas["ids"].shape[1]
        extent = Extent(rows, queries, keys, queries if keep is None else keep.shape[1])
        beside = adapter_flops(self._active_adapter_params(), extent)
        self.work.forwards += 1
        self.work.tokens += rows * queries
        self.work.flops += body_flops(self.shape, extent) + beside
        recomputes = bool(self.network.model.layers[0].gradient_checkpointing)
        return body_backward_flops(self.shape, extent, not self.is_adapted, recomputes) + 2 * beside

    def _count_when_differentiated(self, value: Tensor, flops: int) -> None:
        """Add to the count once a gradient arrives; what is only recomputed for a backward pass gets none."""
        if value.requires_grad and flops:
            value.register_hook(lambda _: self._add_flops(flops))

    def _add_flops(self, flops: int) -> None:
        self.work.flops += flops

    def _active_adapter_params(self) -> int:
        """Entries of the low-rank factors that a forward multiplies with."""
        if not isinstance(self.model, PeftModel) or self._is_merged:
            return 0
        if self._in_reference and REFERENCE_ADAPTER not in self.model.peft_config:
            return 0
        return sum(factor.numel() for _, layer in lora_layers(self.model) for factor in factors(layer, ADAPTER))

    # ---------------------------------------------------------------------------------------------- the order head

    def train_order_head(self, trains: bool, seed: int) -> None:
        """Give the network an order head where it is to train and there is none, and let only such a one train.

        A head trains beside an adapter as it does beside the whole network. One that does not stays frozen as it is: a
        stage that never asks for it gives it no gradient, for which processes would wait.

        Args:
            trains: whether the stage asks for the head.
            seed: of a fresh head.
        """
        network = self.network
        if trains and network.order_head is None:
            fresh = fresh_order_head(network.config.hidden_size, network.config.initializer_range, seed)
            network.order_head = fresh.to(self.device, self.dtype).train(self.training)
            network.config.order_head = True
        if network.order_head is not None:
            network.order_head.requires_grad_(trains)

    # ---------------------------------------------------------------------------------------- the reference policy

    @torch.no_grad()
    def keep_reference(self) -> None:
        """Freeze a copy of the policy as it is now, to be the reference until `sync_reference` moves it.

        Without an adapter that is a second network. With one it is a second, frozen adapter on the shared base; call it
        before any wrapping that shards parameters, so that both are sharded alike.
        """
        if not isinstance(self.model, PeftModel):
            self.reference_model = copy.deepcopy(self.model).requires_grad_(False).eval()
            return
        if REFERENCE_ADAPTER not in self.model.peft_config:
            with torch.random.fork_rng(devices=[]):
                self.model.add_adapter(REFERENCE_ADAPTER, self.model.peft_config[ADAPTER])
            keep_exact(self.model, REFERENCE_ADAPTER)
        if self.network.order_head is not None:
            self.reference_order_head = copy.deepcopy(self.network.order_head).requires_grad_(False).eval()
        self._reference_weights_track(1.0)

    def drop_reference(self) -> None:
        """Forget a kept reference."""
        self.reference_model = None
        self.reference_order_head = None
        if isinstance(self.model, PeftModel) and REFERENCE_ADAPTER in self.model.peft_config:
            self.model.delete_adapter(REFERENCE_ADAPTER)

    @torch.no_grad()
    def sync_reference(self, weight: float = 1.0) -> None:
        """Move the kept reference towards the policy: reference = (1 - weight) * reference + weight * policy.

        With an adapter the mixture is of the adapter's factors.

        Raises:
            ValueError: if no reference was kept, because then there is nothing that could move.
        """
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"module.reference_sync_weight: must be in [0, 1], got {weight}. Try: 1 (copy)")
        if not self.has_kept_reference:
            raise ValueError(
                "reference_sync_every: the reference is the base with its adapter off, which cannot move. "
                "Try: keep_reference() first"
            )
        if self.reference_model is not None:
            for kept, current in zip(self.reference_model.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(current.detach(), weight)
            return
        self._reference_weights_track(weight)

    @property
    def has_kept_reference(self) -> bool:
        """True once `keep_reference` was called."""
        in_adapter = isinstance(self.model, PeftModel) and REFERENCE_ADAPTER in self.model.peft_config
        return self.reference_model is not None or in_adapter

    def _reference_weights_track(self, weight: float) -> None:
        for _, layer in lora_layers(self.model):
            for kept, current in zip(factors(layer, REFERENCE_ADAPTER), factors(layer, ADAPTER), strict=True):
                kept.lerp_(current.to(kept.dtype), weight)
                kept.requires_grad_(False)
        if self.reference_order_head is not None and self.network.order_head is not None:
            own = self.network.order_head.parameters()
            for kept, current in zip(self.reference_order_head.parameters(), own, strict=True):
                kept.lerp_(current, weight)

    def reference(self) -> AbstractContextManager[None]:
        """Within the context the network is the reference: the kept one, or else the base with its adapter off.

        Raises:
            ValueError: for a network without an adapter, or with an order head that trains, of which no copy was kept.
        """
        head = self.network.order_head
        trains_head = head is not None and head.outer.weight.requires_grad
        if not self.has_kept_reference and (not isinstance(self.model, PeftModel) or trains_head):
            what = "an order head" if isinstance(self.model, PeftModel) else "a fully trained network"
            raise ValueError(
                f"loss.beta: a penalty towards the reference needs one, and {what} has none "
                "until keep_reference() is called. Try: loss.beta=0, or keep a reference"
            )
        return self._as_reference()

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        assert not self._in_reference and not self._is_merged, "reference() neither nests nor follows a merge"
        self._in_reference = True
        try:
            if not isinstance(self.model, PeftModel):
                yield
            elif REFERENCE_ADAPTER in self.model.peft_config:
                with self._adapters(active=REFERENCE_ADAPTER):
                    yield
            else:
                with self._adapters(active=None):
                    yield
        finally:
            self._in_reference = False

    @contextmanager
    def _adapters(self, active: str | None) -> Iterator[None]:
        """Switch the LoRA layers' adapter without PEFT's side effect on requires_grad, and with dropout off."""
        layers = [layer for _, layer in lora_layers(self.model)]
        before = [(layer._active_adapter, layer._disable_adapters, layer.training) for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = active is None
                layer._active_adapter = active or layer._active_adapter
                layer.lora_dropout.eval()
            yield
        finally:
            for layer, (adapter, disabled, training) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = adapter, disabled
                layer.lora_dropout.train(training)

    @contextmanager
    def keeping_dropout(self) -> Iterator[None]:
        """Within the context rollouts leave dropout on, as d1's do."""
        self.keeps_dropout = True
        try:
            yield
        finally:
            self.keeps_dropout = False

    # ---------------------------------------------------------------------------------------------------- merging

    @property
    def merges_exactly(self) -> bool:
        """True where folding the adapter into the base loses no more than fp32 rounding."""
        kinds = {base_weight(layer).dtype for _, layer in lora_layers(self.model)}
        return kinds <= {torch.float32, torch.float64}

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within the context the adapter is folded into the base weights, which makes rollouts faster.

        The original matrices are kept aside (memory: one copy of the adapted matrices) and put back, so that the
        weights afterwards are the same to the last bit. Weights change in place, so sharded parameters and captured
        graphs see them; under FSDP2 enter and leave while the parameters are sharded. A network without an adapter
        passes through unchanged.
        """
        layers = [layer for _, layer in lora_layers(self.model)]
        if not layers or self._is_merged:
            yield
            return
        assert not self._in_reference, "merged() inside reference()"
        if any(is_quantized(base_weight(layer)) for layer in layers):
            raise ValueError(
                "module.merge_for_rollouts: an adapter does not fit into weights of four bits. "
                "Try: merge_for_rollouts=false, or lora.quantize=null"
            )
        originals = [base_weight(layer).detach().clone() for layer in layers]
        self._is_merged = True
        try:
            with torch.no_grad():
                for layer in layers:
                    base_weight(layer).copy_(merged_weight(layer))
            with self._adapters(active=None):
                yield
        finally:
            with torch.no_grad():
                for layer, original in zip(layers, originals, strict=True):
                    base_weight(layer).copy_(original)
            self._is_merged = False
