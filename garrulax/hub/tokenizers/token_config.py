"""The tokens that tokenizer_config.json names."""

import logging
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger(__name__)


def role_ids(
    config: Mapping[str, Any], ids: Mapping[str, int], origins: Mapping[str, str] | None = None
) -> dict[str, int]:
    """The ids of bos, eos and pad, as far as tokenizer_config.json names these tokens.

    A name without an id counts as not given, and the log says so: a missing pad must not keep a model from loading.

    Args:
        config: The content of tokenizer_config.json.
        ids: Text -> id of all tokens.
        origins: Key of `config` -> name of the file that has it, for messages. Where it is not given,
            tokenizer_config.json.

    Returns:
        Ids by role: "bos", "eos" or "pad".

    Raises:
        ValueError: The name of a token is not a text.
    """
    roles = {}
    for role in ("bos", "eos", "pad"):
        key = f"{role}_token"
        file, content = (origins or {}).get(key, "tokenizer_config.json"), token_content(config.get(key))
        if content is None:
            continue
        if not isinstance(content, str):
            raise ValueError(f"{file}: {key} is not a text but {content!r:.40}")
        if content in ids:
            roles[role] = ids[content]
        else:
            _log.warning("%s names %s %r, which has no id: it is ignored", file, key, content)
    return roles


def token_content(entry: Any) -> str | None:
    """The text of a token in tokenizer_config.json: the entry is the text, or an object with the text as `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry


def token_variables(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the other `*_token` entries as texts, which are variables of a chat template."""
    contents = {key: token_content(value) for key, value in config.items() if key.endswith("_token")}
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def extra_tokens(config: Mapping[str, Any]) -> list[str]:
    """The texts in `additional_special_tokens`, which transformers 5 calls `extra_special_tokens`."""
    texts = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        entries = config.get(key)
        entries = entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ()
        texts += [content for entry in entries if isinstance(content := token_content(entry), str) and content]
    return texts


def flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A setting that is true or false; null is the default. Raises ValueError for anything else."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"tokenizer_config.json: {name} must be true or false, not {value!r:.40}")
    return value
