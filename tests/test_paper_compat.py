"""d1's accidents: each by its own option, all of them by paper_compat=true; and what each of them does."""

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import judged_text
from d1lit.data import InnerUpdate
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.losses.clipped import ClippedPolicyLoss
from d1lit.losses.terms import k3, token_mean
from d1lit.models import LoraSettings, add_lora, build_tiny_tokenizer
from d1lit.models.lora import factors, lora_layers
from d1lit.modules import DiffuGRPO
from d1lit.sampling import HalfGumbel, HalfTokenProbability
from d1lit.sampling.parts import Choice, Prediction
from d1lit.tasks import encode_prompts
from d1lit.types import Context, Rollout
from tests.end_to_end.small import EOS, MASK, fit, make_module, sampler, small_policy

QUIRKS = {
    "quirks.inner_index_by_micro_batch": True,
    "quirks.dropout_everywhere": True,
    "quirks.reward_after_end": True,
    "quirks.lora_dropout": 0.05,
    "model.attend_padding": True,
    "estimator.mask_padding": True,
    "loss.aggregate._target_": "d1lit.losses.terms.micro_batch_token_mean",
    "reward.parts.correctness._target_": "d1lit.rewards.d1_gsm8k.D1Gsm8kCorrectness",
    "sampler.proposal._target_": "d1lit.sampling.HalfGumbel",
    "sampler.confidence._target_": "d1lit.sampling.HalfTokenProbability",
    "sampler.stop_at_eos": False,
    "task.grader": "d1",
    "task.overlong": "cut_left",
    "task.max_prompt_length": 200,
    "scale.grpo.lora.dropout": 0.05,
}
"""Every option that paper_compat=true switches on, as docs/paper-compat.md lists them."""
DATA = (
    "task.train_data=builtin",
    "task.test_data=builtin",
    "task.demonstration_data=task",
    "task.num_builtin.train=200",
)
PAPER = ("model=llada_8b", "task=gsm8k", *DATA)


def config_of(*words: str):
    (config,) = compose_jobs("train", words).configs
    return config


def test_paper_compat_switches_every_quirk_on_and_nothing_is_on_without_it():
    compat, plain = config_of("paper_compat=true", *PAPER), config_of(*PAPER)
    for key, value in QUIRKS.items():
        assert OmegaConf.select(compat, key) == value, key
        assert OmegaConf.select(plain, key) != value, key
    plan = plan_run(compat)
    assert plan.stages[1].lora.dropout == 0.05
    assert plan.stages[1].module.keywords["inner_index_by_micro_batch"]
    assert plan.stages[1].module.keywords["dropout_everywhere"]


def test_one_quirk_can_be_left_out_or_taken_alone():
    without = config_of("paper_compat=True", "quirks.dropout_everywhere=false", "sampler=low_confidence", *PAPER)
    assert not without.quirks.dropout_everywhere and without.quirks.reward_after_end
    assert without.sampler.proposal._target_ == "d1lit.sampling.InverseCDF"
    alone = config_of("quirks.reward_after_end=true", *PAPER)
    assert alone.quirks.reward_after_end and not alone.quirks.dropout_everywhere and not alone.paper_compat


def test_every_quirk_stands_on_the_page():
    from d1lit.app.composing import CONF

    page = (CONF.parent / "docs" / "paper-compat.md").read_text(encoding="utf-8")
    for key in QUIRKS:
        if not key.startswith(("reward.parts", "sampler.", "loss.", "scale.")):
            assert f"`{key}" in page or f"`+{key}" in page, key


def test_a_recipe_that_is_not_d1s_is_refused():
    with pytest.raises(ConfigError, match=r"paper_compat: the recipe espo .* Try: recipe=d1"):
        plan_run(config_of("paper_compat=true", "recipe=espo"))


# ------------------------------------------------------------------------------------------------------ which mask


def test_the_counter_of_micro_batches_shows_half_of_the_masks_twice():
    """Two micro-batches and twelve inner updates, as d1 ran: what its code was seen to do."""
    module = make_module(small_policy(), num_inner_updates=12, inner_index_by_micro_batch=True)
    seen = [[module.mask_index(InnerUpdate(0, i, micro, 2, None)) for i in range(12)] for micro in (0, 1)]
    assert seen == [[1, 3, 5, 7, 9, 11] * 2, [2, 4, 6, 8, 10, 0] * 2]
    right = make_module(small_policy(), num_inner_updates=12)
    assert [right.mask_index(InnerUpdate(0, i, 1, 2, None)) for i in range(12)] == list(range(12))


