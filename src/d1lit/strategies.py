"""How a stage uses the run's processes: alone, each with the whole model, or each with a shard of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from d1lit.checkpoint.shards import Rows, read_spread, write_pieces
from d1lit.models import Policy
from d1lit.models.sharding import shard, sharded_parts


@dataclass(frozen=True)
class Setting:
    """What a choice of strategy may depend on."""

    world_size: int
    device: torch.device
    trains_large_model: bool
    """All weights of a model that was read from somewhere; False for LoRA and for the built-in model."""


def auto(setting: Setting) -> Strategy | str:
    """One process alone; several: the whole model in each, or shards of one whose every weight trains."""
    if setting.world_size == 1:
        return single(setting)
    return fsdp(setting, offload=False) if setting.trains_large_model else ddp(setting)


def single(setting: Setting) -> str:
    """One process.

    Raises:
        ValueError: if there are several.
    """
    if setting.world_size > 1:
        raise ValueError(f"strategy: single is for one process, not {setting.world_size}. Try: strategy=ddp [E601]")
    return "auto"


def ddp(setting: Setting) -> Strategy | str:
    """Every process holds the whole model and its rows' gradients are averaged after each update."""
    return "auto" if setting.world_size == 1 else DDPStrategy(gradient_as_bucket_view=True)


def fsdp(setting: Setting, offload: bool) -> Strategy | str:
    """Parameters, gradients and optimizer state are spread over the processes (FSDP2), in host memory if `offload`.

    One process has nothing to spread; with `offload` its one shard stays in host memory.
    """
    return "auto" if setting.world_size == 1 and not offload else FullySharded(setting, offload)


class FullySharded(ModelParallelStrategy):
    """FSDP2 on a module's policies, with checkpoints in the project's own form.

    Lightning's strategy saves through torch's distributed checkpoints (pickle) or, whole, in a form that it cannot
    load back beside frozen parameters. Here every process writes its own rows into one folder (checkpoint/shards.py)
    and reads those that are its own then: nothing is gathered, and a run may go on with another number of processes, or
    under another strategy.
    """

    def __init__(self, setting: Setting, offload: bool) -> None:
        # For a process that is alone, which nobody made join a world. What is in host memory is reduced by gloo.
        backend = "cpu:gloo,cuda:nccl" if setting.device.type == "cuda" else "gloo"
        super().__init__(setting.world_size, tensor_parallel_size=1, process_group_backend=backend)
        self.offload = offload

    @override
    def setup(self, trainer: Any) -> None:
        """Cut the policies, then build the optimizers on what is left to each process."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        for module in self.lightning_module.modules():
            if isinstance(module, Policy):
                shard(module, self.device_mesh["data_parallel"], self.offload)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's rows of the weights that are no mere copy of the stage's start."""
        assert self.lightning_module is not None
        # A forward without a backward pass (validation) leaves the outermost parameters gathered, in memory that goes.
        for part in sharded_parts(self.lightning_module):
            part.reshard()
        kept = {
            name: parameter
            for name, parameter in self.lightning_module.named_parameters()
            if parameter.requires_grad or "reference" in name
        }
        buffers = dict(self.lightning_module.named_buffers())
        others = {n: v for n, v in self.lightning_module.state_dict().items() if n in buffers}
        return _rows({**kept, **others})

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This process's rows of it."""
        return _rows(_plain(optimizer).state_dict())

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """Yes: Lightning's own strategy loads the optimizer beside the weights, and this one does not."""
        return True

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads its own rows, and what is whole."""
        torch.cuda.empty_cache()
        mesh = self.device_mesh["data_parallel"]
        return read_spread(Path(checkpoint_path), mesh.get_local_rank(), mesh.size())

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its shard of every weight."""
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                if name in own:
                    own[name].copy_(_cut_like(value, own[name]))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its shard of the state of every weight."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            plain = _plain(optimizer)
            parameters = [parameter for group in plain.param_groups for parameter in group["params"]]
            plain.load_state_dict(_cut_state(state, parameters))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Every process writes its own rows; the first puts the checkpoint together."""
        marked = write_pieces(checkpoint, Path(filepath))
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(marked, filepath, storage_options=storage_options)


def _plain(optimizer: Any) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _rows(tree: Any) -> Any:
    """The same tree with this process's rows in the place of tensors that are spread."""
    if isinstance(tree, DTensor):
        assert tree.placements == (Shard(0),)
        return Rows(tree.to_local().detach(), tuple(tree.shape))
    if isinstance(tree, dict):
        return {key: _rows(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_rows(value) for value in tree)
    return tree


def _cut_state(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimizer's state with shards in the place of whole tensors and of rows."""

    def cut(value: Any, parameter: Tensor) -> Any:
        is_like = isinstance(value, Rows) or (isinstance(value, Tensor) and value.shape == parameter.shape)
        return _cut_like(value, parameter) if is_like else value

    if "state" not in state:  # several optimizers in one (Muon, AdamW), each with its stretch of the parameters
        cut_parts, start = {}, 0
        for name, part in state.items():
            if name != "copies":
                stop = start + sum(len(group["params"]) for group in part["param_groups"])
                cut_parts[name], start = _cut_state(part, parameters[start:stop]), stop
        return cut_parts | _cut_copies(state, parameters)
    own = {
        number: {name: cut(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": own, **_cut_copies(state, parameters)}


def _cut_copies(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """The float32 copies of half-precision weights, where an optimizer keeps some."""
    if "copies" not in state:
        return {}
    pairs = zip(state["copies"], parameters, strict=True)
    return {"copies": [None if value is None else _cut_like(value, parameter) for value, parameter in pairs]}


def _cut_like(value: Tensor | Rows, parameter: Tensor) -> Tensor:
    """This process's shard of a tensor, as the parameter is cut: from its rows, or from the whole that all hold."""
    if not isinstance(parameter, DTensor):
        assert isinstance(value, Tensor)
        return value
    device, mesh = parameter.to_local().device, parameter.device_mesh
    if isinstance(value, Tensor):
        return distribute_tensor(value.to(device), mesh, parameter.placements, src_data_rank=None)
    shape, stride = parameter.shape, parameter.stride()
    local = value.local.to(device)
    return DTensor.from_local(local, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
