"""The tiny tokenizer takes any text and keeps tags whole; prompts and completions go through the chat template."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d1lit.models.tokenizers import (
    ASSISTANT,
    MASK,
    TAGS,
    USER,
    build_tiny_tokenizer,
    check_tokenizer,
    decode_completion,
    encode_prompt,
    encode_text,
    load_tokenizer,
)
from d1lit.models.tokenizers import EOS as EOS_MARKER
from d1lit.models.transformer import MaskedDiffusionConfig

TOKENIZER = build_tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def tiny_like(**changes: int) -> MaskedDiffusionConfig:
    ids = {"mask_token_id": TOKENIZER.mask_token_id, "eos_token_id": EOS, "pad_token_id": EOS}
    return MaskedDiffusionConfig(**{"vocab_size": len(TOKENIZER), **ids, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "  two  spaces\n\n\ttab\r\n",
        "naïve Σ√π 数独 🙂👩‍👩‍👧",
        "\x00\x01\x1f\x7f",
        "a </answer>b<answer>c",
        "1,200 $5 \\boxed{\\frac{1}{2}}",
    ],
)
def test_text_comes_back_unchanged(text: str) -> None:
    assert decode_completion(TOKENIZER, encode_text(TOKENIZER, text), EOS) == text


MARKERS = (MASK, EOS_MARKER, USER, ASSISTANT)


def spells_no_marker(text: str) -> bool:
    """Hypothesis tries the strings of the source too; what spells a marker is that marker, as in published tokenizers."""
    return not any(marker in text for marker in MARKERS)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])).filter(spells_no_marker))
def test_any_text_comes_back_unchanged(text: str) -> None:
    assert decode_completion(TOKENIZER, encode_text(TOKENIZER, text), EOS) == text


def test_a_text_that_spells_a_marker_is_that_marker_and_leaves_no_text() -> None:
    for marker in MARKERS:
        (token,) = encode_text(TOKENIZER, marker)
        assert TOKENIZER.convert_ids_to_tokens(token) == marker
        assert decode_completion(TOKENIZER, [token], EOS) == ""


def test_bytes_are_tokens_and_tags_are_one_token_each() -> None:
    assert len(encode_text(TOKENIZER, "ü🙂")) == 6
    for tag in TAGS:
        (token,) = encode_text(TOKENIZER, tag)
        assert decode_completion(TOKENIZER, [token], EOS) == tag
    assert len(encode_text(TOKENIZER, "x<reasoning>y</reasoning>")) == 4


def test_a_prompt_is_two_markers_around_the_question_and_then_the_prefill() -> None:
    plain = encode_prompt(TOKENIZER, None, "2+2?")
    assert TOKENIZER.convert_ids_to_tokens(plain) == ["<|user|>", "2", "+", "2", "?", "<|assistant|>"]
    assert encode_prompt(TOKENIZER, None, "2+2?", "<reasoning>") == [*plain, *encode_text(TOKENIZER, "<reasoning>")]
    assert encode_prompt(TOKENIZER, "be brief", "2+2?") == [*encode_text(TOKENIZER, "be brief\n"), *plain]


def test_completion_ends_at_the_first_end_token_and_drops_specials_only() -> None:
    ids = [
        TOKENIZER.mask_token_id,
        *encode_text(TOKENIZER, "<answer>7</answer>"),
        EOS,
        *encode_text(TOKENIZER, "later"),
    ]
    assert decode_completion(TOKENIZER, ids, EOS) == "<answer>7</answer>"


def test_saved_tokenizer_is_an_ordinary_one(tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path), tiny_like())
    text = "a <answer>ü</answer>\n"
    assert encode_prompt(again, "s", text, "<reasoning>") == encode_prompt(TOKENIZER, "s", text, "<reasoning>")
    assert decode_completion(again, encode_text(again, text), EOS) == text


def test_a_tokenizer_of_another_model_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"model\.path: mask_token_id is 3 in the model and 256 in the tokenizer"):
        check_tokenizer(TOKENIZER, tiny_like(mask_token_id=3), "here")
    with pytest.raises(ValueError, match=r"has 264 tokens but the model only 260"):
        check_tokenizer(TOKENIZER, tiny_like(vocab_size=260), "here")
    with pytest.raises(ValueError, match=r"pad_token_id=999 .* outside the vocabulary"):
        check_tokenizer(TOKENIZER, tiny_like(pad_token_id=999), "here")
    with pytest.raises(ValueError, match=r"model\.path: no tokenizer could be read"):
        load_tokenizer(str(tmp_path), tiny_like())


def test_a_tokenizer_without_template_is_refused_with_the_cure() -> None:
    bare = build_tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template\. Try: an Instruct model"):
        check_tokenizer(bare, tiny_like(), "here")
