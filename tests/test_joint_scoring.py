"""Scores of several corruptions from shared forwards against those of each by itself."""

from dataclasses import replace

import pytest
import torch

from d1lit.joint_scoring import corruptions_at_once, joined, may_join, score_together
from d1lit.scoring import score
from d1lit.types import Corruption, Rollout
from tests.test_scoring import COMPLETION, PROMPT, random_case, small_policy


def several(count: int) -> tuple[Rollout, list[Corruption]]:
    """Of one rollout; the number of views and of masks differs between them."""
    rollout, first = random_case(0)
    others = [random_case(seed, views=4 + seed, k=1 + seed % 3)[1] for seed in range(1, count)]
    return rollout, [first, *others]


@pytest.mark.parametrize("views_per_chunk", [None, 1, 12])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_the_scores_are_those_of_each_by_itself(views_per_chunk: int | None, guidance: float) -> None:
    rollout, corruptions = several(4)
    corruptions = [replace(corruption, guidance=guidance) for corruption in corruptions]
    policy = small_policy()
    found = score_together(policy, rollout, corruptions, views_per_chunk)
    for one, corruption in zip(found, corruptions, strict=True):
        expected = score(policy, rollout, corruption).logprobs
        torch.testing.assert_close(one.logprobs, expected.detach(), rtol=1e-12, atol=1e-12)
        assert not one.logprobs.requires_grad


def test_all_go_through_the_network_at_once_or_as_many_as_have_room() -> None:
    rollout, corruptions = several(4)
    policy = small_policy()
    for views_per_chunk, forwards in ((None, 1), (14, 2), (7, 4)):
        policy.work.forwards = 0
        score_together(policy, rollout, corruptions, views_per_chunk)
        assert policy.work.forwards == forwards


def test_masks_and_places_of_the_rows_stay_theirs() -> None:
    rollout, corruptions = several(3)
    length = PROMPT + COMPLETION

    def padded(corruption: Corruption, pads: int) -> Corruption:
        seen = (torch.arange(length) >= pads).expand(len(corruption.noised_ids), -1)
        return replace(corruption, attention=seen, position_ids=torch.arange(length).expand_as(seen) + pads)

    corruptions = [padded(corruption, pads) for pads, corruption in enumerate(corruptions)]
    policy = small_policy()
    for one, corruption in zip(score_together(policy, rollout, corruptions), corruptions, strict=True):
        expected = score(policy, rollout, corruption).logprobs
        torch.testing.assert_close(one.logprobs, expected.detach(), rtol=1e-12, atol=1e-12)


def test_what_differs_in_kind_is_scored_apart() -> None:
    rollout, (first, second) = several(2)
    hot = replace(second, temperature=2.0)
    assert may_join([first, second]) and not may_join([first, hot])
    policy = small_policy()
    found = score_together(policy, rollout, [first, hot])
    assert policy.work.forwards == 2
    torch.testing.assert_close(found[1].logprobs, score(policy, rollout, hot).logprobs.detach())
    assert score_together(policy, rollout, []) == []


def test_a_joined_corruption_points_at_its_own_views() -> None:
    _, (first, second) = several(2)
    both = joined([first, second])
    assert both.view_of.shape[1] == first.view_of.shape[1] + second.view_of.shape[1]
    shifted = both.view_of[:, first.view_of.shape[1] :]
    assert torch.equal(shifted == -1, second.view_of == -1)
    assert torch.equal(both.noised_ids[shifted[shifted >= 0]], second.noised_ids[second.view_of[second.view_of >= 0]])


@pytest.mark.parametrize(
    ("count", "views", "each", "chunk", "expected"),
    [(12, 1, 100, None, 12), (12, 1, 2**30 // 11, None, 6), (12, 6, 2**30, None, 1), (12, 2, 0, 10, 4), (5, 1, 0, None, 1)],
)  # fmt: skip
def test_forwards_are_few_and_alike(count: int, views: int, each: int, chunk: int | None, expected: int) -> None:
    assert corruptions_at_once(count, views, each, chunk) == expected
