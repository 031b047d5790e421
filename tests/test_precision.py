"""Half-precision networks learn: adapters and optimizers stay in float32, and small steps are not rounded away."""

import copy
from functools import partial

import pytest
import torch

from d1lit.models import LoraSettings, add_lora
from d1lit.models.lora import ExactLinear, lora_layers
from d1lit.modules.masters import MasterWeights
from d1lit.modules.optimizing import configure, constant
from tests.end_to_end.small import fit, make_module, sgd, small_policy

ADAMW = partial(torch.optim.AdamW, lr=3e-6, betas=(0.9, 0.99), weight_decay=0.0)


def adamw(named):
    return ADAMW(list(named))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_beside_half_precision_stays_exact_and_speaks_half(dtype):
    policy = add_lora(small_policy(dtype), LoraSettings("paper", 4, 8, 0.0), seed=0)
    for _, layer in lora_layers(policy.model):
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        assert isinstance(down, ExactLinear) and down.weight.dtype == up.weight.dtype == torch.float32
        x = torch.randn(3, down.in_features).to(dtype)
        with torch.no_grad():
            up.weight.normal_()
            longhand = layer.base_layer(x) + ((x @ down.weight.to(dtype).T) @ up.weight.to(dtype).T) * 2.0
            torch.testing.assert_close(layer(x), longhand, rtol=0.02, atol=0.02)
        assert layer(x).dtype == dtype
    assert policy.dtype == dtype


def test_a_float32_adapter_computes_as_it_always_did():
    policy = add_lora(small_policy(), LoraSettings("paper", 4, 8, 0.0), seed=0)
    _, layer = next(lora_layers(policy.model))
    x = torch.randn(5, layer.in_features)
    plain = layer.base_layer(x) + (x @ layer.lora_A["default"].weight.T) @ layer.lora_B["default"].weight.T * 2.0
    torch.testing.assert_close(layer(x), plain)


def steps(weight: torch.Tensor, make, count: int) -> torch.Tensor:
    """The weight after steps along a gradient of ones."""
    weight = weight.clone().requires_grad_()
    optimizer = make([("w", weight)])
    for _ in range(count):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach()


def test_steps_too_small_for_bfloat16_add_up_in_the_copies():
    start = torch.full((4,), 0.5)
    exact = steps(start, adamw, 2000)
    with_masters = steps(start.bfloat16(), partial(MasterWeights, optimizer=adamw), 2000)
    without = steps(start.bfloat16(), adamw, 2000)
    assert torch.equal(without, start.bfloat16()), "every step of 3e-6 is rounded away"
    assert torch.equal(with_masters, exact.bfloat16())
    assert float(exact[0]) == pytest.approx(0.494, abs=1e-4)


def test_masters_follow_schedule_and_go_through_a_checkpoint_bit_by_bit():
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()

    def run(first: int, second: int) -> torch.Tensor:
        stored, at = {}, {}
        own = torch.nn.Linear(3, 6, bias=False, dtype=torch.bfloat16)
        own.weight.data.copy_(weight)
        for part, count in enumerate((first, second)):
            built = configure(own, partial(_adamw, lr=1e-3), partial(constant, warmup_updates=4), 20)
            optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
            assert isinstance(optimizer, MasterWeights)
            if part:
                optimizer.load_state_dict(stored)
                schedule.load_state_dict(at)
            for _ in range(count):
                own.weight.grad = torch.sin(own.weight.detach().float() * 3).bfloat16()
                optimizer.step()
                schedule.step()
            stored, at = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(schedule.state_dict())
        return stored["copies"][0]

    assert torch.equal(run(8, 0), run(3, 5))


def _adamw(named, lr):
    return torch.optim.AdamW(list(named), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)


@pytest.mark.parametrize("trains", ["adapter", "everything"])
def test_a_bfloat16_stage_runs_in_the_trainer_and_moves(trains):
    policy = small_policy(torch.bfloat16)
    if trains == "adapter":
        policy = add_lora(policy, LoraSettings("all_linear", 4, 8, 0.0), seed=0)
    module = make_module(policy, optimizer=partial(sgd, lr=0.1))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    fit(module)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    dtypes = {p.dtype for name, p in policy.named_parameters() if name in moved}
    assert dtypes == ({torch.float32} if trains == "adapter" else {torch.bfloat16})
    assert moved == {name for name, p in policy.named_parameters() if p.requires_grad} & moved
