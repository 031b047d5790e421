"""How a stage uses the run's processes: alone, each with the whole model, or each with a shard of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from d1lit.models import Policy
from d1lit.models.sharding import shard, whole


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
        raise ValueError(f"strategy: single is for one process, not {setting.world_size}. Try: strategy=ddp")
    return "auto"


def ddp(setting: Setting) -> Strategy | str:
    """Every process holds the whole model and its rows' gradients are averaged after each update."""
    return "auto" if setting.world_size == 1 else DDPStrategy(gradient_as_bucket_view=True)


def fsdp(setting: Setting, offload: bool) -> Strategy | str:
    """Parameters, gradients and optimizer state are spread over the processes (FSDP2), in host memory if `offload`."""
    return "auto" if setting.world_size == 1 else FullySharded(setting.world_size, offload)


class FullySharded(ModelParallelStrategy):
    """FSDP2 on a module's policies, with checkpoints in the project's own form.

    Lightning's strategy saves through torch's distributed checkpoints (pickle) or, whole, in a form that it cannot
    load back beside frozen parameters. Here a checkpoint holds what the same run in one process would have saved:
    shards are gathered to the first process one at a time, and cut again when they are read. So a run may go on with
    another number of processes, or under another strategy.
    """

    def __init__(self, world_size: int, offload: bool) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1)
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
        """Whole weights that are no mere copy of the stage's start, on the first process; nothing on the others."""
        assert self.lightning_module is not None
        kept = {
            name: parameter
            for name, parameter in self.lightning_module.named_parameters()
            if parameter.requires_grad or "reference" in name
        }
        buffers = dict(self.lightning_module.named_buffers())
        others = {n: v for n, v in self.lightning_module.state_dict().items() if n in buffers}
        return _gathered({**kept, **others}, self.is_global_zero)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the first process; nothing but its frame on the others."""
        return _gathered(_plain(optimizer).state_dict(), self.is_global_zero)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads the folder."""
        torch.cuda.empty_cache()
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its shard of every weight."""
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, tensor in checkpoint["state_dict"].items():
                if name in own:
                    own[name].copy_(_cut_like(tensor, own[name]))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its shard of the state of every weight."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            plain = _plain(optimizer)
            plain.load_state_dict(state)
            for parameter, values in plain.state.items():
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        values[name] = _cut_like(value, parameter)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """The first process writes."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)


def _plain(optimizer: Any) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _gathered(tree: Any, keep: bool) -> Any:
    """The same tree with whole tensors on the CPU where they are kept, and None where they are not."""
    if isinstance(tree, Tensor):
        tensor = whole(tree.detach())
        return tensor.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: _gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_gathered(value, keep) for value in tree)
    return tree


def _cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a whole tensor, cut as the parameter is; every process holds the whole one already."""
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.to_local().device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
