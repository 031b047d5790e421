"""The sampler against stored runs of the published ones: tokens, commit steps and numbers of forwards, exactly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.draws import CounterDraws
from d1lit.models.cache import KVCache
from d1lit.models.loading import load_network
from d1lit.models.policy import Policy
from d1lit.models.transformer import MaskedDiffusionLM
from d1lit.sampling import (
    BlockSampler,
    CommitAll,
    CreditFusion,
    CumulativeEntropyBounded,
    DreamSchedule,
    DualCache,
    EntropyBounded,
    EvenSchedule,
    Factor,
    FixedQuota,
    Gumbel,
    Hierarchical,
    InverseCDF,
    LowestConfidence,
    Margin,
    Negated,
    NegativeEntropy,
    PlackettLuce,
    PredictionChange,
    PrefixCache,
    RandomReveal,
    StableThreshold,
    Threshold,
    TokenProbability,
    Unverified,
    WinoThreshold,
    remdm,
)
from d1lit.sampling.commit import even_quotas
from d1lit.sampling.filters import top_k, top_p
from d1lit.sampling.parts import Cells, Choice, Confidence, Memory, Prediction
from d1lit.sampling.proposal import greedy
from d1lit.types import PromptBatch, Rollout
from tests.golden.reading import d1_entries, d1_model_folder, d1_tensors, entry_id, method_cases, method_tensors
from tests.golden.replay import assert_near

DREAM_CONFIDENCE: dict[str, Confidence] = {
    "origin": TokenProbability(),
    "maskgit_plus": TokenProbability(),
    "topk_margin": Margin(),
    "entropy": NegativeEntropy(),
}


class StoredDraws:
    """Hands out stored uniforms by cell and step within the block; anything else is an error."""

    def __init__(self, **streams: Callable[[Tensor, int], Tensor]) -> None:
        self.streams = streams

    def at(self, *, step: int | None = None, inner: int | None = None) -> StoredDraws:
        return self

    def uniform(
        self, stream: str, rows: Tensor, shape: tuple[int, ...], step: int = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        values = self.streams[stream](rows, step)
        assert values.dtype == dtype and values.shape == (len(rows), *shape)
        return values

    def batch(self, stream: str, shape: tuple[int, ...], step: int = 0) -> Tensor:
        raise AssertionError("a sampler draws by row")


class StoredNetwork:
    """Answers each call with the logits the reference received, after checking that it asks the same question.

    Forwards that the reference ran without fixing anything are skipped by the sampler, and so are passed over here.
    """

    mask_token_id, eos_token_id, pad_token_id = 9, 8, 8

    def __init__(self, tensors: dict[str, Tensor], shift: bool = False) -> None:
        count = len({name.split(".")[0] for name in tensors if name.startswith("call")})
        assert count > 0
        self.ids = [tensors[f"call{k}.input_ids"] for k in range(count)]
        self.logits = [tensors[f"call{k}.logits"] for k in range(count)]
        self.shift = shift
        self.place = -1
        self.answered = 0
        self.layouts: list[Any] = []

    def hidden(
        self,
        ids: Tensor,
        attention: Tensor | None = None,
        position_ids: Tensor | None = None,
        keep: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        self.place += 1
        while not torch.equal(self.ids[self.place], ids):
            self.place += 1
        self.answered += 1
        self.layouts.append((attention, position_ids))
        assert keep is not None
        rows = (keep - 1).clamp(min=0) if self.shift else keep
        logits = self.logits[self.place]
        return logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1]))

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, exclude_mask: bool = False) -> Tensor:
        return (hidden / temperature).log_softmax(-1).gather(-1, targets)

    def reference(self) -> AbstractContextManager[None]:
        return nullcontext()


def sampler(settings: dict[str, Any], **changes: Any) -> BlockSampler:
    """Low-confidence sampling with the lengths of a golden case, and changes."""
    length = settings["gen_length"]
    parts: dict[str, Any] = {
        "completion_length": length,
        "num_steps": settings.get("steps", length),
        "block_length": settings.get("block_length", length),
        "temperature": settings.get("temperature", 0.0),
        "guidance": settings.get("cfg_scale", 0.0),
        "proposal": InverseCDF(),
        "confidence": TokenProbability(),
        "commit": FixedQuota(EvenSchedule()),
        "stop_at_eos": False,
    }
    return BlockSampler(**(parts | changes))


def prompts(ids: Tensor, mask: Tensor | None = None) -> PromptBatch:
    """Prompts of a golden case; without a mask every position is real."""
    mask = torch.ones_like(ids) if mask is None else mask
    return PromptBatch(ids, mask.bool(), torch.arange(len(ids)))


def sequences(rollout: Rollout) -> Tensor:
    return torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)


# ------------------------------------------------------------------------------------------------------ golden/d1


@lru_cache(maxsize=4)
def network(folder: str) -> MaskedDiffusionLM:
    return load_network(folder)


def golden_policy(entry: dict[str, Any], **changes: Any) -> Policy:
    return Policy(network(str(d1_model_folder(entry))), **changes).eval()


@pytest.mark.parametrize("entry", d1_entries("C_generate"), ids=entry_id)
def test_generate(entry: dict[str, Any]) -> None:
    tensors, cases = d1_tensors(entry), entry["settings"]["cases"]
    assert {name.split(".")[0] for name in tensors} == {case["case"] for case in cases}
    for settings in cases:
        case = settings["case"]
        mask = tensors.get(f"{case}.prompt_attention_mask")
        policy = golden_policy(entry, attend_padding=not settings["attention_mask_given_to_model"])
        rollout = sampler(settings)(policy, prompts(tensors[f"{case}.prompt_ids"], mask), 1, CounterDraws(0))
        assert torch.equal(sequences(rollout), tensors[f"{case}.sequences"]), case
        assert torch.equal(rollout.commit_step, tensors[f"{case}.commit_step"].long()), case
        blocks = settings["gen_length"] // settings["block_length"]
        idle = blocks * max(0, settings["steps_per_block"] - settings["block_length"])
        assert rollout.num_forwards == settings["forward_calls"] - idle, case
    print(f"{len(cases)} cases: sequences and commit steps equal")


@pytest.mark.parametrize("entry", d1_entries("C2_sampling_parts"), ids=entry_id)
def test_sampling_parts(entry: dict[str, Any]) -> None:
    tensors = d1_tensors(entry)
    logits = tensors["gumbel.logits"].flatten(0, 1)
    worst = 0.0
    for bits in (32, 64):
        uniforms = tensors[f"gumbel.uniforms_f{bits}"].flatten(0, 1)
        proposal = Gumbel(double=bits == 64)
        for temperature in (0.3, 0.9, 1.0):
            scores = proposal.scores(logits, temperature, uniforms)
            expected = tensors[f"gumbel.T{temperature}.score_f{bits}"].flatten(0, 1)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)
            worst = max(worst, float(((scores - expected) / expected).abs().max()))
            # The vocabulary of this table has no mask token: a column of -inf stands in for it.
            wide = torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], 1)
            noise = torch.cat([uniforms, torch.full_like(uniforms[:, :1], 0.5)], 1)
            choice = proposal.draw(Prediction(wide, wide.softmax(-1), logits.shape[1]), temperature, noise)
            assert torch.equal(choice.tokens, tensors[f"gumbel.T{temperature}.argmax_f{bits}"].flatten())
    for steps in (1, 2, 3, 7, 8, 16, 32):
        quotas = [even_quotas(n, steps) for n in tensors["quota.masked_counts"].tolist()]
        assert torch.equal(torch.tensor(quotas), tensors[f"quota.steps{steps}"])
    for settings in entry["settings"]["cases"]:
        case, length, block = settings["case"], settings["gen_length"], settings["block_length"]
        stored = tensors[f"{case}.uniforms"]
        steps = settings["steps"] // (length // block)

        def replay(cells: Tensor, step: int, stored: Tensor = stored, block: int = block, steps: int = steps) -> Tensor:
            return stored[cells // block * steps + step, cells]

        gumbel = Gumbel(double=stored.dtype == torch.float64)
        drawn = sampler(settings, proposal=gumbel)(
            golden_policy(entry), prompts(tensors[f"{case}.prompt_ids"]), 1, StoredDraws(proposal=replay)
        )
        assert torch.equal(sequences(drawn), tensors[f"{case}.sequences"])
        assert torch.equal(drawn.commit_step, tensors[f"{case}.commit_step"].long())
    print(f"largest relative difference of a Gumbel score: {worst:.1e}")


class Counting(Policy):
    """A policy that notes the length of each forward."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model)
        self.lengths: list[int] = []

    def hidden(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.lengths.append(ids.shape[1])
        return super().hidden(ids, *args, **kwargs)


@pytest.mark.parametrize("entry", d1_entries("H_fast_dllm"), ids=entry_id)
def test_fast_dllm(entry: dict[str, Any]) -> None:
    tensors, cases = d1_tensors(entry), entry["settings"]["cases"]
    caches = {"none": None, "prefix": PrefixCache(KVCache), "dual": DualCache(KVCache)}
    assert {name.rsplit(".", 1)[0] for name in tensors} == {case["case"] for case in cases}
    for settings in cases:
        case = settings["case"]
        commit: Any = FixedQuota(EvenSchedule())
        if settings["threshold"] is not None:
            commit = Threshold(settings["threshold"])
        if settings["factor"] is not None:
            commit = Factor(settings["factor"], fixes_last=True)
        policy = Counting(golden_policy(entry))
        rollout = sampler(settings, commit=commit, cache=caches[settings["cache"]])(
            policy, prompts(tensors[f"{case}.prompt_ids"]), 1, CounterDraws(0)
        )
        assert torch.equal(sequences(rollout), tensors[f"{case}.sequences"]), case
        assert policy.lengths == settings["input_length_of_each_forward"], case
        assert rollout.num_forwards == settings["nfe"], case
        assert rollout.num_tokens_forward == len(rollout.row_ids) * sum(policy.lengths), case
    print(f"{len(cases)} cases: sequences, forwards and their lengths equal")


@pytest.mark.parametrize("entry", d1_entries("B_dream_generate"), ids=entry_id)
def test_dream_generate(entry: dict[str, Any]) -> None:
    tensors, cases = d1_tensors(entry), entry["settings"]["cases"]
    assert {name.split(".")[0] for name in tensors} == {f"case{case['case']}" for case in cases}
    for settings in cases:
        case = f"case{settings['case']}"
        schedule = DreamSchedule(settings["eps"])
        assert list(schedule.quotas(settings["gen_length"], settings["steps"])) == settings["tokens_per_step"]
        rollout = sampler(settings, confidence=DREAM_CONFIDENCE[settings["alg"]], commit=FixedQuota(schedule))(
            golden_policy(entry), prompts(tensors[f"{case}.prompt_ids"]), 1, CounterDraws(0)
        )
        assert torch.equal(sequences(rollout), tensors[f"{case}.sequences"]), case
        assert torch.equal(rollout.commit_step, tensors[f"{case}.commit_step"].long()), case
    print(f"{len(cases)} cases equal")


@pytest.mark.parametrize("entry", d1_entries("E2_rollout"), ids=entry_id)
def test_rollout_of_the_trainer(entry: dict[str, Any]) -> None:
    tensors = d1_tensors(entry)
    for settings in entry["settings"]["cases"]:
        case, group_size = settings["case"], settings["num_generations"]
        ids = tensors[f"{case}.prompt_ids"]
        own = load_network(str(d1_model_folder(entry)))
        own.config.eos_token_id = settings["eos_id_used"]
        for stop in (False, True):
            rollout = sampler(settings, stop_at_eos=stop, rows_per_forward=4)(
                Policy(own), prompts(ids[::group_size]), group_size, CounterDraws(0)
            )
            mask = tensors[f"{case}.completion_mask"].bool()
            assert torch.equal(rollout.prompt_ids, ids)
            assert torch.equal(rollout.completion_mask, mask)
            expected = tensors[f"{case}.completion_ids"]
            assert torch.equal(rollout.completion_ids[mask], expected[mask])
            assert stop or torch.equal(rollout.completion_ids, expected)


# -------------------------------------------------------------------------------------------------- golden/methods


def cells(mask: Tensor, quota: int | None = None) -> Cells:
    """A table of positions as the cells of one step."""
    positions = torch.arange(mask.shape[1]).expand(mask.shape)
    return Cells(torch.arange(len(mask)), positions, mask, mask.shape[1], 0, 1, quota, CounterDraws(0))


def table_scores(logits: Tensor, mask: Tensor, mask_id: int, confidence: Confidence) -> tuple[Choice, Tensor]:
    """Greedy tokens and scores of a table of logits, as the sampler hands them to a commit rule."""
    flat = logits.flatten(0, 1)
    prediction = Prediction(flat, flat.softmax(-1), mask_id)
    choice = greedy(prediction)
    scores = confidence.score(prediction, choice, torch.zeros(len(flat), dtype=torch.int64), None)
    return choice, scores.view(mask.shape).masked_fill(~mask, -torch.inf)


def check_llada(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    network = StoredNetwork(tensors)
    rollout = sampler(case["settings"])(network, prompts(tensors["in.prompt_ids"]), 1, CounterDraws(0))
    assert torch.equal(sequences(rollout), tensors["out.sequences"])
    assert network.answered == len(network.ids)


def check_num_transfer(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    names = [name for name in tensors if name.startswith("out.n_")]
    assert names
    for name in names:
        expected = tensors[name]
        masked = tensors[name.replace("out.n_", "in.mask_")].sum(1).tolist()
        assert torch.equal(torch.tensor([even_quotas(n, expected.shape[1]) for n in masked]), expected)


def check_gumbel(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    logits = tensors["in.logits"]
    wide = torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], 1)
    names = [name for name in tensors if name.startswith("rand.u_")]
    assert names
    for name in names:
        uniforms, label = tensors[name], name.removeprefix("rand.u_")
        temperature = float(label.removeprefix("wino_").removeprefix("T"))
        noise = torch.cat([uniforms, torch.full_like(uniforms[:, :1], 0.5)], 1)
        prediction = Prediction(wide, wide.softmax(-1), logits.shape[1])
        choice = Gumbel(double=True).draw(prediction, temperature, noise)
        assert torch.equal(choice.tokens, tensors[f"out.argmax_{label}"])
        if f"out.noisy_{label}" in tensors:
            scores = Gumbel(double=True).scores(logits, temperature, uniforms)
            torch.testing.assert_close(scores, tensors[f"out.noisy_{label}"], rtol=1e-10, atol=0)


def check_dream(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    settings, prompt = case["settings"], tensors["in.prompt_ids"]
    length = settings["max_length"] - prompt.shape[1]
    commit: Any = FixedQuota(DreamSchedule(settings["eps"]))
    confidence = DREAM_CONFIDENCE[settings["alg"]]
    order = torch.full((settings["steps"], len(prompt), length), 0.5)
    for step in range(settings["steps"]):
        masked = tensors[f"call{step}.input_ids"][:, prompt.shape[1] :] == 9
        if settings["alg"] == "origin":
            order[step][masked] = tensors[f"rand.{step}_rand"]
        if settings["alg_temp"] is not None:
            # The stored draw is the order itself; keys that follow it hand it to the rule.
            drawn = tensors[f"rand.{step}_multinomial"] - prompt.shape[1]
            order[step] = 1e-30
            order[step].scatter_(1, drawn, 1 - 2.0**-23 * 4 ** torch.arange(drawn.shape[1])[None].expand(drawn.shape))
    if settings["alg"] == "origin":
        commit = RandomReveal(settings["eps"])
    if settings["alg_temp"] is not None:
        confidence = PlackettLuce(confidence, settings["alg_temp"])
    draws = StoredDraws(order=lambda flat, step: order[step].flatten()[flat])
    made = sampler(
        {"gen_length": length, "steps": settings["steps"]}, commit=commit, confidence=confidence, record_trace=True
    )(StoredNetwork(tensors, shift=True), prompts(prompt), 1, draws)
    assert torch.equal(sequences(made), tensors["out.sequences"])
    assert made.trace is not None
    assert torch.equal(made.trace, tensors["out.history"][: len(made.trace), :, prompt.shape[1] :])
    assert torch.equal(made.trace[-1], tensors["out.history"][-1, :, prompt.shape[1] :])


def check_dream_confidence(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    logits = tensors["in.logits"]
    prediction = Prediction(logits, logits.softmax(-1), 0)
    choice = Choice(tensors["out.argmax"], torch.zeros(len(logits)))
    none = torch.zeros(len(logits), dtype=torch.int64)
    assert torch.equal(logits.argmax(-1), tensors["out.argmax"])
    for name, confidence in (("max", TokenProbability()), ("margin", Margin()), ("neg_entropy", NegativeEntropy())):
        scores = confidence.score(prediction, choice, none, None)
        torch.testing.assert_close(scores, tensors[f"out.conf_{name}"], rtol=1e-5, atol=1e-6)
    filters = [name for name in tensors if name.startswith("out.kept_top_")]
    assert filters
    for name in filters:
        kind, value = name.removeprefix("out.kept_top_")[0], name.removeprefix("out.kept_top_")[1:]
        kept = top_p(logits.softmax(-1), float(value)) if kind == "p" else top_k(logits.softmax(-1), int(value))
        assert torch.equal(kept, tensors[name].bool()), name


def check_threshold_table(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    mask = tensors["in.mask"]
    choice, scores = table_scores(tensors["in.logits"], mask, 12, TokenProbability())
    assert torch.equal(torch.where(mask, choice.tokens.view(mask.shape), tensors["in.x"]), tensors["out.x0"])
    for threshold in case["settings"]["thresholds"]:
        selected = Threshold(threshold).select(scores, cells(mask))
        assert torch.equal(selected, tensors[f"out.transfer_thr{threshold}"])
    for row, quota in enumerate((1, 2, 3)):
        selected = FixedQuota(EvenSchedule()).select(scores[row : row + 1], cells(mask[row : row + 1], quota))
        assert torch.equal(selected[0], tensors["out.transfer_k123"][row])


def check_fastdllm(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    settings = case["settings"]
    rollout = sampler(settings, commit=Threshold(settings["threshold"]))(
        StoredNetwork(tensors), prompts(tensors["in.prompt_ids"]), 1, CounterDraws(0)
    )
    assert torch.equal(sequences(rollout), tensors["out.sequences"])
    assert rollout.num_forwards == int(tensors["out.nfe"])


def check_mdpo_plain(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    confidence = {"low_confidence": TokenProbability(), "topk_margin": Margin()}[case["settings"]["conf_alg"]]
    made = sampler(case["settings"], confidence=confidence, record_predictions=True)(
        StoredNetwork(tensors), prompts(tensors["in.prompt_ids"]), 1, CounterDraws(0)
    )
    _check_mdpo_steps(case, tensors, made)


def _check_mdpo_steps(case: dict[str, Any], tensors: dict[str, Tensor], made: Rollout) -> None:
    """The canvas each step found, the whole of what it predicted there, and how sure it was."""
    assert torch.equal(made.completion_ids, tensors["out.completion"])
    assert made.trace is not None
    assert torch.equal(made.trace[:-1, 0], tensors["out.step_inputs"][1:])
    steps, hidden = made.steps, tensors["out.step_inputs"] == case["settings"]["mask_id"]
    assert torch.equal(steps.masked[:, 0], hidden)
    assert torch.equal(steps.clean[:, 0], tensors["out.step_predictions"])
    if case["name"] == "mdpo_sampler_rcr_entropy":
        return  # there the code weighs a token by minus an entropy
    logits = torch.stack([tensors[f"call{k}.logits"][0, -hidden.shape[1] :] for k in range(len(hidden))])
    of_mask = logits.softmax(-1)[..., case["settings"]["mask_id"]]  # which takes its share of the softmax there
    assert_near(
        "confidence", (steps.logprobs[:, 0].exp() * (1 - of_mask))[hidden], tensors["out.step_confidence"][hidden]
    )


def check_klass_baseline(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The quota baselines of the repository; block length 8 (see the case's meaning)."""
    confidence = {
        "default": TokenProbability(),
        "topk_margin": Margin(),
        "entropy": Negated(NegativeEntropy()),  # the LEAST certain token first, against the code's own comment
    }[case["settings"]["alg"]]
    network = StoredNetwork(tensors)
    made = sampler(case["settings"], confidence=confidence)(
        network, prompts(tensors["in.prompt_ids"]), 1, CounterDraws(0)
    )
    assert torch.equal(sequences(made), tensors["out.sequences"])
    assert made.num_forwards == int(tensors["out.used_steps"])


def check_rcr(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    confidence = {"low_confidence": TokenProbability(), "entropy": NegativeEntropy()}[case["settings"]["conf_alg"]]
    network = StoredNetwork(tensors)
    made = sampler(
        case["settings"],
        confidence=confidence,
        commit=CommitAll(),
        remask=LowestConfidence(EvenSchedule()),
        record_predictions=True,
    )(network, prompts(tensors["in.prompt_ids"]), 1, CounterDraws(0))
    _check_mdpo_steps(case, tensors, made)
    assert network.answered == len(network.ids)


def check_wino(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    settings, network = case["settings"], StoredNetwork(tensors)
    made = sampler(
        settings,
        commit=WinoThreshold(settings["threshold_wino"], share=0.7, least=5, most=20),
        remask=Unverified(settings["threshold_wino_back"]),
    )(network, prompts(tensors["in.prompt_ids"]), 1, CounterDraws(0))
    assert torch.equal(sequences(made), tensors["out.sequences"])
    assert network.answered == int(tensors["out.num_calls"]) == len(network.ids)
    for call, (attention, position_ids) in enumerate(network.layouts):
        assert torch.equal(attention[0], tensors[f"call{call}.attention_mask"])
        assert torch.equal(position_ids[0], tensors[f"call{call}.position_ids"])


def check_klass(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    settings, network = case["settings"], StoredNetwork(tensors)
    block = 8 if settings["kl_history_length"] == 2 else 4
    made = sampler(
        {**settings, "block_length": block},
        commit=StableThreshold(
            settings["conf_threshold"], settings["kl_threshold"], settings["unmask_strategy"] == "min_kl"
        ),
        memory=PredictionChange(settings["kl_history_length"], looks_ahead=True),
    )(network, prompts(tensors["in.prompt_ids"]), 1, CounterDraws(0))
    assert torch.equal(sequences(made), tensors["out.sequences"])
    assert made.num_forwards == int(tensors["out.used_steps"]) == network.answered


def check_credit(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    settings = case["settings"]
    fusion = CreditFusion(settings["credit_alpha"], settings["boost_gamma"], settings["decay_beta"])
    shape = tensors["in.logits0"].shape
    memory = Memory(shape[1], {name: torch.zeros(*shape[:2], *tail) for name, tail in fusion.shapes(shape[2]).items()})
    steps = sum(name.startswith("in.logits") for name in tensors)
    assert steps == 3
    for step in range(steps):
        table = replace(cells(tensors[f"in.mask{step}"]), index=torch.arange(shape[0]), memory=memory)
        fused = fusion(tensors[f"in.logits{step}"], table)
        torch.testing.assert_close(fused, tensors[f"out.fused{step}"], rtol=1e-5, atol=1e-6)


REMDM_SIGMA: dict[str, Any] = {
    "forward-backward": remdm.forward_backward,
    "remdm-conf": remdm.by_confidence,
}


def check_remdm(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The posterior from reveal and remask probabilities, and the state it leads to under the stored uniforms."""
    settings, name, mask_id = case["settings"], case["settings"]["sampler"], case["settings"]["mask_id"]
    loop = remdm.Loop(settings["t_on"], settings["t_off"], settings["alpha_on"]) if name == "remdm-loop" else None
    rescaled = partial(remdm.rescaled, eta=settings.get("eta", 0.0))
    sigma_of = {"remdm-rescale": rescaled, **REMDM_SIGMA}.get(name, partial(remdm.capped, eta=settings.get("eta", 0.0)))
    steps = sum(key.startswith("in.t") for key in tensors)
    assert steps == 5
    for k in range(steps):
        t, s = float(tensors[f"in.t{k}"]), float(tensors[f"in.t{k}"] - tensors[f"in.dt{k}"])
        x, proposal = tensors[f"in.x{k}"], tensors[f"in.p_x0_{k}"]
        masked, gives_back = x == mask_id, name != "mdlm"
        alpha_t, alpha_s = 1 - t, 1 - s
        if loop is not None:
            gives_back = loop.t_off < t <= loop.t_on
            alpha_t, alpha_s = loop.alpha(t), loop.alpha_on if gives_back else loop.alpha(s)
        confidence = -tensors[f"in.conf{k}"] if name == "remdm-conf" else torch.zeros(x.shape)
        sigma = torch.as_tensor(sigma_of(alpha_t, alpha_s, confidence) if gives_back else 0.0).expand(x.shape)
        hidden_sigma = float(sigma_of(alpha_t, alpha_s, None)) if gives_back else 0.0
        reveal = remdm.reveal_probability(alpha_t, alpha_s, hidden_sigma)
        nothing = torch.nn.functional.one_hot(torch.tensor(mask_id), settings["V"])
        shown = torch.nn.functional.one_hot(x, settings["V"]).float()
        if "nucleus_p" in settings:
            kept = top_p(proposal.flatten(0, 1), settings["nucleus_p"], keep_crossing=False).view_as(proposal)
            proposal = torch.where(kept, proposal, 0.0) / torch.where(kept, proposal, 0.0).sum(-1, keepdim=True)
        posterior = torch.where(
            masked[..., None],
            reveal * proposal + (1 - reveal) * nothing,
            (1 - sigma[..., None]) * shown + sigma[..., None] * nothing,
        )
        expected = tensors[f"out.q_xs{k}"]
        if name == "mdlm" or (
            loop is not None and not gives_back
        ):  # unnormalised there, and of no use where one stands
            expected = torch.where(masked[..., None], expected / expected.sum(-1, keepdim=True), posterior)
        torch.testing.assert_close(posterior, expected, rtol=1e-5, atol=1e-6)
        gumbel = 1e-10 - (tensors[f"rand.u{k}"].double() + 1e-10).log()
        following = (posterior.double() / gumbel).argmax(-1)
        assert torch.equal(following, tensors[f"out.x_next{k}"])


def check_dinfer(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Not built: the rule with re-masking (out.remask_*) and the one for its cache (out.cache_*)."""
    mask = tensors["in.mask"]
    _, scores = table_scores(tensors["in.logits"], mask, 12, TokenProbability())
    checked = 0
    for name, expected in tensors.items():
        rule, _, setting = name.removeprefix("out.").removesuffix("_transfer").partition("_")
        commit: Any = None
        if rule.startswith("threshold"):
            commit = Threshold(float(rule.removeprefix("threshold")))
        elif rule.startswith("factor"):
            commit = Factor(float(rule.removeprefix("factor")), fixes_last=True)
        elif rule.startswith("hier"):
            high, low = (part.removeprefix("thr").removeprefix("low") for part in setting.split("_"))
            commit = Hierarchical(None if high == "None" else float(high), 0.0 if low == "None" else float(low))
        if commit is not None:
            assert torch.equal(commit.select(scores, cells(mask)), expected), name
            checked += 1
    assert checked == 13


def check_entropy_bounded(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    mask = tensors["in.mask"]
    _, scores = table_scores(tensors["in.logits"], mask, tensors["in.logits"].shape[-1] - 1, NegativeEntropy())
    torch.testing.assert_close(-scores[mask], tensors["out.entropy"][mask], rtol=1e-5, atol=1e-6)
    gammas = [float(name.removeprefix("out.transfer_gamma")) for name in tensors if "out.transfer_gamma" in name]
    assert gammas
    for gamma in gammas:
        paper = EntropyBounded(gamma).select(scores, cells(mask))
        code = CumulativeEntropyBounded(gamma).select(scores, cells(mask))
        assert torch.equal(paper, tensors[f"def.transfer_paper_gamma{gamma}"])
        assert torch.equal(code, tensors[f"out.transfer_gamma{gamma}"])


CHECKS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], None]] = {
    "dream_confidence_and_filters": check_dream_confidence,
    "dream_": check_dream,
    "llada_lowconf": check_llada,
    "llada_num_transfer": check_num_transfer,
    "gumbel_max_float64": check_gumbel,
    "fastdllm_threshold": check_threshold_table,
    "fastdllm_generate": check_fastdllm,
    "entropy_bounded": check_entropy_bounded,
    "dinfer_selection_rules": check_dinfer,
    "mdpo_sampler_plain": check_mdpo_plain,
    "klass_default": check_klass_baseline,
    "klass_topk_margin": check_klass_baseline,
    "klass_entropy": check_klass_baseline,
    "klass_klass": check_klass,
    "mdpo_sampler_rcr": check_rcr,
    "wino_": check_wino,
    "remdm_": check_remdm,
    "dinfer_credit_fusion": check_credit,
}
"""By the beginning of the case's name; the first that fits."""


@pytest.mark.parametrize("case", method_cases("4_samplers"), ids=entry_id)
def test_methods(case: dict[str, Any]) -> None:
    name = case["name"]
    check = next(check for beginning, check in CHECKS.items() if name.startswith(beginning))
    for seed in case["seeds"]:
        check(case, method_tensors(case, seed))
