"""Log-probabilities by tiles of positions and vocabulary are those of a full log-softmax, and so are the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d1lit.models import head
from d1lit.models.head import chunked_entropy, chunked_logprobs, few_logits, tile_shape

POSITIONS, VOCABULARY, WIDTH, TARGETS = 11, 53, 6, 3


def case(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (POSITIONS, TARGETS), generator=generator)
    targets[0] = torch.tensor([0, VOCABULARY - 1, 0])  # both ends, and one twice
    return hidden.to(dtype), weight.to(dtype), targets


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    seed = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    return torch.autograd.grad((value * seed).sum(), inputs)


@pytest.mark.parametrize("columns", [1, 7, 53, 4096])
@pytest.mark.parametrize("room", [1, 20, 10**6])
@pytest.mark.parametrize("trains_head", [False, True])
def test_any_tile_gives_the_full_log_softmax(
    columns: int, room: int, trains_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_COLUMNS", columns)
    hidden, weight, targets = case(torch.float64)
    hidden.requires_grad_(True)
    weight.requires_grad_(trains_head)
    inputs = (hidden, weight) if trains_head else (hidden,)
    ours = chunked_logprobs(hidden, weight, targets, temperature=0.7, budget=8 * room)
    full = (hidden @ weight.T / 0.7).log_softmax(-1).gather(1, targets)
    torch.testing.assert_close(ours, full, atol=1e-12, rtol=1e-12)
    for mine, theirs in zip(gradients(ours, *inputs), gradients(full, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(chunked_logprobs(hidden, weight, targets, 0.7, 8 * room), full)


@pytest.mark.parametrize("columns", [1, 7, 4096])
@pytest.mark.parametrize("excluded", [0, 20, VOCABULARY - 1])
@pytest.mark.parametrize("trains_head", [False, True])
def test_an_excluded_token_has_no_share_of_the_softmax(
    columns: int, excluded: int, trains_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a log-softmax whose column stands at -inf, in values, gradients and entropies."""
    monkeypatch.setattr(head, "_COLUMNS", columns)
    hidden, weight, targets = case(torch.float64)
    targets = torch.where(targets == excluded, 5, targets)
    hidden.requires_grad_(True)
    weight.requires_grad_(trains_head)
    inputs = (hidden, weight) if trains_head else (hidden,)
    ours = chunked_logprobs(hidden, weight, targets, 0.7, 8 * 60, excluded)
    column = torch.arange(VOCABULARY) == excluded
    full = (hidden @ weight.T / 0.7).masked_fill(column, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(ours, full.gather(1, targets), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(ours, chunked_logprobs(hidden, weight, targets, 0.7), atol=1e-4)
    for mine, theirs in zip(gradients(ours, *inputs), gradients(full.gather(1, targets), *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)
    entropy = chunked_entropy(hidden.detach(), weight.detach(), 0.7, 8 * 60, excluded)
    rest = full.detach()[:, ~column]
    torch.testing.assert_close(entropy, -(rest.exp() * rest).sum(-1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_large_logits_neither_overflow_nor_exceed_certainty(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running maximum may rise at every tile; exp of a raw logit of this size would be infinite."""
    monkeypatch.setattr(head, "_COLUMNS", 5)
    hidden, weight, targets = case(torch.float32, scale)
    values = chunked_logprobs(hidden, weight, targets, budget=4 * 20)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets)
    assert values.isfinite().all() and (values <= 0).all()
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trains_head", [False, True])
def test_low_precision_weights_are_summed_in_float32(
    dtype: torch.dtype, trains_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_COLUMNS", 9)
    hidden, weight, targets = case(dtype)
    hidden.requires_grad_(True)
    weight.requires_grad_(trains_head)
    values = chunked_logprobs(hidden, weight, targets, budget=4 * 40)
    assert values.dtype == torch.float32
    full = (hidden.float() @ weight.float().T).log_softmax(-1).gather(1, targets)
    torch.testing.assert_close(values, full, atol=1e-5, rtol=1e-5)
    inputs = (hidden, weight) if trains_head else (hidden,)
    for mine, theirs in zip(gradients(values, *inputs), gradients(full, *inputs), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), theirs.float(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("positions", [1, 60, 512, 5000])
@pytest.mark.parametrize("vocabulary", [33, 4096, 126464])
def test_a_tile_keeps_to_its_budget(positions: int, vocabulary: int) -> None:
    for budget in (2**20, 16 * 2**20):
        rows, columns = tile_shape(positions, vocabulary, budget)
        assert 1 <= rows <= positions and 1 <= columns <= vocabulary
        assert 4 * rows * columns <= budget
    assert tile_shape(positions, vocabulary, 1) == (1, 1)


def test_few_positions_have_the_logits_of_many():
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(97, 16, generator=generator), torch.randn(1, 4, 16, generator=generator)
    with torch.no_grad():
        for count in (2, 3, 4):
            found = few_logits(hidden[:, :count], weight)
            assert found is not None
            assert found.is_contiguous()
            torch.testing.assert_close(found, hidden[:, :count] @ weight.T, atol=1e-5, rtol=0)
        assert few_logits(hidden[:, :1], weight) is None
        assert few_logits(hidden.double(), weight.double()) is None
    assert few_logits(hidden, weight) is None, "a gradient is wanted"
