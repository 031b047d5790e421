"""The network layer: kept positions, cache, head, adapters, reference, merging, loading and export."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d1lit.models import (
    KVCache,
    LoraSettings,
    MaskedDiffusionConfig,
    MaskedDiffusionLM,
    Policy,
    add_lora,
    build_policy,
    export_model,
    load_adapter,
    load_network,
    load_weights,
    merge_lora,
    save_adapter,
    save_weights,
)
from d1lit.models.head import chunked_entropy, chunked_logprobs
from d1lit.models.layouts import to_official_name
from d1lit.models.lora import adapt, lora_layers, merge, report
from d1lit.models.presets import build_on_meta, fresh_network
from d1lit.types import MaskPredictor

TINY = {
    "width": 32, "num_layers": 3, "num_heads": 4, "mlp_width": 48, "rope_theta": 100.0, "max_length": 64,
    "init_std": 0.2,
}  # fmt: skip


def network_of(
    family: str = "llada", dtype: torch.dtype = torch.float32, seed: int = 0, **changes
) -> MaskedDiffusionLM:
    dream = {"shift": True, "qkv_bias": True, "rope_in_fp32": False, "num_key_value_heads": 2}
    settings = {
        "vocab_size": 29, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "rope_theta": 1000.0, "max_position_embeddings": 64, "initializer_range": 0.2,
        "mask_token_id": 28, "eos_token_id": 27, "pad_token_id": 27, "family": family,
    }  # fmt: skip
    config = MaskedDiffusionConfig(**{**settings, **(dream if family == "dream" else {}), **changes})
    network = fresh_network(config, seed, dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return network


def ids_of(rows: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 29, (rows, length), generator=torch.Generator().manual_seed(seed))


def lora_policy(targets: str = "all_linear", dtype: torch.dtype = torch.float32, moved: bool = True) -> Policy:
    policy = add_lora(Policy(network_of(dtype=dtype)), LoraSettings(targets, 4, 8.0, 0.0), seed=1)
    if moved:
        with torch.no_grad():
            for _, layer in lora_layers(policy.model):
                layer.lora_B["default"].weight.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(2))
    return policy


FAMILIES = pytest.mark.parametrize("family", ["llada", "dream"])


# ------------------------------------------------------------------------------------------------------- the network


@FAMILIES
@torch.no_grad()
def test_kept_positions_are_slices_of_the_whole(family: str) -> None:
    policy = Policy(network_of(family))
    ids = ids_of()
    attention = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1)) > 0.2
    keep = torch.tensor([[0, 3, 11], [5, 5, 1], [2, 0, 7]])
    for mask in (None, attention[:, 0], attention):
        whole = policy.hidden(ids, mask)
        kept = policy.hidden(ids, mask, keep=keep)
        torch.testing.assert_close(kept, whole[torch.arange(3)[:, None], keep], atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_dream_predicts_a_position_from_the_row_before_it() -> None:
    network = network_of("dream")
    ids = ids_of()
    rows = network(ids).logits
    ours = Policy(network).head(network.hidden(ids))
    torch.testing.assert_close(ours[:, 1:], rows[:, :-1])
    torch.testing.assert_close(ours[:, 0], rows[:, 0])


@FAMILIES
@torch.no_grad()
def test_every_token_sees_every_token_and_masked_keys_are_not_seen(family: str) -> None:
    policy = Policy(network_of(family))
    ids, changed = ids_of(1), ids_of(1)
    changed[0, 9] = (changed[0, 9] + 1) % 29
    difference = (policy.hidden(ids) - policy.hidden(changed)).abs().amax(-1)[0]
    assert (difference > 1e-6).all()
    hidden = torch.arange(12)[None] != 9
    others = policy.hidden(ids, hidden) - policy.hidden(changed, hidden)
    own_row = 10 if family == "dream" else 9  # Dream's prediction AT 10 comes from the row of 9 itself
    assert not others[0, [i for i in range(12) if i != own_row]].any()


@torch.no_grad()
def test_a_query_that_may_see_nothing_spoils_nobody() -> None:
    policy = Policy(network_of())
    attention = torch.ones(1, 12, 12, dtype=torch.bool)
    attention[:, :4] = False
    attention[:, :, :4] = False
    padded = policy.hidden(ids_of(1), attention)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:, 4:], policy.hidden(ids_of(1), torch.arange(12)[None] >= 4)[:, 4:])


@torch.no_grad()
def test_position_ids_shift_nothing_when_all_move_together() -> None:
    policy = Policy(network_of())
    positions = torch.arange(12).expand(3, -1)
    torch.testing.assert_close(
        policy.hidden(ids_of(), position_ids=positions + 7), policy.hidden(ids_of()), atol=2e-5, rtol=1e-4
    )
    stretched = policy.hidden(ids_of(), position_ids=2 * positions)
    assert (stretched - policy.hidden(ids_of())).abs().max() > 1e-2


def test_gradient_checkpointing_changes_no_gradient() -> None:
    policy = Policy(network_of()).train()

    def gradient() -> list[Tensor]:
        policy.zero_grad()
        policy.hidden(ids_of(), keep=torch.tensor([[1, 4]] * 3)).pow(2).sum().backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    plain = gradient()
    policy.network.gradient_checkpointing_enable({"use_reentrant": False})
    assert policy.network.model.layers[0].gradient_checkpointing
    for ours, theirs in zip(gradient(), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_policy_is_a_mask_predictor() -> None:
    policy, tokenizer = build_policy(None, TINY, "float32", False, None, seed=0)
    assert isinstance(policy, MaskPredictor)
    ids = (policy.mask_token_id, policy.eos_token_id, policy.pad_token_id)
    assert ids == (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert policy.device.type == "cpu"


def test_init_depends_on_the_seed_alone_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (network_of(seed=seed) for seed in (0, 0, 1))
    lora_policy()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    deeper = network_of(num_hidden_layers=5)
    assert torch.equal(deeper.model.embed_tokens.weight, first.model.embed_tokens.weight)
    std = first.model.layers[0].mlp.up_proj.weight.std()
    assert abs(std / 0.2 - 1) < 0.1


def test_llada_8b_has_its_published_shape() -> None:
    shape = {
        "vocab_size": 126464, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "rope_theta": 500000.0,
    }  # fmt: skip
    network = build_on_meta(MaskedDiffusionConfig(**shape))
    assert sum(p.numel() for p in network.parameters()) == 8_015_581_184
    names = {to_official_name(name, "llada") for name, _ in network.named_parameters()}
    assert len(names) == 3 + 32 * 9
    assert {"model.transformer.wte.weight", "model.transformer.ff_out.weight"} <= names
    assert {f"model.transformer.blocks.31.{n}.weight" for n in ("ff_proj", "attn_out", "ff_out", "ff_norm")} <= names
    with torch.device("meta"):
        paper = report(adapt(network, LoraSettings("paper", 128, 64, 0.0), seed=0))
        assert len(paper.modules) == 4 * 32
        # About 168 M at rank 128, against about 336 M for all seven matrices.
        assert paper.trainable_parameters == 128 * 32 * (3 * (4096 + 4096) + 4096 + 12288)


# ---------------------------------------------------------------------------------------------------------- the cache


@FAMILIES
@torch.no_grad()
def test_a_span_without_change_repeats_the_full_forward(family: str) -> None:
    policy, ids = Policy(network_of(family)), ids_of()
    is_real = torch.arange(12).expand(3, -1) >= torch.tensor([[0], [2], [3]])
    cache = KVCache()
    whole = policy.hidden(ids, is_real, cache=cache)
    for start, stop in [(5, 9), (4, 12), (0, 6)]:
        part = policy.hidden(ids[:, start:stop], is_real, cache=cache.at(start, stop))
        torch.testing.assert_close(part, whole[:, start:stop], atol=2e-6, rtol=1e-5)
        keep = torch.tensor([[0, 2]] * 3)
        kept = policy.hidden(ids[:, start:stop], is_real, keep=keep, cache=cache.at(start, stop))
        torch.testing.assert_close(kept, whole[:, start:stop][:, [0, 2]], atol=2e-6, rtol=1e-5)


@FAMILIES
@torch.no_grad()
def test_a_span_sees_its_new_tokens_and_the_old_keys_elsewhere(family: str) -> None:
    """Recomputing everything after the prompt is exact for the span when the prompt's keys are held fixed."""
    network = network_of(family, num_hidden_layers=1)  # keys of one block depend on their own token only
    policy, ids = Policy(network), ids_of()
    cache = KVCache()
    policy.hidden(ids, cache=cache)
    changed = ids.clone()
    changed[:, 5:8] = (changed[:, 5:8] + 3) % 29
    ours = policy.hidden(changed[:, 5:8], cache=cache.at(5, 8))
    torch.testing.assert_close(ours, policy.hidden(changed)[:, 5:8], atol=2e-6, rtol=1e-5)
    after = policy.hidden(changed[:, 8:], cache=cache.at(8, 12))  # the span's keys were overwritten in place
    torch.testing.assert_close(after, policy.hidden(changed)[:, 8:], atol=2e-6, rtol=1e-5)


