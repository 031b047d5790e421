"""The network: one native transformer, its loading, adapters, head and tokenizers."""

from d1lit.models.adapters import load_adapter, load_weights, save_adapter, save_weights
from d1lit.models.building import add_lora, build_network, build_policy, merge_lora
from d1lit.models.cache import KVCache
from d1lit.models.loading import export_model, load_network
from d1lit.models.lora import LoraSettings
from d1lit.models.policy import Policy
from d1lit.models.tokenizers import build_tiny_tokenizer, decode_completion, encode_prompt, encode_text, load_tokenizer
from d1lit.models.transformer import MaskedDiffusionConfig, MaskedDiffusionLM

__all__ = [
    "KVCache",
    "LoraSettings",
    "MaskedDiffusionConfig",
    "MaskedDiffusionLM",
    "Policy",
    "add_lora",
    "build_network",
    "build_policy",
    "build_tiny_tokenizer",
    "decode_completion",
    "encode_prompt",
    "encode_text",
    "export_model",
    "load_adapter",
    "load_network",
    "load_tokenizer",
    "load_weights",
    "merge_lora",
    "save_adapter",
    "save_weights",
]
