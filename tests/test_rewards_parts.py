"""Rewards made of parts, graders with two verdicts, formats, extraction, baselines."""

from fractions import Fraction

import pytest

from d1lit.rewards import baselines, formats
from d1lit.rewards.arithmetic import Refused, TooMuch, exact_value, python_value
from d1lit.rewards.countdown import CountdownAttempt, CountdownSolved
from d1lit.rewards.d1_sudoku import D1SudokuEvaluation
from d1lit.rewards.extract import boxes, final_answer, pairs_between, pairs_on_one_line
from d1lit.rewards.graders import countdown_grader, gsm8k_grader, math_grader, sudoku_grader
from d1lit.rewards.math_answers import MathAnswer
from d1lit.rewards.math_forms import normalised
from d1lit.rewards.number_answers import IntegerAnswer, NumberAnswer
from d1lit.rewards.parts import RewardParts, outcome_fraction
from d1lit.rewards.sudoku import CellShare, GivensKept, SudokuSolved, all_grids, completions_of, is_legal
from d1lit.types import Reward, Verdict

COUNTDOWN = {"id": "c", "question": "", "answer": "17", "numbers": [3, 4, 5], "target": 17}
AMBIGUOUS = {"id": "s", "question": "", "puzzle": "0000000000000000", "solution": "1234341221434321"}


def values(reward: Reward, texts: list[str], row: dict) -> list[float]:
    """Values of several texts for one row."""
    return [verdict.value for verdict in reward(texts, [row] * len(texts))]


def test_parts_are_named_weighted_and_checked() -> None:
    parts = RewardParts({"number": NumberAnswer(), "integer": IntegerAnswer()}, {"number": 2.0, "integer": 0.5})
    verdicts = parts.grade(["<answer>18</answer>", "<answer>1/2</answer>", "?"], [{"answer": "18"}] * 3)
    assert parts.names == ("number", "integer")
    assert {name: [v.value for v in column] for name, column in verdicts.items()} == {
        "number": [1.0, 0.0, 0.0],
        "integer": [1.0, 0.0, 0.0],
    }
    assert outcome_fraction(verdicts, "unparsed") == 1 / 3
    assert outcome_fraction(verdicts, "timeout") == 0.0
    for wrong in ({"number": 2.0}, {"number": 2.0, "integer": 1.0, "int": 1.0}, {}):
        with pytest.raises(ValueError, match=r"reward\.weights"):
            RewardParts(parts.parts, wrong)
    with pytest.raises(ValueError, match=r"reward\.parts"):
        RewardParts({}, {})
    with pytest.raises(ValueError, match="completions"):
        NumberAnswer()(["a"], [])


def test_a_failed_part_is_counted_once_a_row() -> None:
    verdicts = {"a": [Verdict(0.0, "timeout"), Verdict(1.0)], "b": [Verdict(0.0, "timeout"), Verdict(0.0, "error")]}
    assert outcome_fraction(verdicts, "timeout") == 0.5
    assert outcome_fraction(verdicts, "error") == 0.5
    assert outcome_fraction({"a": []}, "error") == 0.0


def test_graders_keep_both_verdicts() -> None:
    (grade,) = countdown_grader().grade(["<answer>\\boxed{3*4+5}</answer>"], [COUNTDOWN])
    assert (grade.strict.value, grade.d1.value, grade.extra) == (1.0, 1.0, {})
    (grade,) = gsm8k_grader().grade(["<answer>\\boxed{1,200}</answer>"], [{"answer": "1,200"}])
    assert (grade.strict.value, grade.d1.value) == (1.0, 0.0)  # d1 reads 1
    (grade,) = math_grader().grade(["\\boxed{0.25}"], [{"answer": "\\frac{1}{4}", "question": ""}])
    assert (grade.strict.value, grade.d1.value) == (1.0, 0.0)
    (grade,) = sudoku_grader().grade(["<answer>1234341221434321</answer>"], [AMBIGUOUS])
    assert (grade.strict.value, grade.d1.value, grade.d1.out_of) == (1.0, 16.0, 16.0)
    assert grade.extra == {"cell_accuracy": 1.0, "givens_kept": 1.0}