@FAMILIES
@torch.no_grad()
def test_finished_rows_leave_the_cache(family: str) -> None:
    policy, ids = Policy(network_of(family)), ids_of()
    positions = torch.arange(12).expand(3, -1) + 2
    cache = KVCache()
    whole = policy.hidden(ids, position_ids=positions, cache=cache)
    rows = torch.tensor([2, 0])
    part = policy.hidden(ids[rows, 4:8], cache=cache.select(rows).at(4, 8))
    torch.testing.assert_close(part, whole[rows, 4:8], atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="a span needs a cache that a forward of the whole canvas has filled"):
        KVCache().at(0, 4)


# ----------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_head_equals_log_softmax_with_its_gradients(trainable: bool, rows: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 6, generator=generator, dtype=torch.float64, requires_grad=trainable)
    targets = torch.randint(0, 31, (7, 4), generator=generator)
    targets[0, 1] = targets[0, 0]  # one target twice in a row
    cotangent = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    wanted = [hidden, weight] if trainable else [hidden]
    ours = chunked_logprobs(hidden, weight, targets, temperature, budget=rows * 31 * 8)
    full = (hidden @ weight.T / temperature).log_softmax(-1).gather(1, targets)
    torch.testing.assert_close(ours, full, atol=1e-12, rtol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, cotangent), torch.autograd.grad(full, wanted, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        assert torch.equal(chunked_logprobs(hidden, weight, targets, temperature, rows * 31 * 8), ours)
        logp = (hidden @ weight.T / temperature).log_softmax(-1)
        torch.testing.assert_close(
            chunked_entropy(hidden, weight, temperature, rows * 31 * 8), -(logp.exp() * logp).sum(-1)
        )


def test_head_in_fp32_is_within_a_hundred_thousandth_and_survives_large_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(64, 48, generator=generator), torch.randn(5000, 48, generator=generator)
    targets = torch.randint(0, 5000, (64, 2), generator=generator)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets)
    difference = (chunked_logprobs(hidden, weight, targets).double() - exact).abs().max()
    print(f"fp32 head: largest difference {difference:.1e}")
    assert difference < 1e-5
    assert chunked_logprobs(100 * hidden, weight, targets).isfinite().all()
    with pytest.raises(ValueError, match="temperature: must be positive"):
        chunked_logprobs(hidden, weight, targets, temperature=0.0)


