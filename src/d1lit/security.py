"""What is not to be trusted: configurations from elsewhere, and secrets on their way to a log.

The user's own YAML and command line are trusted. A configuration that comes with a checkpoint, from a hub or from
another run's folder is data: it may name only components of this list. And no secret leaves through what a run writes.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

CONF = Path(__file__).resolve().parents[2] / "conf"

UNNAMED = (
    *(f"d1lit.rewards.d1_{task.lower()}.D1{task}Evaluation" for task in ("Countdown", "Gsm8k", "Math", "Sudoku")),
    *(f"d1lit.losses.weighted.{name}_centering" for name in ("no", "negative", "importance")),
    *(f"d1lit.masking.{name}Times" for name in ("LowDiscrepancy", "Antithetic", "LogUniformMask")),
    "d1lit.estimators.spg.hide_all", "d1lit.estimators.spg.hide_block", "d1lit.estimators.spg.hide_random",
    "d1lit.losses.supervised.batch_mean", "d1lit.losses.supervised.per_row", "d1lit.losses.terms.absolute",
    "d1lit.losses.terms.k1_with_score", "d1lit.masking.BlockMask", "d1lit.masking.ExactCountMask",
    "d1lit.masking.context_adaptive_weight", "d1lit.rewards.countdown.CountdownSolved",
    "d1lit.rewards.math_process.MathVerify",
)  # fmt: skip
"""Components of d1lit that no YAML of `conf/` names. What is no component may do anything: some run programs."""
CLASSES_FROM = (
    "torch.optim", "torch.nn", "lightning.pytorch.callbacks", "lightning.pytorch.loggers",
    "lightning.pytorch.strategies", "lightning.pytorch.plugins", "lightning.pytorch.trainer",
    "lightning.pytorch.Trainer",
)  # fmt: skip
"""Packages of which a class may be built. Their functions may not be called: some write files, some unpickle them."""

_DOTTED = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)+")
_CALLABLE = (type, FunctionType)
_COMPONENT = re.compile(r"_target_: *(d1lit\.[\w.]+)")
_INNER_KEY = re.compile(r"\$\{[\w.\[\]-]*\}")
"""An interpolation that asks for another key, with none inside."""
_RESOLVER = re.compile(r"\$\{(?:(?!oc\.(?:select:|env:D1LIT_))[^}]*:|[^}]*\$\{)")
"""What asks for more than another key, or for one of our own variables, as YAMLs of `conf/` do."""


# ------------------------------------------------------------------------------------------------------------- targets


def allowed_target(dotted: str, trusted: Sequence[str] = ()) -> bool:
    """Whether a `_target_` of a configuration from elsewhere may be called."""
    return why_refused(dotted, trusted) is None


def why_refused(dotted: str, trusted: Sequence[str] = ()) -> str | None:
    """None if a `_target_` may be called, else the reason.

    Both the string and the object it leads to are checked: `d1lit.sampling.torch.load` begins well and ends in pickle.

    Args:
        dotted: the target.
        trusted: further packages the user has named as their own.
    """
    if _DOTTED.fullmatch(dotted) is None:
        return "is not a plain dotted name (private names are not components)"
    if not _inside(dotted, ("d1lit", *CLASSES_FROM, *trusted)):
        return "is not on the list of components"
    found = _resolve(dotted)
    if not isinstance(found, _CALLABLE):
        return "does not lead to a class or a function"
    identity = f"{found.__module__}.{found.__qualname__}"
    if _DOTTED.fullmatch(identity) is None:
        return f"leads to {identity}, which is not a component"
    packages = (*trusted, *(CLASSES_FROM if isinstance(found, type) else ()))
    if not (identity in components() or _inside(identity, packages)):
        return f"leads to {identity}, which is not on the list of components"
    module = sys.modules.get(found.__module__)
    if module is None or _attribute(module, found.__qualname__.split(".")) is not found:
        return f"leads to something that only calls itself {identity}"
    return None


@lru_cache(maxsize=1)
def components() -> frozenset[str]:
    """Where the components of d1lit are defined: those that a YAML of `conf/` names, and `UNNAMED`."""
    texts = (file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml"))
    named = {name for text in texts for name in _COMPONENT.findall(text)}
    found = (_resolve(name) for name in (*named, *UNNAMED))
    return frozenset(f"{part.__module__}.{part.__qualname__}" for part in found if isinstance(part, _CALLABLE))


def check_config(config: Mapping[str, Any], trusted: Sequence[str] = ()) -> None:
    """Refuse a configuration from elsewhere that would call what it should not.

    Args:
        config: plain nested mappings and lists, resolved.
        trusted: further packages the user has named as their own.

    Raises:
        ValueError: naming key, value, reason and cure.
    """
    for key, value in _leaves(config, ""):
        if key.rsplit(".", 1)[-1] == "_target_" and value is not None:  # of null nothing is made (logger=none)
            reason = why_refused(value, trusted) if isinstance(value, str) else "is not a string"
            if reason is not None:
                raise ValueError(
                    f"{key}: {value!r} {reason}; this configuration comes from elsewhere. "
                    "Try: copy the part into your own YAML, if you trust it [E211]"
                )


def check_resolvers(config: Any, typed: Sequence[str] = ()) -> None:
    """Refuse a configuration from elsewhere that would read your environment.

    Args:
        config: plain nested mappings and lists, with interpolations as they were written.
        typed: words of the user's own, which may ask for what they like.

    Raises:
        ValueError: naming key, value and cure.
    """
    for key, value in _leaves(config, ""):
        if isinstance(value, str) and _asks_resolver(value) and not any(value in word for word in typed):
            raise ValueError(
                f"{key}: {value!r} asks for a resolver, which could read your environment; this configuration comes "
                "from elsewhere. Try: write the value itself [E211]"
            )


def _asks_resolver(value: str) -> bool:
    """Whether a resolver is asked, its name put together from other keys or not: `${oc.${x}:HOME}` is one too."""
    found = 1
    while found:
        value, found = _INNER_KEY.subn("KEY", value)
    return _RESOLVER.search(value) is not None


def _inside(dotted: str, packages: Sequence[str]) -> bool:
    return any(dotted == package or dotted.startswith(f"{package}.") for package in packages)


def _resolve(dotted: str) -> Any:
    """The object under a dotted name whose beginning is allowed; None if there is none."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        return _attribute(module, parts[cut:])
    return None