class Watched(DiffuGRPO):
    """Notes which masks were used, and how far the first ratios are from one."""

    def update(self, experience, inner, num_micro):
        self.seen.append((inner, experience.old[inner] is not None))
        return super().update(experience, inner, num_micro)


def test_a_stage_with_the_wrong_index_trains_with_old_logprobs_of_that_mask():
    module = make_module(small_policy(), Watched, num_inner_updates=2, num_updates=2, inner_index_by_micro_batch=True)
    module.seen = []
    fit(module, num_micro=2)
    assert module.seen == [(1, True), (0, True), (1, True), (0, True)]


# ---------------------------------------------------------------------------------------------------------- padding


def padded_rollout() -> Rollout:
    ids = torch.tensor([[EOS, EOS, 3, 4], [5, 6, 7, 8]])
    tokens, numbers = torch.full((2, 3), 9), torch.zeros(2, 3)
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    return Rollout(ids, ids != EOS, tokens, everywhere, torch.arange(2), 1, tokens, numbers, numbers, numbers)


def test_attended_pads_change_what_a_padded_row_predicts():
    policy = small_policy()
    ids, attention = torch.tensor([[EOS, EOS, 3, 4, MASK]]), torch.tensor([[False, False, True, True, True]])
    hidden, seen = policy.hidden(ids, attention), policy.hidden(ids)
    policy.attend_padding = True
    assert torch.equal(policy.hidden(ids, attention), seen)
    assert not torch.allclose(hidden, seen, atol=1e-3)


def test_padding_is_masked_like_any_token():
    def masked(mask_padding):
        context = Context(padded_rollout(), torch.zeros(2), 0, 1, MASK, CounterDraws(0))
        return OneStepEstimator(1.0, 1, False, mask_padding=mask_padding).corrupt(context).noised_ids[:, :4] == MASK

    assert masked(True).all()
    assert masked(False).tolist() == [[False, False, True, True], [True] * 4]


# ---------------------------------------------------------------------------------------------------------- dropout


def dropout_module(dropout_everywhere: bool) -> DiffuGRPO:
    policy = add_lora(small_policy(), LoraSettings("all_linear", 4, 16, 0.5), seed=0)
    with torch.no_grad():
        for _, layer in lora_layers(policy.model):
            factors(layer, "default")[1].normal_(generator=torch.Generator().manual_seed(1))
    loss = ClippedPolicyLoss(0.5, 0.5, 0.04, k3, token_mean)
    return make_module(
        policy, Remembering, loss=loss, sampler=sampler(temperature=0.0), dropout_everywhere=dropout_everywhere
    )


class Remembering(DiffuGRPO):
    """Keeps the first rollout with its old and reference log-probs."""

    first = None

    def collect(self, prompts, step, num_micro, reserves=()):
        experience = super().collect(prompts, step, num_micro, reserves)
        self.first = self.first or experience[0]
        return experience


def test_dropout_is_on_in_rollouts_and_old_logprobs_and_off_in_the_reference():
    found = {}
    for everywhere in (False, True):
        module = dropout_module(everywhere)
        fit(module)
        found[everywhere] = module.first
        assert not module.policy.keeps_dropout
    exact, noisy = found[False], found[True]
    groups = exact.rollout.completion_ids.view(-1, 3, 8)
    assert torch.equal(groups, groups[:, :1].expand_as(groups)), "greedy rollouts of a prompt are one"
    assert not torch.equal(noisy.rollout.completion_ids, exact.rollout.completion_ids)
    # The same tokens scored again: dropout moves the old log-probs and not those of the reference.
    again = dropout_module(True)
    again.trainer = type("Trainer", (), {"world_size": 1})()
    again.train()
    torch.manual_seed(0)
    (rescored,) = again._freeze(exact.rollout, exact.rewards, exact.advantages, exact.step, 1)
    torch.testing.assert_close(rescored.ref[1].value, exact.ref[1].value)
    assert not torch.allclose(rescored.old[1].value, exact.old[1].value, atol=1e-3)


# ---------------------------------------------------------------------------------------------- rewards and prompts


