"""QLoRA: an adapter beside a base of four bits trains, merges into what it was trained beside, and refuses what it cannot."""

import importlib.util
from functools import partial

import pytest
import torch

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.errors import ConfigError
from d1lit.models import LoraSettings, Policy, add_lora, load_weights, merge_lora, save_weights
from d1lit.models.lora import base_weight, lora_layers, report
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.models.quantizing import BITS_PER_WEIGHT, is_quantized, unpacked
from d1lit.modules.optimizing import trainable_state
from tests.end_to_end.small import EOS, MASK, VOCABULARY, fit, make_module, sgd

NF4 = LoraSettings("paper", 4, 8, 0.0, quantize="nf4")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def policy_of(dtype: torch.dtype = torch.float32) -> Policy:
    config = tiny_config(VOCABULARY, MASK, EOS, EOS, 64, 2, 2, 128, 100.0, 64, init_std=0.2)
    return Policy(fresh_network(config, seed=3, dtype=dtype))


@needs_package
def test_every_matrix_of_the_blocks_is_packed_and_nothing_else():
    plain = policy_of()
    whole = {name: p.detach().clone() for name, p in plain.network.named_parameters()}
    adapted = add_lora(plain, NF4, seed=0)
    packed = {
        name for name, m in adapted.network.named_modules() if isinstance(m, torch.nn.Linear) and is_quantized(m.weight)
    }
    assert len(packed) == 2 * 7
    assert not is_quantized(adapted.network.head_weight)
    for path, layer in lora_layers(adapted.model):
        weight, exact = base_weight(layer), whole[f"{path}.weight"]
        found = unpacked(weight)
        assert found.shape == exact.shape
        error = float((found - exact).norm() / exact.norm())
        assert 0.03 < error < 0.15, "sixteen values a block of 64"
        bits = 8 * weight.numel() * weight.element_size() / exact.numel()
        assert bits == 4 < BITS_PER_WEIGHT < 4.2
        x = torch.randn(3, exact.shape[1])
        torch.testing.assert_close(layer(x), x @ found.T, rtol=1e-4, atol=1e-4)
    assert report(adapted.model).trainable_parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@needs_package
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_merges_beside_what_it_was_trained_and_comes_back(dtype, tmp_path):
    policy = add_lora(policy_of(dtype), NF4, seed=0)
    fit(make_module(policy, optimizer=partial(sgd, lr=0.5)))
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = policy.eval().hidden(ids).float()
    save_weights(policy, tmp_path / "adapter")
    again = add_lora(policy_of(dtype), NF4, seed=1)
    load_weights(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.eval().hidden(ids).float(), before), (
            "packed again from the same weights it is the same"
        )
    with pytest.raises(ValueError, match=r"merge_for_rollouts: .* four bits"), policy.merged():
        pass
    merged = merge_lora(policy)
    assert not merged.is_adapted and not merged.network.is_loaded_in_4bit
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert all(p.requires_grad for p in merged.parameters())
    with torch.no_grad():
        after = merged.eval().hidden(ids).float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


@needs_package
def test_a_checkpoint_holds_the_adapter_alone():
    module = make_module(add_lora(policy_of(), NF4, seed=0))
    kept = trainable_state(module.policy, module.state_dict())
    assert kept and all("lora_" in name for name in kept)


def plan_of(*words: str):
    data = (
        "task.train_data=builtin",
        "task.test_data=builtin",
        "task.demonstration_data=task",
        "task.num_builtin.train=200",
    )
    (config,) = compose_jobs("train", ["model=llada_8b", "task=gsm8k", "recipe=grpo", *data, *words]).configs
    return plan_run(config)


def test_what_does_not_go_with_four_bits_is_refused():
    nf4 = "scale.grpo.lora.quantize=nf4"
    for strategy in ("fsdp", "fsdp_offload"):
        with pytest.raises(ConfigError, match=r"strategy: fsdp cannot shard .* Try: strategy=ddp"):
            plan_of(nf4, f"strategy={strategy}", "trainer.devices=2", "dry_run=true")
    with pytest.raises(ConfigError, match=r"stages.grpo.module.merge_for_rollouts: .* four bits"):
        plan_of(nf4, "stages.grpo.module.merge_for_rollouts=true", "dry_run=true")
    with pytest.raises(ConfigError, match=r"stages.grpo.lora.quantize: int3 is none of nf4. Try: nf4, or null"):
        plan_of("scale.grpo.lora.quantize=int3", "dry_run=true")


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"stages.grpo.lora.quantize: nf4 needs .* Try: pip install 'd1lit\[gpu\]'"):
        plan_of("scale.grpo.lora.quantize=nf4")
