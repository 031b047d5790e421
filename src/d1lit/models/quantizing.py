"""The frozen base of an adapter in four bits (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from d1lit.models.transformer import MaskedDiffusionLM

BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)
"""NF4 with doubly quantised scales: four bits, a byte for 64 weights, a float for 256 such bytes."""


def check_bitsandbytes() -> None:
    """Refuse before anything is loaded where the package is missing.

    Raises:
        ValueError: naming the cure.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "lora.quantize: nf4 needs the package bitsandbytes, which is not installed. "
            "Try: pip install 'd1lit[gpu]', or lora.quantize=null"
        )


@torch.no_grad()
def quantize(network: MaskedDiffusionLM) -> None:
    """Put the matrices of the blocks into NF4 in place, one at a time; embedding, norms and head stay as they are.

    Products are taken in the network's own dtype from a matrix unpacked for the moment. Rounding to the nearest of
    sixteen values is deterministic, so a network quantised again from the same weights is the same.
    """
    check_bitsandbytes()
    import bitsandbytes as bnb  # type: ignore[import-not-found]

    for block in network.model.layers:
        for path, layer in list(block.named_modules()):
            if not isinstance(layer, nn.Linear) or isinstance(layer, bnb.nn.Linear4bit):
                continue
            packed = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=layer.weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            device = layer.weight.device
            weight = bnb.nn.Params4bit(
                layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            packed.weight = weight.to(device)
            packed.support_avx512bf16_for_cpu = False  # else a CPU lays the weights out anew for inference, inexactly
            packed.bias = layer.bias
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, packed)
    vars(network)["is_loaded_in_4bit"] = True  # PEFT asks for it


def is_quantized(weight: Tensor) -> bool:
    """Whether a matrix stands in four bits."""
    return getattr(weight, "quant_state", None) is not None


def plain(packed: nn.Linear, weight: Tensor) -> nn.Linear:
    """A matrix as any other, with the bias of a quantised one."""
    layer = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = packed.bias
    return layer


@torch.no_grad()
def unquantize(network: MaskedDiffusionLM) -> None:
    """Unpack every matrix that stands in four bits, in place; a plain network stays as it is."""
    for path, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and is_quantized(layer.weight):
            parent, _, leaf = path.rpartition(".")
            setattr(network.get_submodule(parent), leaf, plain(layer, unpacked(layer.weight)))
    vars(network)["is_loaded_in_4bit"] = False


def unpacked(weight: Any) -> Tensor:
    """A quantised matrix as the numbers its products are taken with, in the dtype it was made from."""
    import bitsandbytes.functional as F  # type: ignore[import-not-found]

    found = F.dequantize_4bit(weight.data, weight.quant_state)
    assert isinstance(found, Tensor)
    return found
