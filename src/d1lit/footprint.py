"""What one stage needs on one device, by formula: bytes, counted as the network's code makes them, and operations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from d1lit.costs import (
    NetworkShape,
    RolloutPlan,
    body_backward_flops,
    body_flops,
    full,
    logprob_flops,
    rollout_flops,
    scoring_flops,
)
from d1lit.models import LoraSettings, MaskedDiffusionConfig
from d1lit.models.head import GPU_TAIL_BYTES, default_budget, tile_shape
from d1lit.models.lora import adapt, lora_layers
from d1lit.models.presets import build_on_meta
from d1lit.models.quantizing import BITS_PER_WEIGHT


@dataclass(frozen=True)
class Counts:
    """Parameters by what becomes of them."""

    total: int
    trainable: int
    adapter: int
    adapted: int
    """Entries of the matrices under an adapter."""
    block: int
    """Of one block, adapter included."""
    head: int
    matrices: int
    """Trainable entries of the blocks' matrices, which some optimizers treat apart."""
    adapted_names: tuple[str, ...]
    order_head: int
    base_matrices: int
    """Entries of all matrices of the blocks, adapters apart: what quantisation packs."""


_COUNTED: dict[tuple[str, str], Counts] = {}
"""What was counted already: building the tree takes a second, and an estimate asks for it again and again."""


def count_parameters(config: MaskedDiffusionConfig, lora: LoraSettings | None) -> Counts:
    """Counted on the module tree itself, built without memory."""
    key = (config.to_json_string(), repr(lora))
    if key not in _COUNTED:
        _COUNTED[key] = _count(config, lora)
    return _COUNTED[key]


def _count(config: MaskedDiffusionConfig, lora: LoraSettings | None) -> Counts:
    network = build_on_meta(config)
    body = sum(p.numel() for p in network.parameters())
    adapter, adapted, names = 0, 0, ()
    packed = sum(p.numel() for layer in network.model.layers for p in layer.parameters() if p.dim() == 2)
    if lora is not None:
        layers = list(lora_layers(adapt(network, replace(lora, quantize=None), seed=0)))
        adapted = sum(layer.get_base_layer().weight.numel() for _, layer in layers)  # type: ignore[operator]
        adapter = sum(lora.rank * (sum(layer.get_base_layer().weight.shape)) for _, layer in layers)  # type: ignore[arg-type]
        names = tuple(sorted({path.rsplit(".", 1)[-1] for path, _ in layers}))
    block = sum(p.numel() for p in network.model.layers[0].parameters())
    matrices = sum(p.numel() for layer in network.model.layers for p in layer.parameters() if p.dim() == 2)
    head = config.vocab_size * config.hidden_size
    order_head = 0 if network.order_head is None else sum(p.numel() for p in network.order_head.parameters())
    trainable = body if lora is None else adapter + order_head
    return Counts(body + adapter, trainable, adapter, adapted, block, head, matrices, names, order_head, packed)


# --------------------------------------------------------------------------------------------------------- the workload


@dataclass(frozen=True)
class Workload:
    """One stage on one device, as numbers."""

    config: MaskedDiffusionConfig
    counts: Counts
    itemsize: int
    optimizer_slots: float
    """Numbers of state for each trainable parameter."""
    world_size: int
    is_sharded: bool
    is_offloaded: bool
    """Shards stand in host memory, beside a GPU."""
    recomputes_blocks: bool
    num_micro: int
    views: int
    """Views of one micro-batch that go through the network for an update."""
    length: int
    scored: int
    """Positions of a view that the head looks at."""
    views_per_chunk: int | None
    keeps_reference: bool
    rollout: RolloutPlan | None = None
    """One rank's rows of a rollout, all that fit one forward."""
    rollout_rows: int = 0
    """All of one rank's rows of a rollout."""
    passes: int = 0
    """Passes without gradient over each micro-batch of a rollout: old and reference log-probs."""
    merges: bool = False
    is_quantized: bool = False
    corruptions_at_once: int = 1
    """Inner updates whose views share a forward without gradient."""
    caches: bool = False
    """Rollouts keep keys and values of the canvas."""
    on_gpu: bool = False
    validation: RolloutPlan | None = None
    """Rows of one look at the validation rows that one forward holds."""

    @property
    def wide(self) -> int:
        """Bytes of a number where the network insists on float32."""
        return max(4, self.itemsize)

    @property
    def casts(self) -> int:
        """Bytes of half-precision copies of an adapter in float32, which its products keep for their backward pass."""
        return self.counts.adapter * self.itemsize if self.counts.adapter and self.itemsize < self.wide else 0

    @property
    def reference_bytes(self) -> int:
        """A kept reference: the whole network, or beside an adapter another adapter and another order head."""
        counts = self.counts
        if not self.keeps_reference:
            return 0
        if counts.adapter == 0:
            return counts.total * self.itemsize
        return counts.adapter * self.wide + counts.order_head * self.itemsize

    @property
    def tokens(self) -> int:
        """Token positions whose activations exist at a time."""
        return min(self.views, self.views_per_chunk or self.views) * self.length


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    update: int
    """Activations and scratch at the widest moment of forward and backward."""
    update_end: int
    """The same where the backward pass ends, beside all gradients."""
    rollout: int
    """The same in a rollout or a look at the validation rows, parameters gathered where they are sharded."""
    scoring: int
    gradients_first: bool
    """Gradients of an earlier micro-batch stand beside the activations."""
    scratch: int
    """The optimizer's, at its step."""
    start: int
    """Before the stage, where the base is loaded whole to be quantised or sharded; where sharded, after it too."""
    host: int
    """In host memory, where shards are offloaded."""

    @property
    def fixed(self) -> int:
        """There all the time."""
        return self.weights + self.optimizer + self.reference

    @property
    def peak(self) -> int:
        """At the widest moment of the stage."""
        beside = self.gradients if self.gradients_first else 0
        update = max(self.update + beside, self.gradients + max(self.scratch, self.update_end))
        return max(self.start, self.fixed + max(update, self.rollout, self.scoring))


