"""Prompt templates: what they say, what is refused, and that no prompt is ever cut."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from d1lit.models.tokenizers import build_tiny_tokenizer, encode_prompt
from d1lit.tasks import (
    builtin_templates,
    encode_prompts,
    graded_text,
    load_template,
    parse_template,
    prompt_protocol,
    render,
)

EXAMPLES: dict[str, dict[str, Any]] = {
    "gsm8k": {"id": "a", "question": "How many {{answer}}?", "answer": "7"},
    "math500": {"id": "a", "question": r"Find \frac{1}{2}+\boxed{{x}}.", "answer": "7"},
    "countdown": {"id": "a", "question": "Numbers: [3, 4, 5]\nTarget: 12", "numbers": [3, 4, 5], "target": 12},
    "sudoku": {"id": "a", "question": "0204341221434321", "puzzle": "0204341221434321"},
    "demonstrations": {"id": "a", "question": "Why?"},
    "code": {"id": "a", "question": "Write a function.", "entry_point": "f", "tests": "assert f(1) == 2"},
}


@pytest.mark.parametrize("name", builtin_templates())
def test_every_builtin_template_puts_the_whole_example(name: str) -> None:
    template = load_template(name)
    example = EXAMPLES[name.split("_")[0]]
    system, user, prefill = render(template, example)
    assert system == ""
    assert prefill == ("<reasoning>" if name.endswith("_eval") else "")
    if name.startswith("countdown"):
        assert all(str(n) in user for n in (3, 4, 5, 12))
    else:
        assert example["question"] in user
    if not name.endswith("_tiny"):
        assert all(tag in user for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
    assert ("\\boxed{" in user) == (name in ("math500",) or (name.endswith("_eval") and name != "sudoku_eval")) or (
        name.startswith("math500")
    )


def test_tiny_prompts_hold_nothing_but_the_problem() -> None:
    user = {name: render(load_template(f"{name}_tiny"), example)[1] for name, example in EXAMPLES.items()}
    assert user["sudoku"] == "0204341221434321"
    assert user["countdown"] == "3, 4, 5 = 12"
    assert user["gsm8k"] == "How many {{answer}}?"  # a field's own braces are text


def test_template_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    text = "a comment\n--- system\nBe {{mood}}.\n--- shot\nQ: 1\nA: 1\n\n--- shot\nQ: 2\n--- user\nQ: {{question}}\n\n"
    text += "--- prefill\n<reasoning>\n--- graded\ncompletion\n"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    template = load_template(str(path))
    assert render(template, {"question": "3", "mood": "brief"}) == (
        "Be brief.",
        "Q: 1\nA: 1\n\nQ: 2\n\nQ: 3",
        "<reasoning>",
    )
    assert template.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert prompt_protocol(template) == {
        "prompt": str(path),
        "prompt_sha256": template.sha256,
        "graded": "completion",
    }
    path.write_bytes(text.replace("brief", "long").replace("Q: 1", "Q: 0").encode())
    assert load_template(str(path)).sha256 != template.sha256


def test_graders_see_the_prefill_unless_the_template_says_otherwise() -> None:
    with_prefill = parse_template("--- user\n{{question}}\n--- prefill\n<reasoning>", "t")
    assert graded_text(with_prefill, "a</reasoning>") == "<reasoning>a</reasoning>"
    assert graded_text(load_template("gsm8k_eval"), "a</reasoning>") == "a</reasoning>"
    assert graded_text(load_template("gsm8k"), "<reasoning>a") == "<reasoning>a"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("--- question\nx", r"t:1: no section 'question'\. Try: one of"),
        ("--- user\nx\n--- user\ny", r"t:3: section 'user' stands twice"),
        ("no section at all", r"t:1: no section 'user'"),
        ("--- system\nx", r"no section 'user'"),
        ("--- user\n\n", r"no section 'user'"),
        ("--- user\nx\n--- graded\nnothing", r"graded is 'nothing'"),
    ],
)
def test_malformed_template_is_one_line(text: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as failure:
        parse_template(text, "t")
    assert "\n" not in str(failure.value) and "Try: " in str(failure.value)


def test_template_that_is_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.prompt: no template or file 'gsm9k'\. Try: one of .*gsm8k"):
        load_template("gsm9k")
    (tmp_path / "latin.txt").write_bytes("--- user\ncafé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt:2: not UTF-8"):
        load_template(str(tmp_path / "latin.txt"))


def test_field_that_the_row_lacks_is_named() -> None:
    template = parse_template("--- user\n{{puzle}}", "t")
    with pytest.raises(ValueError, match=r"t asks for \{\{puzle\}\}, which row a lacks\. Try: one of .*puzzle"):
        render(template, EXAMPLES["sudoku"])


def test_long_prompt_is_refused_or_dropped_and_counted_never_cut() -> None:
    tokenizer, template = build_tiny_tokenizer(), load_template("gsm8k_tiny")
    rows = [{"id": str(n), "question": "é" * n} for n in (1, 5, 9)]
    lengths = [len(encode_prompt(tokenizer, "", row["question"])) for row in rows]
    assert lengths == [2 * n + 2 for n in (1, 5, 9)]  # bytes, and the two turn tokens

    encoded, kept, dropped = encode_prompts(rows, template, tokenizer, lengths[1], "drop")
    assert [len(ids) for ids in encoded] == lengths[:2] and kept == rows[:2] and dropped == 1
    whole, all_rows, none = encode_prompts(rows, template, tokenizer, lengths[2], "error")
    assert [len(ids) for ids in whole] == lengths and all_rows == rows and none == 0
    assert encoded == whole[:2]
    with pytest.raises(ValueError, match=r"row 9 has a prompt of 20 tokens, more than 19\. Try: .*length=20"):
        encode_prompts(rows, template, tokenizer, 19, "error")
    with pytest.raises(ValueError, match=r"all 3 prompts are longer than 3 tokens\. Try: .*=20"):
        encode_prompts(rows, template, tokenizer, 3, "drop")
