"""Fresh networks: the tiny built-in shape and a seeded init that leaves the global generator alone."""

from __future__ import annotations

import torch
from torch import nn

from d1lit.draws import CounterDraws
from d1lit.models.transformer import MaskedDiffusionConfig, MaskedDiffusionLM, RMSNorm


def tiny_config(
    vocab_size: int,
    mask_token_id: int,
    eos_token_id: int,
    pad_token_id: int,
    width: int,
    num_layers: int,
    num_heads: int,
    mlp_width: int,
    rope_theta: float | int,
    max_length: int,
    init_std: float | int,
) -> MaskedDiffusionConfig:
    """The built-in model: LLaDA's architecture at a size that a laptop trains in a minute, with an untied head.

    Args:
        vocab_size: of the tokenizer.
        mask_token_id: id of [MASK].
        eos_token_id: id that ends a completion.
        pad_token_id: id that fills prompts on the left.
        width: of the residual stream.
        num_layers: blocks.
        num_heads: attention heads; each as wide as the others.
        mlp_width: inner width of the SwiGLU.
        max_length: longest canvas meant; rotary positions do not enforce it.
        rope_theta: 100 rather than LLaDA's 500,000, because the canvases are tens of tokens long.
        init_std: standard deviation of every matrix at init (see `initialise`).
    """
    if width % num_heads or (width // num_heads) % 2:
        raise ValueError(
            f"model.tiny.num_heads: must divide the width into even parts, got {num_heads} and {width}. Try: 4"
        )
    return MaskedDiffusionConfig(
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        rope_theta=rope_theta,
        max_position_embeddings=max_length,
        initializer_range=init_std,
    )


def build_on_meta(config: MaskedDiffusionConfig) -> MaskedDiffusionLM:
    """The module tree with shapes but without memory; building it draws no random number."""
    with torch.device("meta"):
        return MaskedDiffusionLM(config)


@torch.no_grad()
def initialise(network: MaskedDiffusionLM, seed: int) -> None:
    """Normal init of every matrix with the config's `initializer_range`, norms at one, biases at zero.

    The two matrices of a block that write into the residual stream are scaled down by sqrt(2 * layers), so that the
    stream's variance at init does not grow with depth (GPT-2's rule). Each matrix has its own generator, seeded by its
    name: a network with another layer added keeps the init of the rest.
    """
    draws = CounterDraws(seed)
    residual_scale = (2 * network.config.num_hidden_layers) ** -0.5
    for path, module in network.named_modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, nn.Linear | nn.Embedding):
            generator = torch.Generator().manual_seed(draws.torch_seed(f"init.{path}"))
            std = network.config.initializer_range
            if path.endswith(("o_proj", "down_proj")):
                std *= residual_scale
            module.weight.copy_(
                torch.randn(module.weight.shape, generator=generator, device="cpu", dtype=torch.float32) * std
            )
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
    network.tie_weights()


def fresh_network(config: MaskedDiffusionConfig, seed: int, dtype: torch.dtype = torch.float32) -> MaskedDiffusionLM:
    """A newly initialised network on the CPU."""
    network = build_on_meta(config)
    nn.Module.to(network, dtype=dtype)
    network.to_empty(device="cpu")
    network.tie_weights()
    initialise(network, seed)
    return network