@pytest.mark.parametrize("trainable", [False, True])
def test_head_in_bf16_accumulates_in_fp32(trainable: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(20000, 64, generator=generator).bfloat16().requires_grad_(trainable)
    targets = torch.randint(0, 20000, (9, 1), generator=generator)
    ours = chunked_logprobs(hidden, weight, targets)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = (exact_hidden @ weight.detach().double().T).log_softmax(-1).gather(1, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-6)
    ours.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, atol=0.02, rtol=0.01)  # one rounding to bf16


def test_no_tensor_of_positions_times_vocabulary_is_ever_made() -> None:
    rows, vocab, width = 512, 4096, 8
    hidden = torch.randn(rows, width, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    for trainable in (False, True):
        weight = torch.randn(vocab, width, requires_grad=trainable)
        with Watch():
            chunked_logprobs(
                hidden, weight, torch.zeros(rows, 1, dtype=torch.int64), budget=vocab * 4 * 16
            ).sum().backward()
    assert largest <= max(16 * vocab, vocab * width)


# ------------------------------------------------------------------------------------------- adapters and references


def test_paper_targets_are_the_names_that_exist_in_lladas_tree() -> None:
    summary = report(lora_policy("paper", moved=False).model)
    assert summary.names == ("q_proj", "k_proj", "v_proj", "up_proj")
    assert summary.trainable_parameters == 3 * 4 * (3 * (32 + 32) + 32 + 48)
    assert "12 matrices" in str(summary)
    assert len(report(lora_policy("all_linear").model).modules) == 3 * 7
    with pytest.raises(ValueError, match=r"^lora\.targets: w_proj matches no matrix .*Try: "):
        adapt(network_of(), LoraSettings(["q_proj", "w_proj"], 2, 4, 0.0), seed=0)
    with pytest.raises(ValueError, match=r"^lora\.targets: lm_head matches"):
        adapt(network_of(), LoraSettings(["lm_head"], 2, 4, 0.0), seed=0)


@torch.no_grad()
def test_reference_is_the_base_until_a_copy_is_kept_and_then_moves_only_when_synced() -> None:
    policy, ids = lora_policy(), ids_of()
    base = network_of().hidden(ids)
    trains = [name for name, p in policy.named_parameters() if p.requires_grad]
    with policy.reference():
        torch.testing.assert_close(policy.hidden(ids), base, atol=0, rtol=0)
    assert (policy.hidden(ids) - base).abs().max() > 1e-3
    with pytest.raises(ValueError, match="reference_sync_every"):
        policy.sync_reference()
    policy.keep_reference()
    start = policy.hidden(ids)
    for _, layer in lora_layers(policy.model):
        layer.lora_B["default"].weight.mul_(2.0)
    with policy.reference():
        assert torch.equal(policy.hidden(ids), start)
    policy.sync_reference(1.0)
    with policy.reference():
        assert torch.equal(policy.hidden(ids), policy_after := policy.hidden(ids))
    assert torch.equal(policy.hidden(ids), policy_after)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trains


@torch.no_grad()
def test_a_fully_trained_policy_keeps_a_frozen_copy() -> None:
    policy, ids = Policy(network_of()), ids_of()
    with pytest.raises(ValueError, match=r"loss\.beta"):
        policy.reference()
    policy.keep_reference()
    start = policy.hidden(ids)
    policy.network.lm_head.weight.mul_(3.0)
    policy.network.model.norm.weight.mul_(3.0)
    with policy.reference():
        assert torch.equal(policy.hidden(ids), start)
    policy.sync_reference(0.5)
    with policy.reference():
        torch.testing.assert_close(policy.network.model.norm.weight, torch.full((32,), 2.0))
    policy.sync_reference(1.0)
    with policy.reference():
        assert torch.equal(policy.hidden(ids), 3 * start)


def test_reference_scores_without_dropout_and_policy_trains_with_it() -> None:
    policy = add_lora(Policy(network_of()), LoraSettings("all_linear", 4, 8.0, 0.5), seed=0).train()
    with torch.no_grad():
        for _, layer in lora_layers(policy.model):
            layer.lora_B["default"].weight.fill_(0.1)
    policy.keep_reference()
    with policy.reference():
        assert torch.equal(policy.hidden(ids_of()), policy.hidden(ids_of()))
    assert not torch.equal(policy.hidden(ids_of()), policy.hidden(ids_of()))


@torch.no_grad()
def test_merged_context_restores_every_bit() -> None:
    policy, ids = lora_policy(), ids_of()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    outside = policy.hidden(ids)
    with policy.merged():
        inside = policy.hidden(ids)
    print(f"merged: largest difference {(inside - outside).abs().max():.1e}")
    torch.testing.assert_close(inside, outside, atol=2e-5, rtol=1e-4)
    assert not torch.equal(inside, outside)
    assert torch.equal(policy.hidden(ids), outside)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    with pytest.raises(KeyError), policy.merged():
        raise KeyError
    assert torch.equal(policy.hidden(ids), outside)
    assert policy.merges_exactly and not lora_policy(dtype=torch.bfloat16).merges_exactly


@torch.no_grad()
def test_merging_is_summed_in_fp32_and_its_shift_reported() -> None:
    ids = ids_of()
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        policy = lora_policy(dtype=dtype)
        name, layer = next(iter(lora_layers(policy.model)))
        exact = layer.get_base_layer().weight.double()
        exact += 2.0 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        network, shift = merge(policy.model, ids)
        assert shift is not None and 0 < shift.mean <= shift.largest < bound
        print(f"{dtype}: {shift}")
        torch.testing.assert_close(network.get_submodule(name).weight.double(), exact.to(dtype).double())
        assert not list(lora_layers(network)) and all(p.requires_grad for p in network.parameters())
    plain = Policy(network_of())
    assert merge_lora(plain) is plain


# -------------------------------------------------------------------------------------------------- loading, exporting


@FAMILIES
@pytest.mark.parametrize("layout", ["d1lit", "official"])
def test_round_trip_is_bit_equal(family: str, layout: str, tmp_path: Path) -> None:
    network = network_of(family)
    export_model(network, tmp_path, layout)
    again = load_network(str(tmp_path))
    assert again.config.shift == (family == "dream")
    for (name, a), (_, b) in zip(network.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(again.hidden(ids_of()), network.hidden(ids_of()))
    half = load_network(str(tmp_path), torch.bfloat16)
    assert torch.equal(half.lm_head.weight, network.lm_head.weight.bfloat16())


def test_tied_head_is_saved_once_and_read_back(tmp_path: Path) -> None:
    network = network_of(tie_word_embeddings=True)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    for layout in ("d1lit", "official"):
        export_model(network, tmp_path / layout, layout)
        again = load_network(str(tmp_path / layout))
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(again.hidden(ids_of()), network.hidden(ids_of()))


def test_weights_that_do_not_match_are_named(tmp_path: Path) -> None:
    export_model(network_of(), tmp_path, "official")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    moved = tensors.pop("model.transformer.ln_f.weight")
    save_file({**tensors, "model.transformer.ln_x.weight": moved}, file)
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight; unexpected: model\.transformer\.ln_x\.weight"):
        load_network(str(tmp_path))
    save_file({**tensors, "model.transformer.ln_f.weight": moved[:-1].clone()}, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* has shape \(31,\), but the model has \(32,\)"):
        load_network(str(tmp_path))


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "alibi").mkdir()
    (tmp_path / "alibi" / "config.json").write_text(json.dumps({"model_type": "llada", "alibi": True}))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"model_type": "llada", "n_heads": 4}))
    cases = {
        str(tmp_path / "nowhere"): "there is no folder",
        str(tmp_path / "file"): "is a file",
        str(tmp_path): "holds no config.json",
        str(tmp_path / "bert"): "a model of type 'bert'",
        str(tmp_path / "alibi"): "sets alibi=True; only False is implemented",
        str(tmp_path / "bare"): "lacks 'vocab_size'",
        "nobody/no-such-model": "neither a folder here nor reachable on the hub",
    }
    for path, cause in cases.items():
        with pytest.raises(ValueError, match=r"^model\.path: ") as error:
            load_network(path)
        assert cause in str(error.value) and "\n" not in str(error.value)
    export_model(network_of(), tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        load_network(str(tmp_path / "weightless"))


@pytest.mark.slow
def test_from_pretrained_works_in_a_fresh_process(tmp_path: Path) -> None:
    network = network_of("dream")
    network.save_pretrained(tmp_path / "model")
    torch.save({"ids": ids_of(), "logits": network(ids_of()).logits.detach()}, tmp_path / "expected.pt")
    program = f"""
import torch, d1lit.models
from transformers import AutoModel
expected = torch.load(r"{tmp_path}/expected.pt")
model = AutoModel.from_pretrained(r"{tmp_path}/model")
assert type(model).__name__ == "MaskedDiffusionLM" and model.config.shift
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
model.save_pretrained(r"{tmp_path}/again")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


@FAMILIES
@pytest.mark.parametrize("layout", ["d1lit", "official"])
@pytest.mark.parametrize("targets", ["paper", "all_linear"])
def test_adapter_round_trip(family: str, layout: str, targets: str, tmp_path: Path) -> None:
    policy = add_lora(Policy(network_of(family)), LoraSettings(targets, 4, 8.0, 0.0), seed=1)
    with torch.no_grad():
        for _, layer in lora_layers(policy.model):
            layer.lora_B["default"].weight.uniform_(-0.2, 0.2)
    save_adapter(policy.model, tmp_path, layout)
    again = Policy(load_adapter(network_of(family), str(tmp_path)))
    assert torch.equal(again.hidden(ids_of()), policy.hidden(ids_of()))
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert len(names) == 2 * len(report(policy.model).modules)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if family == "llada" and layout == "official":
        assert "base_model.model.model.transformer.blocks.2.q_proj.lora_A.weight" in names
        if targets == "all_linear":  # by pattern, for LLaDA's head is called ff_out too
            assert config["target_modules"].startswith(r".*\.blocks\.\d+\.(attn_out|ff_out|ff_proj|k_proj")
        else:
            assert sorted(config["target_modules"]) == ["k_proj", "q_proj", "up_proj", "v_proj"]


def test_policy_weights_round_trip_and_misfits_are_refused(tmp_path: Path) -> None:
    adapted = lora_policy()
    save_weights(adapted, tmp_path / "adapter")
    fresh = lora_policy(moved=False)
    load_weights(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.hidden(ids_of()), adapted.hidden(ids_of()))
    plain = Policy(network_of(seed=5))
    save_weights(plain, tmp_path / "model")
    other = Policy(network_of(seed=6))
    load_weights(other, tmp_path / "model")
    assert torch.equal(other.hidden(ids_of()), plain.hidden(ids_of()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]
    with pytest.raises(ValueError, match=r"model\.adapter: the adapter in .* does not fit the model"):
        load_weights(lora_policy("paper"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model\.adapter: .* holds no adapter_config\.json"):
        load_weights(adapted, tmp_path / "model")


def test_built_policy_can_be_saved_and_built_again_from_its_folder(tmp_path: Path) -> None:
    policy, tokenizer = build_policy(None, TINY, "float32", False, None, seed=4)
    save_weights(policy, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lora = LoraSettings("all_linear", 2, 4.0, 0.0)
    again, _ = build_policy(str(tmp_path / "model"), None, "float32", True, lora, seed=4, gradient_checkpointing=True)
    assert again.is_adapted and again.attend_padding
    assert torch.equal(again.hidden(ids_of()), policy.hidden(ids_of()))
    frozen, _ = build_policy(str(tmp_path / "model"), None, "bfloat16", False, None, seed=4, trainable=False)
    assert frozen.dtype == torch.bfloat16 and not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(ValueError, match=r"model\.dtype: .* is not one of"):
        build_policy(None, TINY, "fp32", False, None, seed=0)
    with pytest.raises(ValueError, match=r"^model\.tiny\.num_heads: must divide the width"):
        build_policy(None, {**TINY, "num_heads": 5}, "float32", False, None, seed=0)
