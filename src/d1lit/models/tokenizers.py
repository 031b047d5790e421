"""Tokenizers: the tiny byte tokenizer, loading with checks, and the way between chat text and ids."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from d1lit.models.transformer import MaskedDiffusionConfig

MASK, EOS, USER, ASSISTANT = "<|mask|>", "<|eos|>", "<|user|>", "<|assistant|>"
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
# One token before the question and one before the answer: a tiny model's canvas is short.
_TINY_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + '\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ '" + USER + "' + message['content'] }}"
    "{%- else -%}{{ '" + ASSISTANT + "' + message['content'] + '" + EOS + "' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + ASSISTANT + "' }}{%- endif -%}"
)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, one atomic token per tag, and four specials; any text goes in and comes out unchanged.

    The end token pads as well, as in LLaDA. Tags are part of an answer, so they are ordinary added tokens, which
    decoding keeps; mask, end and turn markers are special, which decoding drops.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (MASK, EOS, USER, ASSISTANT)])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        mask_token=MASK,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=_TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def load_tokenizer(path: str, config: MaskedDiffusionConfig, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, checked against the model; never runs remote code.

    Raises:
        ValueError: if there is none, if it does not fit the model, or if it has no chat template.
    """
    try:
        # Dream publishes its tokenizer as remote code over Qwen2's files; the native class reads them.
        loader = Qwen2Tokenizer if config.family == "dream" else AutoTokenizer
        tokenizer = loader.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model.path: no tokenizer could be read from {path} ({cause}). "
            "Try: a folder that holds tokenizer.json and tokenizer_config.json [E404]"
        ) from error
    check_tokenizer(tokenizer, config, path)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: MaskedDiffusionConfig, path: str) -> None:
    """Refuse a tokenizer that does not belong to the model or cannot write a chat."""
    ids = {
        "mask_token_id": (config.mask_token_id, tokenizer.mask_token),
        "eos_token_id": (config.eos_token_id, tokenizer.eos_token),
        "pad_token_id": (config.pad_token_id, None),  # padding is masked or equals the end: only its range matters
    }
    for name, (in_model, token) in ids.items():
        in_tokenizer = None if token is None else tokenizer.convert_tokens_to_ids(str(token))
        if not 0 <= in_model < config.vocab_size:
            raise ValueError(
                f"model.path: {name}={in_model} in {path} is outside the vocabulary of {config.vocab_size}. "
                "Try: the tokenizer and config.json that were saved together [E404]"
            )
        if in_tokenizer is not None and in_tokenizer != in_model:
            raise ValueError(
                f"model.path: {name} is {in_model} in the model and {in_tokenizer} in the tokenizer of {path}. "
                "Try: the tokenizer that was saved with this model [E404]"
            )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"model.path: the tokenizer of {path} has {len(tokenizer)} tokens but the model only {config.vocab_size}. "
            "Try: the tokenizer that was saved with this model [E404]"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"model.path: the tokenizer of {path} has no chat template. Try: an Instruct model, "
            "or put a chat_template.jinja into the folder [E404]"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, system: str | None, user: str, prefill: str = "") -> list[int]:
    """Ids of a prompt: the chat template with the assistant's header, then the first words put in its mouth.

    The template writes its own start token, so none is added. The prefill is encoded apart, so that the prompt's ids
    do not depend on it.
    """
    messages = [{"role": "user", "content": user}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return encode_text(tokenizer, text) + encode_text(tokenizer, prefill)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, with nothing added."""
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []


def decode_completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_token_id: int) -> str:
    """Text up to the first end token, without special tokens; the tags are not special and stay."""
    ids = [int(token) for token in ids]
    if eos_token_id in ids:
        ids = ids[: ids.index(eos_token_id)]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
