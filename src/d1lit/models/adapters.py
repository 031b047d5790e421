"""Adapters and final weights on disk: PEFT's file format, under our names or the official ones."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from d1lit.models.layouts import from_official_name, official_target, to_official_name
from d1lit.models.loading import Layout, copy_weights, export_model, find_folder, gather
from d1lit.models.lora import ADAPTER, LoraSettings, adapt, factors, lora_layers
from d1lit.models.order_head import ORDER_HEAD_FILE, fresh_order_head
from d1lit.models.policy import Policy
from d1lit.models.transformer import MaskedDiffusionLM
from d1lit.processes import is_first

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FIXED: dict[str, Any] = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}


def save_adapter(adapted: PeftModel, folder: str | Path, layout: Layout = "d1lit") -> Path:
    """Write the adapter alone, as PEFT does, and beside it the order head, where there is one.

    `official` uses the module names of the official code.

    Args:
        adapted: a network with our adapter.
        folder: is created.
        layout: our own, or that of the model's family.
    """
    folder = Path(folder)
    network = adapted.get_base_model()
    assert isinstance(network, MaskedDiffusionLM)
    family = network.config.family
    named = []
    for path, layer in lora_layers(adapted):
        name = to_official_name(path, family) if layout == "official" else path
        for part, tensor in zip(("lora_A", "lora_B"), factors(layer, ADAPTER), strict=True):
            named.append((f"{_PREFIX}{name}.{part}.weight", tensor))
    tensors = gather(named)
    head = {} if network.order_head is None else gather(network.order_head.named_parameters("order_head"))
    if not is_first():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if head:
        save_file(head, str(folder / ORDER_HEAD_FILE), metadata={"format": "pt"})
    config = adapted.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig)
    config = copy.deepcopy(config)
    config.inference_mode = True
    if layout == "official":
        config.target_modules = _official_targets(adapted, family)
    save_file(tensors, str(folder / _WEIGHTS), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return folder


def _official_targets(adapted: PeftModel, family: str) -> list[str] | str:
    """Names for PEFT to match; LLaDA calls its head ff_out as well, so there a pattern names the blocks."""
    names = sorted({official_target(path.rsplit(".", 1)[-1], family) for path, _ in lora_layers(adapted)})
    if "ff_out" in names:
        return rf".*\.blocks\.\d+\.({'|'.join(map(re.escape, names))})"
    return names


def load_adapter(network: MaskedDiffusionLM, path: str, revision: str | None = None) -> PeftModel:
    """Add an adapter read from a folder or hub id, in our names or the official ones, to a plain network.

    Raises:
        ValueError: if there is none, if it is of a kind we do not implement, or if it does not fit the network.
    """
    settings, tensors = _read_adapter(path, network.config.family, revision)
    folder = find_folder(path, revision, key="model.adapter")
    if network.order_head is None and (folder / ORDER_HEAD_FILE).is_file():
        head = fresh_order_head(network.config.hidden_size, std=0.0, seed=0)
        network.order_head = head.to(network.head_weight.device, network.head_weight.dtype)
        network.config.order_head = True
    adapted = adapt(network, settings, seed=0)
    _fill_adapter(adapted, tensors, path)
    _fill_order_head(network, folder)
    return adapted


def _read_adapter(path: str, family: str, revision: str | None = None) -> tuple[LoraSettings, dict[str, Tensor]]:
    folder = find_folder(path, revision, key="model.adapter")
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"model.adapter: {folder} holds no {name}. Try: a folder that PEFT or d1lit has written [E405]"
            )
    raw = json.loads((folder / _CONFIG).read_text())
    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f"model.adapter: {folder} is of kind {raw.get('peft_type')!r}; only LORA is implemented. "
            "Try: a LoRA adapter [E405]"
        )
    for key, value in _FIXED.items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"model.adapter: {folder} sets {key}={raw[key]!r}; only {value!r} is implemented. "
                "Try: another adapter [E405]"
            )
    if raw.get("rank_pattern") or raw.get("alpha_pattern") or raw.get("modules_to_save"):
        raise ValueError(f"model.adapter: {folder} gives matrices ranks of their own or saves whole modules; "
                         "only one rank for all is implemented. Try: merging it with PEFT first [E405]")  # fmt: skip
    tensors, stored = {}, _stored(folder / _WEIGHTS)
    for name, tensor in stored.items():
        module, part = name.removeprefix(_PREFIX).rsplit(".lora_", 1)
        tensors[f"{from_official_name(module, family)}.lora_{part}"] = tensor
    names = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors})
    return LoraSettings(names, raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0)), tensors


def _stored(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise ValueError(f"model.adapter: {file} is damaged ({error}). Try: copying the adapter again [E403]") from None


@torch.no_grad()
def _fill_adapter(adapted: PeftModel, tensors: dict[str, Tensor], path: str) -> None:
    wanted = {
        f"{name}.{part}.weight": tensor
        for name, layer in lora_layers(adapted)
        for part, tensor in zip(("lora_A", "lora_B"), factors(layer, ADAPTER), strict=True)
    }
    wrong = sorted(set(wanted) ^ set(tensors)) or [n for n, t in wanted.items() if t.shape != tensors[n].shape]
    if wrong:
        raise ValueError(
            f"model.adapter: the adapter in {path} does not fit the model, first at {wrong[0]}. "
            "Try: the base model it was trained on and the same lora settings [E405]"
        )
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])


@torch.no_grad()
def _fill_order_head(network: MaskedDiffusionLM, folder: Path) -> None:
    """The order head that stands beside an adapter, into that of the network; nothing where neither has one."""
    file, head = folder / ORDER_HEAD_FILE, network.order_head
    own = {} if head is None else dict(head.named_parameters("order_head"))
    stored = _stored(file) if file.is_file() else {}
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in stored.items()}:
        raise ValueError(
            f"model.adapter: the order head in {folder} does not fit the model. "
            "Try: the base model it was trained on and the same estimator [E405]"
        )
    for name, tensor in own.items():
        tensor.copy_(stored[name])


# ------------------------------------------------------------------------------------------------ a policy's weights


def save_weights(policy: Policy, folder: str | Path, layout: Layout = "d1lit") -> Path:
    """Write what the policy trains, adapter or whole network.

    If parameters are sharded, every process calls; the first one writes.
    """
    if isinstance(policy.model, PeftModel):
        return save_adapter(policy.model, folder, layout)
    return export_model(policy.network, folder, layout)


def load_weights(policy: Policy, folder: str | Path) -> None:
    """Read into an existing policy what `save_weights` wrote for one like it.

    Raises:
        ValueError: if the folder holds other weights than the policy has.
    """
    if isinstance(policy.model, PeftModel):
        _, tensors = _read_adapter(str(folder), policy.network.config.family)
        _fill_adapter(policy.model, tensors, str(folder))
        _fill_order_head(policy.network, Path(folder))
    else:
        copy_weights(policy.network, str(folder))