def test_any_legal_sudoku_solves_where_d1_wants_the_stored_one() -> None:
    grids = all_grids()
    assert len(grids) == 288 and all(map(is_legal, grids)) and completions_of(AMBIGUOUS["puzzle"]) == grids
    texts = [f"<answer>{grid}</answer>" for grid in grids]
    assert sum(values(SudokuSolved(), texts, AMBIGUOUS)) == 288
    assert sum(v == 16.0 for v in values(D1SudokuEvaluation(), texts, AMBIGUOUS)) == 1
    row = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
    half = "<answer>1142243142131324</answer>"  # one given of eight changed
    assert values(GivensKept(), [half], row) == [7 / 8]
    assert values(CellShare(), [half], row) == [1.0]
    assert values(SudokuSolved(), [half], row) == [0.0]


def test_formats_pay_their_shape_alone() -> None:
    ideal = "<reasoning>\nfirst\nthen\n</reasoning>\n<answer>\n5\n</answer>"
    one_line = "<reasoning>first</reasoning> <answer>5</answer>"
    unfilled = "<reasoning>\n</reasoning>\n<answer>\n</answer>"
    twice = ideal + ideal
    texts = [ideal, ideal + "\n", one_line, unfilled, twice, "5", ideal + "<|eot_id|>" + "x" * 99]
    assert values(formats.StrictFormat(""), texts, {}) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert values(formats.SoftFormat(""), texts, {}) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert values(formats.TagCount("", 0.01), texts, {}) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert values(formats.TagCount("", 0.01), [ideal + "x" * 10, ideal + "x" * 1000], {}) == [0.9, 0.0]
    rest = ideal.removeprefix("<reasoning>\n")
    assert values(formats.StrictFormat("<reasoning>\n"), [rest, ideal], {}) == [1.0, 0.0]
    boxed = formats.BoxedInTags(1.0, 0.75, 0.5, 0.25)
    cases = ["<answer>\\boxed{5}</answer>", "<answer>5</answer>", "\\boxed{5}", "5", "<answer>\\boxed{5}"]
    assert values(boxed, cases, {}) == [1.0, 0.75, 0.5, 0.25, 0.5]


def test_countdown_pays_an_attempt() -> None:
    texts = ["<answer>3*4+5</answer>", "<answer>3+4+5</answer>", "<answer>none</answer>", "3*4+5"]
    assert values(CountdownAttempt(CountdownSolved(), 0.1), texts, COUNTDOWN) == [1.0, 0.1, 0.1, 0.0]
    assert values(CountdownSolved(), texts, COUNTDOWN) == [1.0, 0.0, 0.0, 0.0]


def test_arithmetic_is_exact_bounded_and_pythons_own_where_d1_asks() -> None:
    assert exact_value("(1/3 + 1/6) * 4") == (Fraction(2), [1, 3, 1, 6, 4])
    assert exact_value("6 \\div 4 \\times 2 − 1 · 1") == (Fraction(2), [6, 4, 2, 1, 1])
    endless = ("1" * 13, "(" * 40 + "1" + ")" * 161, "1+" * 40 + "1")
    for text in ("1/0", "2**3", "7//2", "-1", "1.5", "1 2", "01", "(1", "f(1)", *endless):
        with pytest.raises(Refused):
            exact_value(text)
    python = {
        "2**3": 8,
        "7//2": 3,
        "-3.5*4": -14.0,
        "2**-1": 0.5,
        "0.1+0.2": 0.1 + 0.2,
        "(-8)**.5": (-8) ** 0.5,
        "--1": 1,
    }
    for text, value in python.items():
        assert python_value(text) == value
    for text in ("9**9**9", "2**99999999", "(2**9999)**9999", "1" + " " * 300 + "+1"):
        with pytest.raises(TooMuch):
            python_value(text)
    for text in ("1/0", "()", "1()", "...", "2.0**9999", "x", "1 if 1 else 2", "[1]"):
        with pytest.raises(Refused):
            python_value(text)


