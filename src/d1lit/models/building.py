"""From settings to a policy and its tokenizer: the one door that the composed configuration comes through."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from d1lit.models.graphs import ForwardGraphs
from d1lit.models.kernels import fused
from d1lit.models.loading import find_folder, load_network
from d1lit.models.lora import LoraSettings, adapt, merge, report
from d1lit.models.policy import Policy
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.models.quantizing import quantize
from d1lit.models.tokenizers import build_tiny_tokenizer, check_tokenizer, load_tokenizer
from d1lit.models.transformer import MaskedDiffusionLM

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def build_network(
    path: str | None,
    tiny: Mapping[str, Any] | None,
    dtype: str,
    seed: int,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> tuple[MaskedDiffusionLM, PreTrainedTokenizerBase]:
    """The plain network and its tokenizer: read from `path`, or the tiny one, newly initialised.

    Args:
        path: folder or hub id; None for a fresh tiny model.
        tiny: arguments of `tiny_config` without the vocabulary, for a fresh model.
        dtype: of the weights: float32, bfloat16, float16 or float64.
        seed: seed of a fresh model's init.
        device: where the weights go.
        revision: branch, tag or commit on the hub.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"model.dtype: {dtype!r} is not one of {', '.join(sorted(_DTYPES))}. Try: float32")
    if path is not None:
        folder = find_folder(path, revision)
        network = load_network(str(folder), _DTYPES[dtype], device)
        return network, load_tokenizer(str(folder), network.config)
    if tiny is None:
        raise ValueError("model.path: neither a path nor the shape of a tiny model is given. Try: model=tiny [E406]")
    tokenizer = build_tiny_tokenizer()
    assert isinstance(tokenizer.mask_token_id, int)
    assert isinstance(tokenizer.eos_token_id, int)
    assert isinstance(tokenizer.pad_token_id, int)
    config = tiny_config(
        len(tokenizer), tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, **tiny
    )
    check_tokenizer(tokenizer, config, "the tiny model")
    network = fresh_network(config, seed, _DTYPES[dtype])
    nn.Module.to(network, device)
    return network, tokenizer


def build_policy(
    path: str | None,
    tiny: Mapping[str, Any] | None,
    dtype: str,
    attend_padding: bool,
    lora: LoraSettings | None,
    seed: int,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trainable: bool = True,
    gradient_checkpointing: bool = False,
    head_budget: int | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """A policy and its tokenizer.

    Args:
        path: folder or hub id; None for a fresh tiny model.
        tiny: arguments of `tiny_config` without the vocabulary, for a fresh model.
        dtype: of the weights.
        attend_padding: True reproduces d1, whose left pads are attended.
        lora: adapter to add; None trains the whole network.
        seed: seed of a fresh model's or adapter's init.
        device: where the weights go.
        revision: branch, tag or commit on the hub.
        trainable: False freezes everything (evaluation).
        gradient_checkpointing: recompute each block in the backward pass.
        head_budget: bytes that the logits of one chunk of positions may take; None leaves it to the device.
        compile: fuse the elementwise work of the blocks.
        cuda_graphs: replay forwards of rollouts, scoring and updates, and the backward passes of the last.
    """
    network, tokenizer = build_network(path, tiny, dtype, seed, device, revision)
    if gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    if compile:
        network.use(fused(torch.device(device).type, _DTYPES[dtype]))
    policy = Policy(network, attend_padding, head_budget, ForwardGraphs() if cuda_graphs else None)
    if lora is not None:
        policy = add_lora(policy, lora, seed)
    if not trainable:
        policy.requires_grad_(False).eval()
    return policy, tokenizer


def add_lora(policy: Policy, settings: LoraSettings, seed: int) -> Policy:
    """A policy that trains a fresh adapter on the given one's frozen network; matched modules and counts are logged.

    Raises:
        ValueError: if the policy has an adapter already, or a target name matches nothing.
    """
    if isinstance(policy.model, PeftModel):
        raise ValueError("lora: the model has an adapter already. Try: merging it first")
    if settings.quantize is not None:
        quantize(policy.network)
    adapted = adapt(policy.network, settings, seed)
    _log.info("%s", report(adapted))
    return Policy(adapted, policy.attend_padding, policy.head_budget, policy.graphs).train(policy.training)


def merge_lora(policy: Policy, ids: Int[Tensor, "R T"] | None = None) -> Policy:
    """A plain policy with the adapter folded into its weights in fp32; the log-prob shift on `ids` is logged.

    Args:
        policy: is taken apart; one without an adapter comes back as it is.
        ids: token ids on which the shift is measured.
    """
    if not isinstance(policy.model, PeftModel):
        return policy
    network, shift = merge(policy.model, ids)
    if shift is not None:
        _log.info("%s", shift)
    return Policy(network, policy.attend_padding, policy.head_budget, policy.graphs).train(policy.training)