def _attribute(found: Any, names: Sequence[str]) -> Any:
    for name in names:
        try:
            found = getattr(found, name)
        except AttributeError:
            return None
    return found


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            name = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield name, value
            else:
                yield from _leaves(value, name)
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _leaves(value, f"{path}[{i}]")
    else:
        yield path, node


# ------------------------------------------------------------------------------------------------------------- secrets

REDACTED = "<redacted>"
BLANKED = f"'{REDACTED}'"
"""The value of a word of a command line, as Hydra can read it."""

_ALWAYS = {
    "password", "passwords", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey",
    "authorization", "bearer", "cookie", "cookies",
}  # fmt: skip
"""Words that make a name secret wherever they stand."""
_KEY_OF = {
    "api", "access", "account", "secret", "private", "ssh", "signing", "encryption", "auth", "service", "wandb", "hub",
    "hf", "license",
}  # fmt: skip
"""`api_key` is a secret; `key` and `sort_key` are not."""
_TOKEN_OF_TEXT = {
    "mask", "pad", "eos", "bos", "unk", "sep", "cls", "special", "stop", "start", "end", "begin", "per", "first",
    "last", "next", "prev", "image", "text", "masked", "add", "by", "each", "draft",
}  # fmt: skip
"""`mask_token` is a word of a language; `hf_token`, `token` and all others are secrets. `num_tokens` and
`mask_token_id` do not end in `token`."""

_SECRET_VALUES = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{16,}                                  # Hugging Face
    | \b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}                      # keys of model providers
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,} | \bglpat-[\w-]{16,}
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b | \bAIza[0-9A-Za-z_-]{30,} | \bxox[abprs]-[\w-]{10,}
    | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}                   # JSON web tokens
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----(?:.*?-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|.*)
    | (?<=://)[^/\s:@]+:[^/\s@]+(?=@)                        # https://user:password@host
    | (?<=[Bb]earer[ ])[\w.~+/=-]{8,}
    """,
    re.VERBOSE | re.DOTALL,
)
_NAMED = re.compile(r"""(?P<name>[A-Za-z][\w.-]*)["']?\s*[=:]\s*""")
_VALUE = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\[[^\]]*\]|\{[^}]*\}|\S)+""", re.DOTALL)
"""What stands behind a name, to the next space outside quotes and brackets: too much goes rather than too little."""
_WORD = re.compile(r"(?P<key>[+~-]*(?P<name>[A-Za-z][\w./@-]*))=(?P<value>.+)", re.DOTALL)
_NOTHING = ("null", "none", "true", "false")
_OPTION = re.compile(r"--?(?P<name>[A-Za-z][\w-]*)")


def is_secret_name(name: str) -> bool:
    """Whether a configuration key, an option or an environment variable by its name holds a secret."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rsplit(".", 1)[-1])
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", spaced) if word]
    if _ALWAYS.intersection(words):
        return True
    if len(words) > 1 and words[-1] in ("key", "keys") and words[-2] in _KEY_OF:
        return True
    return bool(words) and words[-1] == "token" and (len(words) == 1 or words[-2] not in _TOKEN_OF_TEXT)


def redact_text(text: str) -> str:
    """A line for a log or a card, without the secrets in it."""
    text = _SECRET_VALUES.sub(REDACTED, text)
    parts, done = [], 0
    for match in _NAMED.finditer(text):
        value = _VALUE.match(text, match.end())
        if match.start() < done or value is None or not is_secret_name(match["name"]):
            continue
        if value[0].lower().rstrip(",;&)]}") not in _NOTHING:
            parts += [text[done : match.end()], REDACTED]
            done = value.end()
    return "".join([*parts, text[done:]])


def redact(tree: Any) -> Any:
    """A copy of nested mappings and lists without secrets: by the name of a key, and by the look of a value.

    A list is also read as a command line: what follows `--hf-token` or `hf_token=` is a secret.
    """
    if isinstance(tree, Mapping):
        return {key: _blank(value) if is_secret_name(str(key)) else redact(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_redact_word(item) if isinstance(item, str) else redact(item) for item in tree]
        for i, item in enumerate(tree[:-1]):
            option = _OPTION.fullmatch(item) if isinstance(item, str) else None
            if option is not None and is_secret_name(option["name"]):
                items[i + 1] = _blank(tree[i + 1])
        return type(tree)(items)
    return redact_text(tree) if isinstance(tree, str) else tree


def _redact_word(word: str) -> str:
    """KEY=VALUE without its whole value where a part of the key, or a name in the value, is that of a secret."""
    match = _WORD.fullmatch(word)
    if match is None or match["value"].lower() in _NOTHING:
        return redact_text(word)
    names = [*re.split("[./@]", match["name"]), *(inner["name"] for inner in _NAMED.finditer(match["value"]))]
    return f"{match['key']}={BLANKED if any(map(is_secret_name, names)) else redact_text(match['value'])}"


def _blank(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _blank(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_blank(item) for item in value)
    return value if value is None or isinstance(value, bool) or value == "" else REDACTED