def test_rewards_read_what_stands_behind_the_end():
    tokenizer = build_tiny_tokenizer()
    task = plan_run(config_of("task=sudoku", "recipe=sft", "task.num_builtin.train=64", "task.val_rows=0")).task
    text = "<answer>1234</answer>"
    ids = [*tokenizer("no", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([*ids, *tokenizer(text, add_special_tokens=False).input_ids])
    end = int(tokenizer.eos_token_id)
    assert text in judged_text(task, tokenizer, None, ids)
    assert text not in judged_text(task, tokenizer, end, ids)
    assert judged_text(task, tokenizer, None, ids).endswith("no" + text), "special tokens are left out"


def test_a_long_training_prompt_loses_its_head():
    tokenizer = build_tiny_tokenizer()
    task = plan_run(config_of("task=sudoku", "recipe=sft", "task.num_builtin.train=64", "task.val_rows=0")).task
    rows = task.rows("train")[:3]
    (whole, *_), _, _ = encode_prompts(rows, task.template, tokenizer, 1000, "error")
    cut, kept, dropped = encode_prompts(rows, task.template, tokenizer, 7, "cut_left")
    assert cut[0] == whole[-7:]
    assert (len(kept), dropped) == (3, 0)


# ------------------------------------------------------------------------------------------------------- bfloat16 noise


def test_half_gumbel_longhand_and_its_two_ends():
    """Every key is one of d1's formula in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(64, 11, generator=generator) * 2, torch.rand(64, 11, generator=generator)
    choice = HalfGumbel().draw(Prediction(logits, logits.softmax(-1), 10), 0.9, uniforms)
    u = ((uniforms * 256).floor() / 256).bfloat16()
    scores = logits.bfloat16() - ((-u.log()) ** 0.9).log()
    assert torch.equal(choice.tokens, scores[:, :10].float().argmax(-1))
    exact = torch.log_softmax(logits[:, :10] / 0.9, -1).gather(1, choice.tokens[:, None])[:, 0]
    torch.testing.assert_close(choice.logprobs, exact)
    # The largest noise is -ln(-ln(255/256)) = 5.5, so a token 12 nats below the best could never win; but one uniform
    # number in 256 is zero, whose noise is -inf, and then the best token loses to anything.
    far = torch.tensor([[0.0, -12.0, -100.0]]).expand(8000, 3)
    drawn = HalfGumbel().draw(Prediction(far, far.softmax(-1), 2), 1.0, torch.rand(8000, 3, generator=generator))
    assert 0.4 / 256 < (drawn.tokens == 1).float().mean() < 1.8 / 256


def test_confidence_in_bfloat16_ties_near_one():
    probs = torch.tensor([[0.9971, 0.0029], [0.9979, 0.0021], [0.9, 0.1]])
    tokens = Choice(torch.zeros(3, dtype=torch.int64), probs[:, 0].log())
    scores = HalfTokenProbability().score(Prediction(probs.log(), probs, 5), tokens, torch.arange(3), None)
    assert scores[0] == scores[1] > scores[2]
    assert torch.equal(scores, probs[:, 0].bfloat16().float())


def test_the_composed_run_trains(tmp_path):
    """All of them together through the stage as runs make it, on the tiny model with an adapter."""
    from d1lit.app.plan import make_stage
    from d1lit.app.trainer import make_trainer
    from d1lit.recipes import StageFolder, run_stage
    from d1lit.stopping import StopFlag

    config = config_of(
        "paper_compat=true", "task=sudoku", "recipe=grpo", "logger=none", "debug=fast", "task.num_builtin.train=64"
    )
    lora = {"targets": "paper", "rank": 2, "alpha": 4, "dropout": 0.05}
    for key, value in {
        "scale.grpo.lora": lora, "task.val_rows": 0, "scale.grpo.batch_size": 4, "scale.grpo.micro_batch_size": 2,
        "model.tiny.width": 16, "model.tiny.num_layers": 1, "model.tiny.num_heads": 2, "model.tiny.mlp_width": 16,
        "callbacks.samples": None, "trainer.accelerator": "cpu",
    }.items():  # fmt: skip
        OmegaConf.update(config, key, value, force_add=True)
    plan = plan_run(config)
    policy, tokenizer = plan.make_policy()
    stage = make_stage(plan, plan.stages[0], tokenizer, partial(make_trainer, plan, StopFlag(), tokenizer))
    trained = run_stage(StageFolder(tmp_path / "stage"), policy, stage, plan.seed, lambda line: None)
    assert trained.is_adapted and trained.attend_padding
