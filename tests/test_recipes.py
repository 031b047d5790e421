"""What a run keeps of its stages beside their weights."""

from d1lit.recipes import StageFolder, read_costs, write_cost


def test_accounts_are_kept_where_the_stage_has_no_folder_yet(tmp_path):
    """Without checkpoints and logs nothing makes the stage's folder before its account is written."""
    write_cost(StageFolder(tmp_path / "stages" / "sft"), {"forwards": 3, "tokens": 40, "flops": 2.0})
    write_cost(StageFolder(tmp_path / "stages" / "grpo"), {"forwards": 4, "tokens": 2, "flops": 0.5})
    costs = read_costs(tmp_path, ["sft", "grpo", "later"])
    assert (costs["forwards"], costs["tokens"], costs["flops"]) == (7, 42, 2.5)
    assert set(costs["stages"]) == {"sft", "grpo"}
    assert not list(tmp_path.rglob("*.staging"))
