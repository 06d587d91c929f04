"""The JSON files and chat templates beside a tokenizer file; a fault in them is an error that names file and key."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from garrulax.hub.files import is_file, is_there, read_text
from garrulax.hub.json_files import read_object
from garrulax.hub.tokenizers import families
from garrulax.hub.tokenizers.chat import named_templates
from garrulax.hub.tokenizers.token_config import token_content

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


@dataclasses.dataclass(frozen=True)
class JsonFiles:
    """Content of the JSON files beside a tokenizer file.

    Attributes:
        config: tokenizer_config.json, completed with special_tokens_map.json and the files of chat templates.
        origins: Key of `config` -> name of the file that has it.
        model: Config.json.
        generation: generation_config.json.
        listed: Text -> id of the control tokens that files list.
        ordinary: Text -> id of the added tokens that files list as ordinary ones.
        named: Texts of all added tokens that files name, control tokens or not.
    """

    config: dict[str, Any]
    origins: dict[str, str]
    model: dict[str, Any]
    generation: dict[str, Any]
    listed: dict[str, int]
    ordinary: dict[str, int]
    named: frozenset[str]

    def family(self, file: str, ranks: int = 0) -> str | None:
        """The family of the tokenizer `file`, or None."""
        return families.recognise(file, self.config, self.model, self.named, ranks)

    def settings(self, family: str | None, added: Collection[str]) -> dict[str, Any]:
        """tokenizer_config.json, completed with the facts of the family."""
        return families.complete_config(family, self.config, self.generation, added)


def read_json_files(folder: Path) -> JsonFiles:
    """The JSON files of a folder that say something about its tokenizer.

    Raises:
        FileNotFoundError: A file is a link to nothing.
        ValueError: A file is damaged, a value in it is of the wrong kind, or two files contradict each other.
    """
    names = (MAP, CONFIG, "config.json", "generation_config.json", ADDED)
    tokens, config, model, generation, added = (_read(folder / name) for name in names)
    for name, content in ((MAP, tokens), (CONFIG, config)):
        _check_kinds(folder / name, content)
    _check_ids(folder / ADDED, added)
    decoder = _decoder(folder / CONFIG, config)
    _check_agreement(folder, decoder, added)
    origins = dict.fromkeys(tokens, MAP) | dict.fromkeys(config, CONFIG)
    config = tokens | config
    if (templates := _chat_templates(folder, config)) is not None:
        config["chat_template"] = templates
    listed: dict[str, int] = dict(added)
    ordinary: dict[str, int] = {}
    for token, entry in decoder.items():
        (listed if entry.get("special") else ordinary)[entry["content"]] = token
    return JsonFiles(config, origins, model, generation, listed, ordinary, frozenset((*listed, *ordinary)))


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if is_there(path) else {}


def _chat_templates(folder: Path, config: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The entry `chat_template` with the templates in files, which take precedence; None if there are no such files."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if is_file(main := folder / "chat_template.jinja"):
        files["default"] = main
    found = {name: read_text(path) for name, path in files.items() if is_there(path)}
    if "default" not in found and (more := _read(folder / "chat_template.json").get("chat_template")):
        found |= named_templates(more)
    if not found:
        return None
    found = named_templates(config.get("chat_template")) | found
    if found.keys() == {"default"}:
        return found["default"]
    return [{"name": name, "template": source} for name, source in found.items()]  # as transformers writes several


# -- Checks -----------------------------------------------------------------------------------------------------------


def _check_kinds(path: Path, content: Mapping[str, Any]) -> None:
    """Raises ValueError if a token is not a text, or one of the lists of tokens not a list of texts."""
    for key in ("bos_token", "eos_token", "pad_token"):
        if content.get(key) is not None and not isinstance(token_content(content[key]), str):
            raise ValueError(f"{path}: {key} is not a text but {content[key]!r:.60}")
    if not isinstance(content.get("tokenizer_class"), str | None):
        raise ValueError(f"{path}: tokenizer_class is not a text but {content['tokenizer_class']!r:.60}")
    for key in ("additional_special_tokens", "extra_special_tokens"):
        entries = content.get(key) or []
        texts = entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else [None]
        if not all(isinstance(token_content(entry), str) for entry in texts):
            raise ValueError(f"{path}: {key} is not a list of texts but {entries!r:.60}")


def _decoder(path: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """added_tokens_decoder: id -> token. Raises ValueError if it is something else."""
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: added_tokens_decoder is not an object but {entries!r:.60}")
    found: dict[int, dict[str, Any]] = {}
    texts: set[str] = set()
    for token, entry in entries.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 12):
            raise ValueError(f"{path}: added_tokens_decoder has the key {token[:40]!r}, which is no id of a token")
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ValueError(
                f"{path}: added_tokens_decoder has at {token} no object with a text as content but {entry!r:.60}"
            )
        if int(token) in found or entry["content"] in texts:
            raise ValueError(f"{path}: added_tokens_decoder names {entry['content'][:40]!r} or its id {token} twice")
        found[int(token)] = entry
        texts.add(entry["content"])
    return found


def _check_ids(path: Path, added: Mapping[str, Any]) -> None:
    odd = next((text for text, token in added.items() if type(token) is not int or not 0 <= token < 10**11), None)
    if odd is not None:
        raise ValueError(f"{path}: {odd[:40]!r} has no id but {added[odd]!r:.60}")


def _check_agreement(folder: Path, decoder: Mapping[int, Mapping[str, Any]], added: Mapping[str, int]) -> None:
    """Raises ValueError if the two files give a text two ids, or an id two texts.

    Two texts of one id in added_tokens.json alone are no contradiction: GLM's Chinese models have them.
    """
    texts: dict[int, list[str]] = {}
    for text, token in added.items():
        texts.setdefault(token, []).append(text)
    for token, entry in decoder.items():
        content = entry["content"]
        if added.get(content, token) != token:
            both = f"{content[:40]!r} has the id {token} in {CONFIG}, but {added[content]} in {ADDED}"
        elif content not in texts.get(token, [content]):
            both = f"the id {token} is {content[:40]!r} in {CONFIG}, but {texts[token][0][:40]!r} in {ADDED}"
        else:
            continue
        raise ValueError(f"the tokens added to {folder} contradict each other: {both}; correct or remove one of them")
