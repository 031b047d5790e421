"""d1's one-step log-probs through `score`, from the stored masks: padding, guidance, several iterations, gradients."""

from typing import Any

import pytest
import torch

from d1lit.models import Policy, load_network
from d1lit.scoring import score
from d1lit.types import Corruption
from tests.golden.reading import d1_entries, d1_model_folder, d1_tensors, entry_id, needs_golden
from tests.test_scoring import rollout_of

pytestmark = needs_golden


@pytest.mark.parametrize("entry", d1_entries("D_estimator"), ids=entry_id)
@torch.no_grad()
def test_one_step_logprobs_of_d1(entry: dict[str, Any]) -> None:
    golden = d1_tensors(entry)
    policy = Policy(load_network(str(d1_model_folder(entry))), attend_padding=True)
    cases = entry["settings"]["cases"]
    assert {case["case"] for case in cases} == {name.split(".")[0] for name in entry["tensors"]}
    for case in cases:
        sequences, masks, expected = (golden[f"{case['case']}.{part}"] for part in ("sequences", "mask", "logps"))
        prompt, rows = case["prompt_length"], len(sequences)
        rollout = rollout_of(sequences, prompt)
        largest = 0.0
        for is_masked, logps in zip(masks, expected, strict=True):
            corruption = Corruption(
                noised_ids=torch.where(is_masked, policy.mask_token_id, sequences),
                view_of=torch.arange(rows)[:, None],
                target_ids=sequences[:, None, prompt:],
                weight=torch.ones(rows, 1, sequences.shape[1] - prompt),
                score_from=prompt,
                guidance=case["cfg_scale"],
            )
            ours = score(policy, rollout, corruption, views_per_chunk=2).logprobs[:, 0]
            largest = max(largest, (ours - logps).abs().max().item())
            torch.testing.assert_close(ours, logps, **entry["tolerance"])
        print(f"{entry_id(entry)} {case['case']}: largest difference {largest:.2e}")
