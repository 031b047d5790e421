"""Low-rank adapters (Hu et al., arXiv 2106.09685) through PEFT: which matrices, seeded init, exact merging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from d1lit.draws import CounterDraws
from d1lit.models.head import chunked_logprobs
from d1lit.models.quantizing import is_quantized, plain, unpacked, unquantize
from d1lit.models.transformer import MaskedDiffusionLM

ADAPTER = "default"
# Last names of the matrices in every block of our network, whatever family it stands for.
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# d1 lists all seven names, but LLaDA's official module tree calls four matrices so; the others go by attn_out, ff_proj
# and ff_out there, and stayed untouched in the paper's runs.
PAPER_NAMES = ("q_proj", "k_proj", "v_proj", "up_proj")
Targets = Literal["paper", "all_linear"] | Sequence[str]


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale and place of an adapter."""

    targets: Targets
    """`paper`: what d1's list matches in LLaDA (q, k, v, up); `all_linear`: every matrix of every block; or names."""
    rank: int
    alpha: float | int
    """The update is scaled by alpha / rank."""
    dropout: float | int
    quantize: Literal["nf4"] | None = None
    """`nf4`: the frozen matrices of the blocks stand in four bits (QLoRA)."""

    def __post_init__(self) -> None:
        names = chosen_names(self.targets)
        unknown = [name for name in names if name not in LINEAR_NAMES]
        if unknown or not names:
            raise ValueError(
                f"lora.targets: {', '.join(unknown) or 'nothing'} matches no matrix of the model's blocks. "
                f"Try: names among {', '.join(LINEAR_NAMES)}, or paper, or all_linear"
            )
        if self.rank < 1:
            raise ValueError(f"lora.rank: must be at least 1, got {self.rank}. Try: 8")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout: must be in [0, 1), got {self.dropout}. Try: 0")
        if self.quantize not in (None, "nf4"):
            raise ValueError(f"lora.quantize: {self.quantize!r} is not known. Try: nf4, or null")


@dataclass(frozen=True)
class LoraReport:
    """What an adapter touches, for the log."""

    modules: tuple[str, ...]
    trainable_parameters: int
    all_parameters: int
    names: tuple[str, ...]
    """Last names of the modules, each once."""

    def __str__(self) -> str:
        share = 100.0 * self.trainable_parameters / self.all_parameters
        return (
            f"LoRA on {', '.join(self.names)}: {len(self.modules)} matrices, "
            f"{self.trainable_parameters:,} trainable of {self.all_parameters:,} parameters ({share:.2f} %)"
        )


def chosen_names(targets: Targets) -> tuple[str, ...]:
    """Last names of the matrices that are asked for.

    Raises:
        ValueError: for a word that names no choice.
    """
    if not isinstance(targets, str):
        return tuple(targets)
    presets = {"paper": PAPER_NAMES, "all_linear": LINEAR_NAMES}
    if targets not in presets:
        raise ValueError(f"lora.targets: {targets!r} is neither paper, all_linear nor a list of names. Try: paper")
    return presets[targets]


def adapt(network: MaskedDiffusionLM, settings: LoraSettings, seed: int) -> PeftModel:
    """Freeze the network and add a fresh adapter; its down-projections are drawn from a private generator.

    Args:
        network: gets LoRA layers in place.
        settings: rank, scale, dropout, targets.
        seed: seed of the adapter's init; the global generator is left as it was.
    """
    names = chosen_names(settings.targets)
    config = LoraConfig(r=settings.rank, lora_dropout=settings.dropout, target_modules=list(names), bias="none")
    config.lora_alpha = settings.alpha  # type: ignore[assignment] - annotated int, but any number scales
    with torch.random.fork_rng(devices=[]):
        adapted = get_peft_model(network, config, adapter_name=ADAPTER)
    assert isinstance(adapted, PeftModel)
    keep_exact(adapted, ADAPTER)
    draws = CounterDraws(seed)
    with torch.no_grad():
        for path, layer in lora_layers(adapted):
            weight = factors(layer, ADAPTER)[0]
            if weight.is_meta:  # shapes alone are asked for
                continue
            bound = weight.shape[1] ** -0.5  # what PEFT's kaiming_uniform_(a=sqrt(5)) amounts to
            generator = torch.Generator().manual_seed(draws.torch_seed(f"lora.{path}"))
            weight.copy_(
                (2.0 * torch.rand(weight.shape, generator=generator, device="cpu", dtype=torch.float32) - 1.0) * bound
            )
    return adapted


