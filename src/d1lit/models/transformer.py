"""One native bidirectional transformer for LLaDA, Dream and the tiny built-in model.

Pre-norm blocks with RMSNorm in fp32 (Zhang and Sennrich, 2019), SwiGLU (Shazeer, 2020) and rotary positions
(Su et al., 2021), every token attending to every token. The families differ in four switches of the configuration:
bias of q, k, v; grouped keys and values; the precision of the rotary embedding; and Dream's shift. Equal to the
official code of LLaDA (ML-GSAI/LLaDA) and Dream (DreamLM/Dream), which tests/golden checks.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from d1lit.models.cache import KVCache
from d1lit.models.kernels import PLAIN, Kernels
from d1lit.models.order_head import OrderHead


@no_type_check  # transformers makes it a dataclass that takes further keywords, which jaxtyping's checker refuses
class MaskedDiffusionConfig(PreTrainedConfig):
    """Shape and family switches of a masked diffusion language model."""

    model_type = "d1lit"

    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    rope_theta: float = 0.0
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    rope_in_fp32: bool = True
    """True: rotary embedding in fp32 (LLaDA); False: in the dtype of the activations (Dream)."""
    shift: bool = False
    """True: the output row i - 1 predicts the token at i, and row 0 the token at 0 as well (Dream)."""
    family: str = "llada"
    """Whose names and config.json an export uses: "llada" or "dream"."""
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    mask_token_id: int = 0
    eos_token_id: int = 0
    pad_token_id: int = 0
    bos_token_id: int | None = None
    order_head: bool = False
    """True: a second head scores the positions, for an order that is learnt."""
    official_config: dict[str, Any] | None = None
    """The config.json this model was loaded from, for exports that the official code reads."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in fp32 whatever the dtype of the activations."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.kernels = PLAIN

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """x / rms(x) * weight."""
        return self.kernels.norm(x, self.weight, self.eps)


def rotary_table(
    position_ids: Int[Tensor, "*R T"], width: int, theta: float
) -> tuple[Float[Tensor, "*R T E"], Float[Tensor, "*R T E"]]:
    """Cosine and sine of the rotary angles, the half-split layout, in fp32."""
    exponent = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32) / width
    angles = position_ids[..., None].float() * (1.0 / theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def take_rows(x: Shaped[Tensor, "R T *S"], rows: Int[Tensor, "R M"] | None) -> Shaped[Tensor, "R M *S"]:
    """Rows of each view; all of them where `rows` is None."""
    if rows is None:
        return x
    return x[torch.arange(len(x), device=x.device)[:, None], rows]


class Attention(nn.Module):
    """Bidirectional attention with optional grouped keys and values."""

    def __init__(self, config: MaskedDiffusionConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_width = config.hidden_size // config.num_attention_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.rope_in_fp32 = config.rope_in_fp32
        self.kernels = PLAIN
        kv_width = config.num_key_value_heads * self.head_width
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def _heads(self, x: Float[Tensor, "R Q X"]) -> Float[Tensor, "R H Q E"]:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "R Q D"],
        cos: Float[Tensor, "R1 1 Q E"],
        sin: Float[Tensor, "R1 1 Q E"],
        mask: Bool[Tensor, "R 1 M1 T"] | None,
        rows: Int[Tensor, "R M"] | None,
        cache: KVCache | None,
    ) -> Float[Tensor, "R M D"]:
        """Keys and values of all Q given positions; queries, and so outputs, of `rows` alone where they are given."""
        keys = self.kernels.rotate(self._heads(self.k_proj(x)), cos, sin, self.rope_in_fp32)
        values = self._heads(self.v_proj(x))
        if rows is not None:
            count = len(x)
            cos = take_rows(cos[:, 0].expand(count, -1, -1), rows)[:, None]
            sin = take_rows(sin[:, 0].expand(count, -1, -1), rows)[:, None]
        queries = self.kernels.rotate(self._heads(self.q_proj(take_rows(x, rows))), cos, sin, self.rope_in_fp32)
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)
        if self.groups > 1:
            keys = keys.repeat_interleave(self.groups, dim=1)
            values = values.repeat_interleave(self.groups, dim=1)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.kernels = PLAIN

    def forward(self, x: Float[Tensor, "R Q D"]) -> Float[Tensor, "R Q D"]:
        """down(silu(gate(x)) * up(x))."""
        return self.down_proj(self.kernels.gate(self.gate_proj(x), self.up_proj(x)))


