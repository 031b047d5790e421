"""A trained head for the order in which positions are fixed: scores from the network's last hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from d1lit.draws import CounterDraws

ORDER_HEAD_FILE = "order_head.safetensors"
"""Where the head stands beside weights whose own format has no place for it: an adapter, a model in official names."""


class OrderHead(nn.Module):
    """One score a position, by which a Plackett-Luce law draws the order (LLaDOU, arXiv 2505.10446).

    Differs from the paper: its head is a transformer block, so that positions see each other; this one is two matrices
    at each position by itself (our choice), so a score depends neither on which positions a caller keeps nor on how
    views are cut into chunks. It reads the final hidden states alone.
    """

    def __init__(self, width: int) -> None:
        """Without values: `fresh_order_head` has those.

        Args:
            width: of the hidden states, and of the layer between.
        """
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.outer = nn.Linear(width, 1, bias=False)

    def forward(self, hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M"]:
        """Scores in fp32 (fp64 for a fp64 network): log-probabilities up to what the open positions have in common."""
        scores = self.outer(F.silu(self.inner(hidden.to(self.inner.weight.dtype))))[..., 0]
        return scores if scores.dtype == torch.float64 else scores.float()


@torch.no_grad()
def fresh_order_head(width: int, std: float, seed: int) -> OrderHead:
    """A new head on the CPU; its second matrix is 0, so every position has the score 0 and the order begins uniform."""
    with torch.random.fork_rng(devices=[]):
        head = OrderHead(width)
    generator = torch.Generator().manual_seed(CounterDraws(seed).torch_seed("init.order_head.inner"))
    head.inner.weight.copy_(torch.randn(width, width, generator=generator) * std)
    head.outer.weight.zero_()
    return head
