"""Nested Python structures as JSON plus named tensors, and back without loss: what pickle is not needed for."""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A JSON object with exactly one key of this form is not a dictionary of the caller's; such dictionaries are escaped.
_TENSOR, _TUPLE, _FLOAT, _PAIRS, _ORDERED = "$tensor", "$tuple", "$float", "$dict", "$ordered"
_PIECES = "$pieces"
_MAX_DEPTH = 100
"""No checkpoint is nested so deep; a structure that contains itself is."""

STORABLE_DTYPES = frozenset(
    {
        torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
        torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
        torch.float8_e4m3fn, torch.float8_e5m2,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """A tensor that lies cut by its first dimension in files of the checkpoint that others have written."""

    names: tuple[str, ...]
    """Of the pieces, from the first row to the last."""


def split_tree(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Separate a nested structure into something JSON can hold and the tensors in it, named by their path.

    Tensors that are one and the same (tied weights) are stored once and come back as one. Sizes, dtypes and bits are
    kept; strides, devices, `requires_grad` and the class `Parameter` are not.

    Raises:
        TypeError: for anything but None, bool, int, float, str, tensors, and lists, tuples and dictionaries of these,
            naming its place in the tree.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    return _encode(tree, (), tensors, names), tensors


def join_tree(structure: Any, tensors: Mapping[str, Tensor], pieces: Callable[[list[str]], Any] | None = None) -> Any:
    """The structure that `split_tree` took apart.

    Args:
        structure: what JSON held.
        tensors: by name, pieces included.
        pieces: what becomes of a tensor in pieces, from their names; None puts it together.
    """
    if isinstance(structure, list):
        return [join_tree(item, tensors, pieces) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if len(structure) == 1:
        (tag, value), *_ = structure.items()
        if tag == _TENSOR:
            return tensors[value]
        if tag == _PIECES:
            return torch.cat([tensors[name] for name in value]) if pieces is None else pieces(value)
        if tag == _TUPLE:
            return tuple(join_tree(item, tensors, pieces) for item in value)
        if tag == _FLOAT:
            return struct.unpack(">d", bytes.fromhex(value))[0]
        if tag == _PAIRS:
            return {key: join_tree(item, tensors, pieces) for key, item in value}
        if tag == _ORDERED:
            return OrderedDict((key, join_tree(item, tensors, pieces)) for key, item in value)
    return {key: join_tree(item, tensors, pieces) for key, item in structure.items()}


def holds_pieces(structure: Any) -> bool:
    """Whether an encoded structure names tensors in pieces."""
    if isinstance(structure, list):
        return any(map(holds_pieces, structure))
    if not isinstance(structure, dict):
        return False
    return (len(structure) == 1 and _PIECES in structure) or any(map(holds_pieces, structure.values()))


def _encode(node: Any, path: tuple[str, ...], tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]) -> Any:
    if len(path) > _MAX_DEPTH:
        raise TypeError(f"{_show(path[:8])}...: nested deeper than {_MAX_DEPTH} levels; does it contain itself?")
    kind = type(node)
    if node is None or kind in (bool, int, str):
        return node
    if kind is float:
        # JSON has no inf and nan; the bit pattern also keeps the payload of a nan.
        return node if math.isfinite(node) else {_FLOAT: struct.pack(">d", node).hex()}
    if kind is Pieces:
        return {_PIECES: list(node.names)}
    if isinstance(node, Tensor):
        return {_TENSOR: _name_tensor(node, path, tensors, names)}
    if kind is list:
        return [_encode(item, (*path, str(i)), tensors, names) for i, item in enumerate(node)]
    if kind is tuple:
        return {_TUPLE: [_encode(item, (*path, str(i)), tensors, names) for i, item in enumerate(node)]}
    if kind in (dict, OrderedDict):
        return _encode_dict(node, path, tensors, names)
    raise TypeError(
        f"{_show(path)} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; "
        "store None, bool, int, float, str, tensors, or lists, tuples and dictionaries of these"
    )


def _encode_dict(
    node: dict[Any, Any], path: tuple[str, ...], tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]
) -> Any:
    for key in node:
        if type(key) not in (str, int):
            raise TypeError(f"{_show(path)} has the key {key!r}; a checkpoint holds dictionaries with str or int keys")
    encoded = [(key, _encode(item, (*path, str(key)), tensors, names)) for key, item in node.items()]
    if type(node) is OrderedDict:
        return {_ORDERED: [[key, item] for key, item in encoded]}
    looks_tagged = len(encoded) == 1 and str(encoded[0][0]).startswith("$")
    if looks_tagged or any(type(key) is int for key in node):
        return {_PAIRS: [[key, item] for key, item in encoded]}
    return dict(encoded)


def _name_tensor(
    tensor: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]
) -> str:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"{_show(path)} is a {type(tensor).__qualname__} of layout {tensor.layout} on {tensor.device}; "
            "a checkpoint holds whole, dense tensors: gather sharded ones first"
        )
    if tensor.dtype not in STORABLE_DTYPES or tensor.is_conj() or tensor.is_neg():
        raise TypeError(f"{_show(path)} has dtype {tensor.dtype} or a lazy sign, which safetensors cannot hold")
    identity = (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())
    if tensor.numel() and identity in names:
        return names[identity]
    name = _show(path)
    while name in tensors:  # {"a/b": x, "a": {"b": y}}
        name += "'"
    tensors[name] = tensor.detach()
    names[identity] = name
    return name


def _show(path: tuple[str, ...]) -> str:
    return "/".join(path) or "the root of the tree"
