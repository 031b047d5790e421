"""The native transformer equals the official code of LLaDA and Dream on stored random models."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d1lit.models import Policy, export_model, load_network
from tests.golden.reading import d1_entries, d1_model_folder, d1_tensors, entry_id, needs_golden

pytestmark = needs_golden
LLADA = [*d1_entries("A_llada_tiny_logits"), *d1_entries("A_llada_tiny_gqa_logits")]
DREAM = d1_entries("B_dream_tiny_logits")


def close(name: str, ours: torch.Tensor, theirs: torch.Tensor, entry: dict[str, Any]) -> None:
    print(f"{entry_id(entry)} {name}: largest difference {(ours - theirs).abs().max():.2e}")
    torch.testing.assert_close(ours, theirs, **entry["tolerance"])


@pytest.mark.parametrize("entry", LLADA, ids=entry_id)
@torch.no_grad()
def test_llada_logits(entry: dict[str, Any]) -> None:
    golden, policy = d1_tensors(entry), Policy(load_network(str(d1_model_folder(entry))))
    close("logits", policy.head(policy.hidden(golden["ids"])), golden["logits"], entry)
    is_real = golden["attention_mask"].bool()
    masked = policy.head(policy.hidden(golden["ids"], is_real))
    close("first 16, masked", masked[..., :16][is_real], golden["logits_attn_mask_first_16"][is_real], entry)
    close("logsumexp, masked", masked.logsumexp(-1)[is_real], golden["logsumexp_attn_mask"][is_real], entry)
    assert torch.equal(policy.head(policy.hidden(golden["ids"])).argmax(-1), golden["argmax"])


@pytest.mark.parametrize("entry", LLADA, ids=entry_id)
@torch.no_grad()
def test_attended_padding_ignores_the_key_mask(entry: dict[str, Any]) -> None:
    golden, network = d1_tensors(entry), load_network(str(d1_model_folder(entry)))
    policy = Policy(network, attend_padding=True)
    logits = policy.head(policy.hidden(golden["ids"], golden["attention_mask"].bool()))
    close("pads attended", logits, golden["logits"], entry)


@pytest.mark.parametrize("entry", DREAM, ids=entry_id)
@torch.no_grad()
def test_dream_logits_and_shift(entry: dict[str, Any]) -> None:
    golden, network = d1_tensors(entry), load_network(str(d1_model_folder(entry)))
    policy = Policy(network)
    close("logits", network(golden["ids"]).logits, golden["logits"], entry)
    hidden = policy.hidden(golden["ids"]).flatten(0, 1)
    logprobs = policy.logprobs(hidden, golden["targets"].flatten()[:, None]).view(golden["targets"].shape)
    close("shifted log-probs", logprobs, golden["shifted_target_logp"], entry)
    is_real = golden["padded_attention_mask"].bool()
    for attention in (is_real, is_real[:, :, None] & is_real[:, None]):
        logits = network.lm_head(network._rows(golden["padded_ids"], attention, golden["padded_position_ids"]))
        close("padded", logits[..., :16][is_real], golden["padded_logits_first_16"][is_real], entry)


@pytest.mark.parametrize("entry", [*LLADA, *DREAM], ids=entry_id)
def test_official_export_is_the_same_file(entry: dict[str, Any], tmp_path) -> None:
    source = d1_model_folder(entry)
    network = load_network(str(source))
    export_model(network, tmp_path / "official", "official", max_shard_size="40KB")
    assert (tmp_path / "official" / "model.safetensors.index.json").is_file()
    written: dict[str, torch.Tensor] = {}
    for shard in (tmp_path / "official").glob("*.safetensors"):
        written |= load_file(shard)
    original = load_file(source / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)
    export_model(load_network(str(tmp_path / "official")), tmp_path / "ours")
    ours = load_network(str(tmp_path / "ours"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), network.parameters(), strict=True))
