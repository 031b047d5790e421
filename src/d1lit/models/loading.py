"""Reading networks from a folder or the hub, shard by shard, and writing them back. No remote code, no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d1lit.models.layouts import from_official_name, official_config, read_config, to_official_name
from d1lit.models.order_head import ORDER_HEAD_FILE
from d1lit.models.presets import build_on_meta
from d1lit.models.transformer import MaskedDiffusionConfig, MaskedDiffusionLM
from d1lit.processes import is_first

Layout = Literal["d1lit", "official"]
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def find_folder(path: str, revision: str | None = None, key: str = "model.path", weights: bool = True) -> Path:
    """The local folder of a model: the path itself, or a snapshot of the hub id it names.

    Args:
        path: folder or hub id.
        revision: branch, tag or commit on the hub.
        key: the configuration key that named it, for messages.
        weights: False fetches configuration and tokenizer only.

    Raises:
        ValueError: if there is no such folder and no such hub id, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"{key}: {path} is a file. Try: its folder, with config.json and *.safetensors [E401]")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ValueError(
            f"{key}: there is no folder {path}. Try: an existing folder or a hub id such as owner/name [E401]"
        )
    wanted = [pattern for pattern in _HUB_FILES if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{key}: {path} is neither a folder here nor reachable on the hub ({cause}). "
            "Try: the path of a folder that holds the model [E401]"
        ) from error


def load_config(folder: Path, key: str = "model.path") -> MaskedDiffusionConfig:
    """Our configuration of the model in a folder, whatever its layout."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{key}: {folder} holds no config.json, so it is no model folder. Try: the folder above or below [E401]"
        )
    try:
        raw = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: {file} is not valid JSON ({error}). Try: copying the model again [E403]") from error
    config = read_config(raw, str(folder))
    config.order_head = config.order_head or (folder / ORDER_HEAD_FILE).is_file()
    return config


def shard_files(folder: Path, key: str = "model.path") -> list[Path]:
    """The safetensors files of a folder, in the order of its index."""
    if (folder / _INDEX).is_file():
        names = dict.fromkeys(json.loads((folder / _INDEX).read_text())["weight_map"].values())
        files = [folder / name for name in names]
    else:
        files = [folder / _SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{key}: {folder} lacks {', '.join(missing)}. Try: downloading the missing weights (safetensors) [E403]"
        )
    own = folder / ORDER_HEAD_FILE
    return [*files, own] if own.is_file() else files


def load_network(
    path: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> MaskedDiffusionLM:
    """A network from a folder or a hub id, in our layout, LLaDA's or Dream's.

    The module tree is built without memory and filled tensor by tensor, so the weights never stand twice in memory.

    Args:
        path: folder or hub id.
        dtype: of all weights; None keeps each as it was saved.
        device: where the weights go.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: if there is no such model, or its weights do not match its config exactly (the keys are named).
    """
    folder = find_folder(path, revision)
    network = build_on_meta(load_config(folder))
    for name, tensor in _checked_tensors(network, folder):
        # A copy, because safetensors hands out views of the mapped file, which may be rewritten under us.
        _assign(network, name, torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device).copy_(tensor))
    network.tie_weights()
    network.config.dtype = str(network.head_weight.dtype).removeprefix("torch.")
    return network.train()


@torch.no_grad()
def copy_weights(network: MaskedDiffusionLM, path: str) -> None:
    """Read the weights of a folder of the same shape into an existing network, in place.

    Raises:
        ValueError: if the folder's weights are not exactly the network's.
    """
    own = dict(network.named_parameters())
    for name, tensor in _checked_tensors(network, find_folder(path)):
        own[name].copy_(tensor)


def _checked_tensors(network: MaskedDiffusionLM, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of every weight of the network, once; anything else is an error."""
    expected = dict(network.named_parameters())
    seen: set[str] = set()
    unexpected: list[str] = []
    for name, tensor in _read_shards(shard_files(folder), network.config.family):
        if name not in expected:
            if not (network.config.tie_word_embeddings and name == "lm_head.weight"):
                unexpected.append(name)
            continue
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"model.path: {name} in {folder} has shape {tuple(tensor.shape)}, "
                f"but the model has {tuple(expected[name].shape)}. Try: copying the model again [E403]"
            )
        seen.add(name)
        yield name, tensor
    missing = [name for name in expected if name not in seen]
    if missing or unexpected:
        raise ValueError(
            f"model.path: the weights in {folder} do not match the model; missing: {_some(missing)}; "
            f"unexpected: {_some(unexpected)}. Try: copying the model again [E403]"
        )


def _read_shards(files: list[Path], family: str) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor), one shard mapped at a time."""
    for file in files:
        try:
            with safe_open(str(file), framework="pt", device="cpu") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    if not name.endswith("rotary_emb.inv_freq"):
                        yield from_official_name(name, family), shard.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"model.path: {file} is damaged ({error}). Try: copying the model again [E403]") from None


def _assign(network: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    network.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def export_model(
    network: MaskedDiffusionLM, folder: str | Path, layout: Layout = "d1lit", max_shard_size: str = "5GB"
) -> Path:
    """Write config.json and safetensors; `official` uses the names and the config.json that the official code reads.

    Args:
        network: plain (merge an adapter first). If sharded, every process calls; the first one writes.
        folder: is created.
        layout: our own, or that of the model's family.
        max_shard_size: larger models are split, with an index.
    """
    folder = Path(folder)
    tensors = gather(network.named_parameters(remove_duplicate=True))
    if not is_first():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "d1lit":
        network.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard_size)
        return folder
    config = {**official_config(network.config), "torch_dtype": str(network.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("order_head.")}
    official = {to_official_name(name, network.config.family): tensor for name, tensor in tensors.items()}
    _write_shards(official, folder, max_shard_size)
    if head:  # the official code knows none, and finds it beside what it reads
        save_file(head, str(folder / ORDER_HEAD_FILE), metadata={"format": "pt"})
    return folder


def gather(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process, one gathered at a time; nothing on the others.

    Sharded parameters are gathered from all processes, so all must call this.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in named:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if is_first():
            whole[name] = tensor.cpu().contiguous()
    return whole


def _write_shards(tensors: dict[str, Tensor], folder: Path, max_shard_size: str) -> None:
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, str(folder / file), metadata={"format": "pt"})
    if plan.is_sharded:
        index: dict[str, Any] = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