def memory(work: Workload) -> MemoryNeed:
    """Memory of one device."""
    counts, item = work.counts, work.itemsize
    share = work.world_size if work.is_sharded else 1
    base = counts.total - counts.adapter
    packed = int(counts.base_matrices * (item - BITS_PER_WEIGHT / 8)) if work.is_quantized else 0
    weights = (base * item - packed + counts.adapter * work.wide) // share
    # Adapters are in float32 beside a half-precision base; a base that trains has float32 copies in its optimizer.
    own = work.wide if counts.adapter else item
    copies = counts.trainable * work.wide if own < work.wide else 0
    gathered = 0
    if work.is_sharded:  # the block at work, the one fetched ahead, and what belongs to no block
        blocks = counts.block * work.config.num_hidden_layers
        gathered = (2 * counts.block + counts.total - blocks) * item
    largest = max(counts.head, counts.block // 3)
    gradients = counts.trainable * own // share
    optimizer = (int(counts.trainable * work.optimizer_slots * work.wide) + copies) // share
    reference = work.reference_bytes // share
    on_device = 0 if work.is_offloaded else 1
    looks = [_rollout_bytes(work, plan) for plan in (work.rollout, work.validation) if plan is not None]
    return MemoryNeed(
        weights=weights * on_device,
        gradients=gradients * on_device,
        optimizer=optimizer * on_device,
        reference=reference * on_device,
        update=_update_bytes(work) + gathered,
        update_end=work.tokens * (kept_by_block(work) + block_scratch(work, with_gradient=True)) + gathered,
        rollout=max(looks) + (counts.total * item if work.is_sharded else 0) if looks else 0,
        scoring=_scoring_bytes(work) + gathered if work.passes else 0,
        gradients_first=work.num_micro > 1,
        scratch=(2 * min(largest, counts.trainable) * work.wide + copies) // share,
        start=_whole_bytes(work, (weights + reference) * on_device),
        host=0 if on_device else weights + gradients + optimizer + reference,
    )


def _whole_bytes(work: Workload, shards: int) -> int:
    """The whole model, beside its copy of reference before it is cut, and beside its shards at the end of the stage."""
    base = (work.counts.total - work.counts.adapter) * work.itemsize
    if not work.is_sharded:
        return base if work.is_quantized else 0
    model = base + work.counts.adapter * work.wide
    return model + max(work.reference_bytes, shards)


def kept_by_block(work: Workload) -> int:
    """Bytes that a block keeps of each token for its backward pass (models/transformer.py, line by line)."""
    width, mlp = work.config.hidden_size, work.config.intermediate_size
    names = work.counts.adapted_names
    both_norms = 2 * width * work.wide
    attention = 4 * width  # queries, keys, values and what came of them
    if not names:  # every weight trains: both norms' results, both inputs of products, four tensors of the MLP
        return both_norms + (attention + 4 * width + 4 * mlp) * work.itemsize
    inputs = width * (bool({"q_proj", "k_proj", "v_proj"} & {*names}) + bool({"gate_proj", "up_proj"} & {*names}))
    inner = 3 * mlp + mlp * ("down_proj" in names)
    ranks = work.counts.adapter // max(1, work.counts.adapted) if work.counts.adapted else 0
    return both_norms + (attention + inputs + inner + ranks) * work.itemsize


def block_scratch(work: Workload, with_gradient: bool) -> int:
    """Bytes of each token at the widest moment inside one block, beside what is kept."""
    width, mlp = work.config.hidden_size, work.config.intermediate_size
    if with_gradient:  # gradients of the four tensors of the MLP and of the residual stream
        return (4 * mlp + 2 * width) * work.itemsize
    attention = 5 * width * work.itemsize + 4 * width * work.wide
    adapted = mlp * work.itemsize if {"gate_proj", "up_proj"} & {*work.counts.adapted_names} else 0
    return max(attention, (2 * width + 3 * mlp) * work.itemsize + width * work.wide + adapted)


def _head_scratch(work: Workload, positions: int) -> int:
    """Bytes of logits: a tile is formed while the one before still stands, unless the first holds the vocabulary."""
    vocabulary, budget = work.config.vocab_size, default_budget("cuda" if work.on_gpu else "cpu")
    rows, columns = tile_shape(positions, vocabulary, budget, work.wide)
    return rows * min(2 * columns, vocabulary) * work.wide


def _update_bytes(work: Workload) -> int:
    config, tokens = work.config, work.tokens
    layers = config.num_hidden_layers
    chunked = work.views_per_chunk is not None and work.views_per_chunk < work.views
    scratch = tokens * block_scratch(work, with_gradient=True)
    if work.recomputes_blocks:
        kept = tokens * layers * config.hidden_size * work.itemsize
        moment = tokens * kept_by_block(work) + scratch
    else:
        kept = tokens * layers * kept_by_block(work) + work.casts
        moment = scratch
    positions = work.views * work.scored
    finals = positions * config.hidden_size * (work.itemsize + work.wide)  # hidden states and E_p[W] or its like
    head = _head_scratch(work, positions)
    if work.counts.adapter == 0:
        # The head's gradient, summed up in full precision, stays while the blocks' are computed.
        head += 2 * work.counts.head * work.wide
        moment += 0 if chunked else max(0, head - scratch)
    return finals + max(kept + moment, head if chunked else kept + head)


def _rollout_bytes(work: Workload, plan: RolloutPlan) -> int:
    config = work.config
    body = plan.rows * plan.length * block_scratch(work, with_gradient=False)
    logits = plan.rows * plan.most_predicted * config.vocab_size * work.wide
    # Beside them two softmaxes and the tempered logits: on a GPU of many rows at a time, on a CPU of few. In a tree
    # the rows have theirs copied from those of their canvas.
    beside = 3 * min(logits, GPU_TAIL_BYTES) if work.on_gpu else 2 * logits
    logits += beside if plan.rows_at_a_canvas is None else max(beside, logits)
    head_width = config.hidden_size // config.num_attention_heads
    cached = 2 * plan.rows * plan.length * config.num_key_value_heads * head_width * config.num_hidden_layers
    cache = cached * work.itemsize if work.caches else 0
    merged = work.counts.adapted * (work.itemsize + 2 * work.wide // config.num_hidden_layers) if work.merges else 0
    return max(body, logits) + merged + cache


def _scoring_bytes(work: Workload) -> int:
    joined = work.views * work.corruptions_at_once
    views = min(joined, work.views_per_chunk or joined)
    scratch = views * work.length * block_scratch(work, with_gradient=False)
    return max(scratch, _head_scratch(work, views * work.scored))


# ----------------------------------------------------------------------------------------------------------- operations


def network_shape(config: MaskedDiffusionConfig) -> NetworkShape:
    """The sizes that cost formulas read."""
    head_width = config.hidden_size // config.num_attention_heads
    kv_width = config.num_key_value_heads * head_width
    return NetworkShape(
        config.hidden_size, config.intermediate_size, kv_width, config.num_hidden_layers, config.vocab_size
    )


def update_flops(work: Workload) -> int:
    """One rank's operations of one optimizer step."""
    shape, extent = network_shape(work.config), replace(full(work.views, work.length), kept=work.scored)
    trains_weights = work.counts.adapter == 0
    forward, backward = logprob_flops(shape, work.views * work.scored, True, trains_weights)
    body = body_flops(shape, extent)
    again = body if work.views_per_chunk is not None and work.views_per_chunk < work.views else 0
    body_back = body_backward_flops(shape, extent, trains_weights, work.recomputes_blocks)
    adapters = 3 * 2 * work.counts.adapter * work.views * work.length
    return work.num_micro * (body + again + body_back + forward + backward + adapters)


def cycle_flops(work: Workload) -> int:
    """One rank's operations of one rollout and the passes that follow it; no row is assumed to end early."""
    if work.rollout is None:
        return 0
    shape = network_shape(work.config)
    rollout = rollout_flops(shape, replace(work.rollout, rows=work.rollout_rows))
    completion = work.rollout.completion_length
    once = scoring_flops(shape, work.views, work.length - completion, completion)
    return rollout + work.passes * work.num_micro * once
