"""A policy whose parameters are spread over the processes (FSDP2): cutting it, gathering it, making it whole again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from d1lit.models.lora import ADAPTER, LoraSettings, adapt
from d1lit.models.policy import Policy
from d1lit.models.presets import build_on_meta

_ENTRANCES = ("hidden", "head", "logprobs", "entropy")
"""The methods through which the rest of d1lit reaches the network; each gathers what it needs."""


def shard(policy: Policy, mesh: DeviceMesh, offload: bool = False) -> None:
    """Spread a policy's parameters over the processes of a mesh, in place, a block at a time; the rest goes together.

    Args:
        policy: whole, on every process, with its adapter and its kept reference.
        mesh: one dimension.
        offload: keep the shards, their gradients and the optimizer in host memory.
    """
    networks = [policy.network] + ([policy.reference_model] if policy.reference_model is not None else [])
    store = OffloadPolicy()
    if offload:
        store = CPUOffloadPolicy(pin_memory=policy.device.type != "cpu")
    for network in networks:
        for block in network.model.layers:
            fully_shard(block, mesh=mesh, offload_policy=store)
    fully_shard(policy, mesh=mesh, offload_policy=store)
    for name in _ENTRANCES:
        register_fsdp_forward_method(policy, name)


def sharded_parts(policy: nn.Module) -> list[FSDPModule]:
    """The modules that gather and release their parameters together; none in a whole policy."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered_parameters(policy: nn.Module) -> Iterator[None]:
    """Within the context every process holds all parameters, gathered once; nothing happens to a whole policy.

    For rollouts: no forward communicates, so processes may run different numbers of them. Enter it outside
    `torch.inference_mode`, whose tensors no later backward pass could use.
    """
    parts = sharded_parts(policy)
    try:
        with torch.no_grad():
            for part in parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not policy, recurse=False)


@torch.no_grad()
def unsharded(policy: Policy) -> Policy:
    """A whole copy of a sharded policy on every process; a whole one comes back as it is. All processes call it.

    A kept reference is not copied.
    """
    if not sharded_parts(policy):
        return policy
    for part in sharded_parts(policy):
        part.reshard()
    network = build_on_meta(policy.network.config)
    model: nn.Module = network
    if isinstance(policy.model, PeftModel):
        settings = policy.model.peft_config[ADAPTER]
        targets = sorted(settings.target_modules)  # type: ignore[attr-defined]
        dropout = settings.lora_dropout  # type: ignore[attr-defined]
        rank, alpha = settings.r, settings.lora_alpha  # type: ignore[attr-defined]
        model = adapt(network, LoraSettings(targets, rank, alpha, dropout), seed=0)
    for name, parameter in policy.model.named_parameters():
        if ".reference." not in name:
            _place(model, name, whole(parameter), parameter.requires_grad)
    if policy.network.model.layers[0].gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    network.tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters())
    return Policy(model, policy.attend_padding, policy.head_budget).train(policy.training)  # type: ignore[arg-type]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on this process, gathered if it is a shard; then all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _place(model: nn.Module, name: str, tensor: Tensor, requires_grad: bool) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    module.register_parameter(leaf, nn.Parameter(tensor.detach(), requires_grad=requires_grad))
