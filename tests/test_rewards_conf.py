"""Every reward configuration builds and pays a right answer its full weight."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from d1lit.rewards.graders import countdown_grader, gsm8k_grader, math_grader, sudoku_grader
from d1lit.rewards.parts import Counted, RewardParts

FOLDER = Path(__file__).resolve().parents[1] / "conf" / "reward"
ROWS = {
    "gsm8k": {"answer": "18", "solution": "#### 18", "question": ""},
    "math500": {"answer": "\\frac{1}{2}", "question": ""},
    "countdown": {"numbers": [3, 4, 5], "target": 17, "answer": "17", "question": ""},
    "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324", "answer": "", "question": ""},
}
RIGHT = {"gsm8k": "18", "math500": "\\boxed{\\frac{1}{2}}", "countdown": "3*4+5", "sudoku": "3142243142131324"}
GRADERS = {"gsm8k": gsm8k_grader, "math500": math_grader, "countdown": countdown_grader, "sudoku": sudoku_grader}
MOST = {
    "gsm8k": 4.0,
    "math500": 3.0,
    "countdown": 1.0,
    "sudoku": 2.5,
    "d1_gsm8k": 3.5,  # its soft pattern does not match tags on lines of their own
    "d1_math500": 2.75,  # its box bonus is out of reach
    "d1_countdown": 1.0,
    "d1_sudoku": 1.0,
}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_configuration_builds_and_a_right_answer_earns_all_of_it(file: Path) -> None:
    if file.stem not in MOST:
        pytest.skip(f"{file.name} belongs to a task tested elsewhere")
    built = instantiate(OmegaConf.load(file))
    assert isinstance(built, RewardParts)
    task = file.stem.removeprefix("d1_")
    reward = built.judged_by(Counted(GRADERS[task](), "strict"))
    text = f"<reasoning>\nso\n</reasoning>\n<answer>\n{RIGHT[task]}\n</answer>\n"
    verdicts = reward.grade([text], [ROWS[task]])
    total = sum(reward.weights[name] * column[0].value for name, column in verdicts.items())
    print({name: column[0].value for name, column in verdicts.items()}, total)
    assert total == pytest.approx(MOST[file.stem], abs=2e-3)


def test_all_eight_configurations_are_there() -> None:
    assert set(MOST) <= {file.stem for file in FOLDER.glob("*.yaml")}