def test_marks_are_paired_as_the_lazy_patterns_pair_them() -> None:
    import random
    import re

    generator = random.Random(7)
    for _ in range(3_000):
        text = "".join(generator.choices(["<a>", "</a>", "x", "\n", " "], k=generator.randint(0, 12)))
        assert list(pairs_between(text, "<a>", "</a>")) == re.findall("<a>(.*?)</a>", text, re.DOTALL), text
        assert list(pairs_on_one_line(text, "<a>", "</a>")) == re.findall("<a>(.*?)</a>", text), text


def test_boxes_and_answers_are_found_in_order() -> None:
    assert boxes("\\boxed{1} \\boxed {\\frac{2}{3}} \\fbox{4} \\boxed{5 \\}}") == ["1", "\\frac{2}{3}", "4", "5 \\}"]
    assert boxes("\\boxed{1 \\boxed{2}} } \\boxed{3") == ["1 \\boxed{2}", "2"]
    assert final_answer("<answer>1</answer> no: <answer> 2 </answer>") == "2"
    assert final_answer("<answer>\n\\boxed{5}\n") == "5"
    assert final_answer("<answer>\\boxed{20\n</answer>") == "20"
    assert final_answer("<answer>\\boxed{20") == "\\boxed{20"
    assert final_answer("<answer>\\boxed{5} \\boxed{6}</answer>") is None
    assert final_answer("so 5") is None


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("$\\dfrac12$", "\\frac{1}{2}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("1{,}200", "1200"),
        ("x = 5", "5"),
        ("6, 8\\text{, and }10", "6,8,10"),
        ("12 square inches", "12"),
        ("15\\mbox{ cm}^2", "15"),
        ("\\text{(C)}", "C"),
        (".50", "0.5"),
        ("3/4", "\\frac{3}{4}"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("90^\\circ", "90"),
        ("x \\le 2", "x\\leq2"),
        ("(12,102)", "(12,102)"),
    ],
)
def test_answers_have_one_spelling(answer: str, text: str) -> None:
    assert normalised(answer).text == text
    assert normalised(text).text == text


def test_baselines_hang_on_the_row_alone_and_are_judged_like_answers() -> None:
    rows = [{**AMBIGUOUS, "id": str(i), "puzzle": "3102200002100320"} for i in range(40)]
    for baseline in (baselines.random_candidate, baselines.row_fill):
        assert baseline(rows) == [baseline([row])[0] for row in rows]
    for kept in (baselines.random_candidate(rows), baselines.row_fill(rows)):
        assert set(values(GivensKept(), kept, rows[0])) == {1.0}
    assert baselines.constant_digit(rows[:1], digit="1") == [baselines.as_completion("1" * 16)]
    free = [{**COUNTDOWN, "id": str(i)} for i in range(200)]
    expressions = baselines.random_expression(free)
    assert len(set(expressions)) > 50
    for text in expressions:
        assert sorted(exact_value(final_answer(text) or "")[1]) == [3, 4, 5]
    assert baselines.sum_of_numbers(free[:1]) == [baselines.as_completion("3 + 4 + 5")]
    train = [{"answer": "2"}, {"answer": "5"}, {"answer": " 2"}]
    assert baselines.most_common_answer(free[:2], train) == [baselines.as_completion("2")] * 2
    with pytest.raises(ValueError, match="train"):
        baselines.most_common_answer(free, [])


@pytest.mark.parametrize(
    "answer", ["9^{9^{9}}", "9**9**9**9", "f(x)=9**9**9", "x^{99999}", "x**99999", "9999!x", "x!!!"]
)
def test_towers_of_powers_are_refused_unread_and_counted(answer: str) -> None:
    def never(gold: str, text: str) -> Verdict:
        raise AssertionError(f"{text!r} was handed to algebra")

    verdict = MathAnswer(never).compare("x^2+\\frac{1}{2}", answer)
    assert (verdict.value, verdict.outcome) == (0.0, "refused")
