"""d1's supervised collator and loss: times, masks, loss and gradients, case by case from the manifest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.losses.supervised import MaskedCrossEntropy, per_target_token
from d1lit.masking import BernoulliMask, GridTimes, UniformTimes, apply_mask
from d1lit.models import Policy, load_network
from d1lit.models.layouts import to_official_name
from d1lit.schedules import LinearSchedule
from tests.golden.reading import d1_entries, d1_model_folder, d1_tensors, needs_golden
from tests.golden.replay import ReplayDraws, assert_near

EPS = 1e-3
CASES = [
    (entry, name)
    for entry in d1_entries("F_sft_loss")
    for name in sorted({key.split(".")[0] for key in entry["tensors"]})
]


def _mask_token(t: dict[str, torch.Tensor]) -> int:
    """The id that stands in the noised row where the clean one had another."""
    changed = t["noisy_ids"] != t["ids"]
    return int(t["noisy_ids"][changed][0]) if bool(changed.any()) else -1


@needs_golden
@pytest.mark.parametrize(("entry", "name"), CASES, ids=[f"{name}-seed{entry['seed']}" for entry, name in CASES])
def test_supervised_loss_equals_d1(entry: dict[str, Any], name: str) -> None:
    tensors = d1_tensors(entry)
    t = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    if "ids" not in t:
        _check_grid(name, t)
        return
    ids = t["ids"]
    rows = torch.arange(len(ids))
    times = UniformTimes(EPS)(ReplayDraws({"time": t["t_before_eps"]}), rows, rows, len(ids))
    assert_near("t", times, t["t"])
    is_target = torch.ones_like(ids, dtype=torch.bool)
    if "prompt_lengths" in t:
        is_target = torch.arange(ids.shape[1]) >= t["prompt_lengths"][:, None]
    schedule = LinearSchedule()
    hidden = BernoulliMask()(ReplayDraws({"mask": t["uniforms"]}), rows, schedule.mask_prob(times), is_target)
    assert torch.equal(hidden, t["mask_before_prompt_restore"] & is_target)
    assert torch.equal(apply_mask(ids, hidden, _mask_token(t)), t["noisy_ids"])
    assert torch.equal(hidden, t["labels"] != -100)
    if "logits" not in t:
        _check_network(entry, name, t, hidden, is_target, schedule.weight(times))
        return
    logits = t["logits"].clone().requires_grad_()
    nll = -torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    loss = MaskedCrossEntropy(per_target_token)(
        nll, schedule.weight(times), hidden, is_target, int(is_target.sum()), len(ids)
    )
    assert_near(f"{name} loss", loss, t["loss"].reshape(()))
    loss.backward()
    assert logits.grad is not None
    assert_near(f"{name} gradient", logits.grad, t["grad_logits"])


def _check_grid(name: str, t: dict[str, torch.Tensor]) -> None:
    for key, grid in t.items():
        rows = torch.arange(len(grid))
        got = GridTimes(EPS if key == "t" else 0.0)(ReplayDraws({}), rows, rows, len(grid))
        assert_near(f"{name} {key}", got, grid)


def _check_network(
    entry: dict[str, Any], name: str, t: dict[str, torch.Tensor], hidden: Tensor, is_target: Tensor, weight: Tensor
) -> None:
    (case,) = [c for c in entry["settings"]["cases"] if c["case"] == name]
    network = load_network(str(d1_model_folder(entry, "llada_tiny")))
    policy = Policy(network)
    states = policy.hidden(t["noisy_ids"])
    picked = policy.logprobs(states[hidden], t["ids"][hidden][:, None])[:, 0]
    nll = torch.zeros(hidden.shape).masked_scatter(hidden, -picked)
    loss = MaskedCrossEntropy(per_target_token)(nll, weight, hidden, is_target, int(is_target.sum()), len(hidden))
    assert_near(f"{name} loss", loss, t["loss"].reshape(()), **entry["tolerance"])
    loss.backward()
    ours = {to_official_name(n, network.config.family): p.grad for n, p in network.named_parameters()}
    for key in (k for k in t if k.startswith("grad.")):
        grad = ours[key.removeprefix("grad.")]
        assert grad is not None
        assert_near(f"{name} {key}", grad, t[key], **entry["tolerance"])
    norms = torch.stack([torch.zeros(()) if (g := ours[n]) is None else g.norm() for n in case["grad_norm_order"]])
    assert_near(f"{name} gradient norms", norms, t["grad_norms"], rtol=1e-4, atol=1e-5)