class ExactLinear(nn.Linear):
    """A float32 factor of an adapter whose product is taken in the dtype of its input.

    An adapter beside weights in half precision is kept in float32, because steps of 1e-6 vanish in bfloat16's eight
    bits; its products are as fast as those of the weights beside it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Without a bias."""
        return F.linear(input, self.weight.to(input.dtype))


def keep_exact(adapted: nn.Module, adapter: str) -> None:
    """Let the factors of an adapter stay in float32 where the network is in half precision (PEFT made them so)."""
    for _, layer in lora_layers(adapted):
        layer.cast_input_dtype_enabled = False
        for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
            factor.__class__ = ExactLinear


def lora_layers(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted matrices with their paths in the plain network."""
    for path, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            yield path.removeprefix("base_model.model."), module


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Down- and up-projection, A [rank, in] and B [out, rank]."""
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    assert isinstance(down, Tensor) and isinstance(up, Tensor)
    return down, up


def base_weight(layer: Any) -> nn.Parameter:
    """The frozen matrix under an adapter."""
    weight = layer.get_base_layer().weight
    assert isinstance(weight, nn.Parameter)
    return weight


def report(adapted: PeftModel) -> LoraReport:
    """Modules and parameter counts of an adapted network."""
    modules = tuple(path for path, _ in lora_layers(adapted))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    total = sum(p.numel() for p in adapted.parameters())
    names = tuple(dict.fromkeys(path.rsplit(".", 1)[-1] for path in modules))
    return LoraReport(modules, trainable, total, names)


def merged_weight(layer: Any, adapter: str = ADAPTER) -> Float[Tensor, "out_features in_features"]:
    """Base weight plus scaled update, summed in fp32 and cast to the base's dtype.

    A quantised base is unpacked first: to the very numbers beside which the adapter was trained.
    """
    weight = base_weight(layer)
    weight = unpacked(weight) if is_quantized(weight) else weight.data
    down, up = factors(layer, adapter)
    exact = weight if weight.dtype == torch.float64 else weight.float()
    update = layer.scaling[adapter] * (up.to(exact.dtype) @ down.to(exact.dtype))
    return (exact + update).to(weight.dtype)


@dataclass(frozen=True)
class MergeShift:
    """How far merging moved the log-probabilities of given ids, in nats."""

    mean: float
    largest: float

    def __str__(self) -> str:
        return f"merging moved log-probabilities by {self.mean:.2e} nats on average, {self.largest:.2e} at most"


@torch.no_grad()
def merge(adapted: PeftModel, ids: Int[Tensor, "R T"] | None = None) -> tuple[MaskedDiffusionLM, MergeShift | None]:
    """The plain network with the adapter folded into its weights, and what that did to its predictions of `ids`.

    Args:
        adapted: is taken apart: its base network is the one returned.
        ids: token ids on which the shift of the log-probabilities is measured; the ids themselves are scored.
    """
    network = adapted.get_base_model()
    assert isinstance(network, MaskedDiffusionLM)
    was_training = network.training
    network.eval()
    before = None if ids is None else _own_logprobs(network, ids)
    for _, layer in lora_layers(adapted):
        merged = merged_weight(layer)
        if is_quantized(base_weight(layer)):
            layer.base_layer = plain(layer.base_layer, merged)
        else:
            base_weight(layer).data = merged
    network = adapted.unload()
    assert isinstance(network, MaskedDiffusionLM)
    unquantize(network)
    network.requires_grad_(True)
    shift = None
    if ids is not None and before is not None:
        moved = (_own_logprobs(network, ids) - before).abs()
        shift = MergeShift(moved.mean().item(), moved.max().item())
    return network.train(was_training), shift


def _own_logprobs(network: MaskedDiffusionLM, ids: Int[Tensor, "R T"]) -> Float[Tensor, "R T"]:
    hidden = network.hidden(ids)
    logprobs = chunked_logprobs(hidden.flatten(0, 1), network.head_weight, ids.flatten()[:, None])
    return logprobs.view(ids.shape)
