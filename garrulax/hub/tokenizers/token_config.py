"""The tokens that tokenizer_config.json names."""

from collections.abc import Mapping
from typing import Any


def role_ids(config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """The ids of bos, eos and pad, as far as tokenizer_config.json names these tokens.

    Args:
        config: The content of tokenizer_config.json.
        ids: Text -> id of all tokens.

    Returns:
        Ids by role: "bos", "eos" or "pad".

    Raises:
        ValueError: `config` names a token that has no id.
    """
    roles = {}
    for role in ("bos", "eos", "pad"):
        content = token_content(config.get(f"{role}_token"))
        if content is None:
            continue
        if content not in ids:
            raise ValueError(f"tokenizer_config.json names {role}_token {content!r}, which the tokenizer does not have")
        roles[role] = ids[content]
    return roles


def token_content(entry: Any) -> str | None:
    """The text of a token in tokenizer_config.json: the entry is the text, or an object with the text as `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry


def token_variables(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the other `*_token` entries as texts, which are variables of a chat template."""
    contents = {key: token_content(value) for key, value in config.items() if key.endswith("_token")}
    return {key: content for key, content in contents.items() if isinstance(content, str)}