class Block(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: MaskedDiffusionConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "R Q D"],
        cos: Float[Tensor, "R1 1 Q E"],
        sin: Float[Tensor, "R1 1 Q E"],
        mask: Bool[Tensor, "R 1 M1 T"] | None = None,
        rows: Int[Tensor, "R M"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "R M D"]:
        """The block at `rows`, or at all positions."""
        x = take_rows(x, rows) + self.self_attn(self.input_layernorm(x), cos, sin, mask, rows, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, blocks and final norm under the names that Hugging Face models use."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MaskedDiffusionLM(PreTrainedModel):
    """A masked diffusion language model; `hidden` is what the rest of d1lit calls."""

    config_class = MaskedDiffusionConfig
    config: MaskedDiffusionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers reads it as a plain class attribute
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.order_head = OrderHead(config.hidden_size) if config.order_head else None
        self.post_init()

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, D]."""
        weight = self.lm_head.weight
        assert isinstance(weight, Tensor)
        return weight

    def use(self, kernels: Kernels) -> None:
        """Run the elementwise work of all blocks by these from now on."""
        for module in self.modules():
            if isinstance(module, RMSNorm | Attention | MLP):
                module.kernels = kernels

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        assert isinstance(value, nn.Embedding)
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def hidden(
        self,
        ids: Int[Tensor, "R Q"],
        attention: Bool[Tensor, "R T"] | Bool[Tensor, "R Q T"] | None = None,
        position_ids: Int[Tensor, "R Q"] | None = None,
        keep: Int[Tensor, "R M"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "R M D"]:
        """Final hidden states from which the head predicts the tokens AT the kept positions.

        Args:
            ids: the views; with a cache that has a span, the ids of that span only (Q < T).
            attention: which keys exist, per row or per query and key; None lets SDPA take its fastest kernel.
            position_ids: rotary positions; the place in the canvas by default.
            keep: places within `ids`; the last block and the final norm do no work elsewhere.
            cache: keys and values of the whole canvas.
        """
        if self.config.shift:
            if cache is not None and cache.span is not None and cache.span[0] > 0:
                return self._hidden_after_span_start(ids, attention, position_ids, keep, cache)
            if keep is None:
                keep = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            keep = (keep - 1).clamp(min=0)
        return self._rows(ids, attention, position_ids, keep, cache)

    def _hidden_after_span_start(
        self,
        ids: Int[Tensor, "R Q"],
        attention: Tensor | None,
        position_ids: Int[Tensor, "R Q"] | None,
        keep: Int[Tensor, "R M"] | None,
        cache: KVCache,
    ) -> Float[Tensor, "R M D"]:
        """The shifted model's row for the first token of a span is the one before the span: compute it as well."""
        assert cache.span is not None
        start, stop = cache.span
        if attention is not None and attention.dim() == 3:
            raise ValueError("attention: a span of a shifted model takes a key mask [R T], not a mask per query")
        cache.write_ids(start, ids)
        before = cache.canvas["ids"][:, start - 1 : start]
        if position_ids is not None:
            position_ids = torch.cat((position_ids[:, :1] - 1, position_ids), dim=1)
        if keep is None:
            keep = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        wider = cache.at(start - 1, stop)
        return self._rows(torch.cat((before, ids), dim=1), attention, position_ids, keep, wider)

    def _rows(
        self,
        ids: Int[Tensor, "R Q"],
        attention: Tensor | None = None,
        position_ids: Int[Tensor, "R Q"] | None = None,
        rows: Int[Tensor, "R M"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "R M D"]:
        """Output rows as the official code numbers them, without any shift."""
        position_ids = self._positions(ids, position_ids, cache)
        config = self.config
        cos, sin = rotary_table(position_ids, config.hidden_size // config.num_attention_heads, config.rope_theta)
        cos, sin = (table[None, None] if table.dim() == 2 else table[:, None] for table in (cos, sin))
        mask = attention_mask(attention)
        x = self.model.embed_tokens(ids)
        last = len(self.model.layers) - 1
        for layer, block in enumerate(self.model.layers):
            if layer == last and rows is not None:
                if mask is not None and mask.shape[2] > 1:
                    mask = take_rows(mask[:, 0], rows)[:, None]
                x = block(x, cos, sin, mask, rows, cache)
            else:
                x = block(x, cos, sin, mask, None, cache)
        return self.model.norm(x)

    def _positions(
        self, ids: Int[Tensor, "R Q"], position_ids: Int[Tensor, "R Q"] | None, cache: KVCache | None
    ) -> Int[Tensor, "... Q"]:
        """Rotary positions: the given ones, those of the canvas, or the place counted from the left edge."""
        start = 0
        if cache is not None and cache.span is None:
            cache.remember(ids, position_ids)
        elif cache is not None and cache.span is not None:
            start, stop = cache.span
            cache.write_ids(start, ids)
            if position_ids is None and "position_ids" in cache.canvas:
                return cache.canvas["position_ids"][:, start:stop]
        if position_ids is not None:
            return position_ids
        return torch.arange(start, start + ids.shape[1], device=ids.device)

    def forward(
        self,
        input_ids: Int[Tensor, "R T"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "R T"] | None = None,
        labels: Int[Tensor, "R T"] | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits as the official code returns them: row by row, without Dream's shift; for use outside d1lit."""
        keys = None if attention_mask is None else attention_mask.bool()
        logits = self.lm_head(self._rows(input_ids, keys, position_ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


def attention_mask(attention: Tensor | None) -> Tensor | None:
    """[R T] or [R Q T] to the shape SDPA takes; a query that may see nothing sees everything.

    Such queries are padding whose output nobody reads, but an empty softmax would be NaN, and NaN keys and values
    spoil every other row of the next block even where the mask hides them.
    """
    if attention is None:
        return None
    mask = attention[:, None, None] if attention.dim() == 2 else attention[:, None]
    return mask | ~mask.any(-1, keepdim=True)


AutoConfig.register("d1lit", MaskedDiffusionConfig, exist_ok=True)
AutoModel.register(MaskedDiffusionConfig, MaskedDiffusionLM, exist_ok=True)
AutoModelForMaskedLM.register(MaskedDiffusionConfig, MaskedDiffusionLM, exist_ok=True)
