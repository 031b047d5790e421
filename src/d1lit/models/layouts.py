"""Names and configurations of the official LLaDA and Dream layouts, and how they map to ours.

LLaDA's module tree (ML-GSAI/LLaDA, modeling_llada.py) has names of its own; Dream's (DreamLM/Dream) are those of Qwen2,
which are ours too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from d1lit.models.transformer import MaskedDiffusionConfig

_LLADA_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_LLADA_ROOT = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
_OUR_BLOCK = {official: ours for ours, official in _LLADA_BLOCK.items()}
_OUR_ROOT = {official: ours for ours, official in _LLADA_ROOT.items()}


def to_official_name(name: str, family: str) -> str:
    """Our module or parameter name in the official layout."""
    if family != "llada":
        return name
    found = re.match(r"(.*?)model\.layers\.(\d+)\.(.+)", name)
    if found:
        prefix, layer, rest = found.groups()
        return f"{prefix}model.transformer.blocks.{layer}.{_replace_head(rest, _LLADA_BLOCK)}"
    return _replace_head(name, _LLADA_ROOT)


def from_official_name(name: str, family: str) -> str:
    """An official module or parameter name in ours; unknown names come back as they are."""
    if family != "llada":
        return name
    found = re.match(r"(.*?)model\.transformer\.blocks\.(\d+)\.(.+)", name)
    if found:
        prefix, layer, rest = found.groups()
        return f"{prefix}model.layers.{layer}.{_replace_head(rest, _OUR_BLOCK)}"
    return _replace_head(name, _OUR_ROOT)


def _replace_head(name: str, mapping: Mapping[str, str]) -> str:
    for old, new in mapping.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def official_target(name: str, family: str) -> str:
    """A LoRA target ("gate_proj") by its official name ("ff_proj")."""
    if family != "llada":
        return name
    return {ours.rsplit(".", 1)[-1]: official for ours, official in _LLADA_BLOCK.items()}.get(name, name)


# ---------------------------------------------------------------------------------------------------- configurations

_LLADA_FIXED: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "block_group_size": 1,
    "block_type": "llama",
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "include_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}
_DREAM_FIXED: dict[str, Any] = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False}
LLADA_TYPES, DREAM_TYPES = ("llada",), ("Dream", "dream")


def read_config(raw: Mapping[str, Any], where: str) -> MaskedDiffusionConfig:
    """Our configuration from the config.json of any layout we know.

    Raises:
        ValueError: for another architecture, a switch we do not implement, or a missing field, by name.
    """
    model_type = raw.get("model_type")
    try:
        if model_type == MaskedDiffusionConfig.model_type:
            return MaskedDiffusionConfig.from_dict(dict(raw))
        if model_type in LLADA_TYPES:
            return _read_llada(raw, where)
        if model_type in DREAM_TYPES:
            return _read_dream(raw, where)
    except KeyError as error:
        raise ValueError(
            f"model.path: config.json of {where} lacks {error}. Try: the folder the model was published in [E402]"
        ) from error
    raise ValueError(
        f"model.path: {where} holds a model of type {model_type!r}, not a masked diffusion model that d1lit knows. "
        "Try: a LLaDA (llada), Dream (Dream) or d1lit folder [E402]"
    )


def _refuse_switches(raw: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"model.path: {where} sets {key}={raw[key]!r}; only {value!r} is implemented. "
                "Try: the published model [E402]"
            )


def _read_llada(raw: Mapping[str, Any], where: str) -> MaskedDiffusionConfig:
    _refuse_switches(raw, _LLADA_FIXED, where)
    heads = raw["n_heads"]
    kv_heads = raw.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if raw.get("multi_query_attention") else heads
    return MaskedDiffusionConfig(
        family="llada",
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=raw["rope_theta"],
        rms_norm_eps=raw["rms_norm_eps"],
        qkv_bias=bool(raw.get("include_qkv_bias")),
        rope_in_fp32=raw.get("rope_full_precision", True),
        max_position_embeddings=raw["max_sequence_length"],
        tie_word_embeddings=bool(raw.get("weight_tying")),
        mask_token_id=raw["mask_token_id"],
        eos_token_id=raw["eos_token_id"],
        pad_token_id=raw["pad_token_id"],
        official_config=dict(raw),
    )


def _read_dream(raw: Mapping[str, Any], where: str) -> MaskedDiffusionConfig:
    _refuse_switches(raw, _DREAM_FIXED, where)
    return MaskedDiffusionConfig(
        family="dream",
        shift=True,
        qkv_bias=True,
        rope_in_fp32=False,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        rope_theta=raw["rope_theta"],
        rms_norm_eps=raw["rms_norm_eps"],
        max_position_embeddings=raw["max_position_embeddings"],
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        mask_token_id=raw["mask_token_id"],
        eos_token_id=raw["eos_token_id"],
        pad_token_id=raw["pad_token_id"],
        bos_token_id=raw.get("bos_token_id"),
        official_config=dict(raw),
    )


def official_config(config: MaskedDiffusionConfig) -> dict[str, Any]:
    """The config.json that the official code reads: the one the model came with, or one written for it."""
    if config.official_config is not None:
        return dict(config.official_config)
    if config.family == "llada":
        return _write_llada(config)
    return _write_dream(config)


def _write_llada(config: MaskedDiffusionConfig) -> dict[str, Any]:
    return {
        **_LLADA_FIXED,
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm_with_affine": True,
        "d_model": config.hidden_size,
        "embedding_dropout": 0.0,
        "embedding_size": config.vocab_size,
        "eos_token_id": config.eos_token_id,
        "flash_attention": False,
        "include_qkv_bias": config.qkv_bias,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": config.initializer_range,
        "layer_norm_with_affine": True,
        "mask_token_id": config.mask_token_id,
        "max_sequence_length": config.max_position_embeddings,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "pad_token_id": config.pad_token_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_full_precision": config.rope_in_fp32,
        "rope_theta": config.rope_theta,
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tie_word_embeddings,
    }


def _write_dream(config: MaskedDiffusionConfig) -> dict[str, Any]:
    return {
        **_DREAM_FIXED,
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }
