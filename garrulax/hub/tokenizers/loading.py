"""Finds the tokenizer of a folder and reads it, whatever its format.

The work has three steps: `find_tokenizer` chooses a file; `_read_json_files` reads the JSON files beside it;
`_load_file` builds the tokenizer, with the facts of its family (`families`), which the files do not state.
"""

import codecs
import dataclasses
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from garrulax.hub.json_files import read_object
from garrulax.hub.tokenizers import families, token_config
from garrulax.hub.tokenizers.base import Tokenizer
from garrulax.hub.tokenizers.chat import named_templates
from garrulax.hub.tokenizers.ice import IceTokenizer
from garrulax.hub.tokenizers.library import EOS_NAMES, JsonTokenizer
from garrulax.hub.tokenizers.pieces import SentencePieceTokenizer
from garrulax.hub.tokenizers.ranks import is_ranks, read_ranks, tokenizer_from_ranks

_log = logging.getLogger(__name__)
#: File of a vocabulary -> file of its merges, as Hugging Face and as openai/finetune-transformer-lm name them.
MERGES = {"vocab.json": "merges.txt", "encoder_bpe_40000.json": "vocab_40000.bpe"}


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a file or in a folder.

    A folder may hold tokenizer.json, tokenizer.model (or any single *.model, of SentencePiece or tiktoken), vocab.json
    with merges.txt, or vocab.txt. Names of bos, eos and pad come from tokenizer_config.json or special_tokens_map.json
    beside it, further control tokens from added_tokens.json or tokenizer_config.json. Facts that only the code of a
    family states come from `families`. If no source names eos, it is the eos of the SentencePiece model, or else a
    control token with a usual name, such as <|endoftext|>.

    Chat templates come from additional_chat_templates/NAME.jinja, and the one named "default" from chat_template.jinja,
    chat_template.json or tokenizer_config.json, in this order.

    Args:
        path: A tokenizer file (`*.model`, `tokenizer.json`, ...) or a folder that holds one.

    Raises:
        FileNotFoundError: There is no tokenizer.
        ValueError: The content of a file does not fit its name.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}: no such file or folder")
    file = path if path.is_file() else find_tokenizer(path)
    if file is None:
        named = _read_json(path / "tokenizer_config.json").get("tokenizer_class")
        raise FileNotFoundError(
            f"no tokenizer in {path}{f' of class {named}' if named else ''}: expected tokenizer.json, tokenizer.model, "
            "vocab.json with merges.txt, or vocab.txt"
        )
    try:
        return _load_file(file)
    except FileNotFoundError:
        raise
    except Exception as error:  # both libraries raise bare RuntimeError or Exception on a damaged file
        raise ValueError(f"cannot read the tokenizer {file}: {' '.join(str(error).split())}") from error


def find_tokenizer(folder: Path) -> Path | None:
    """The file from which to read the tokenizer of a folder, or None if there is none.

    If there are several, the one that states most is taken. tokenizer.json comes first, since it contains the whole
    tokenizer with its control tokens. A .model lacks the control tokens but has the pieces and their scores. The
    vocabularies in vocab.json and vocab.txt need further files or assumptions.

    Raises:
        ValueError: There are several *.model, and no file of a higher rank decides.
    """
    pieces = sorted(file.name for file in folder.glob("*.model"))
    names = ["tokenizer.json", "tokenizer.model", *pieces[:1], *MERGES, "vocab.txt"]
    found = next((name for name in names if (folder / name).is_file()), None)
    if found in pieces and found != "tokenizer.model" and len(pieces) > 1:
        raise ValueError(f"{folder} has several tokenizers ({', '.join(pieces)}): give the path of one of them")
    return None if found is None else folder / found


@dataclasses.dataclass(frozen=True)
class _JsonFiles:
    """Content of the JSON files beside a tokenizer file.

    Attributes:
        config: tokenizer_config.json, completed with special_tokens_map.json and the files of chat templates.
        model: Config.json.
        generation: generation_config.json.
        listed: Text -> id of the control tokens that files list.
        ordinary: Text -> id of the added tokens that files list as ordinary ones.
        named: Texts of all added tokens that files name, control tokens or not.
    """

    config: dict[str, Any]
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


def _read_json_files(folder: Path) -> _JsonFiles:
    names = ("special_tokens_map.json", "tokenizer_config.json", "config.json", "generation_config.json")
    tokens, config, model, generation = (_read_json(folder / name) for name in names)
    config = tokens | config
    if (templates := _chat_templates(folder, config)) is not None:
        config["chat_template"] = templates
    listed: dict[str, int] = _read_json(folder / "added_tokens.json")
    ordinary: dict[str, int] = {}
    for token, entry in (config.get("added_tokens_decoder") or {}).items():
        (listed if entry.get("special") else ordinary)[entry["content"]] = int(token)
    return _JsonFiles(config, model, generation, listed, ordinary, frozenset((*listed, *ordinary)))


def _chat_templates(folder: Path, config: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The entry `chat_template` with the templates in files, which take precedence; None if there are no such files."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (main := folder / "chat_template.jinja").is_file():
        files["default"] = main
    found = {name: path.read_text(encoding="utf-8-sig") for name, path in files.items()}
    if "default" not in found and (more := _read_json(folder / "chat_template.json").get("chat_template")):
        found |= named_templates(more)
    if not found:
        return None
    found = named_templates(config.get("chat_template")) | found
    if found.keys() == {"default"}:
        return found["default"]
    return [{"name": name, "template": source} for name, source in found.items()]  # as transformers writes several


def _load_file(file: Path) -> Tokenizer:
    """The tokenizer in `file`, read by its name; a .model by its content."""
    beside = _read_json_files(file.parent)
    if file.suffix == ".model":
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        return (_load_ranks if is_ranks(content) else _load_sentencepiece)(file.name, content, beside)
    if file.name == "tokenizer.json":
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8-sig"))
        _add_listed(tokenizer, beside)
        specials = frozenset(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
        beside = dataclasses.replace(beside, named=specials)  # tokenizer.json itself lists its added tokens
        family = beside.family(file.name)
        return families.apply_family(JsonTokenizer(tokenizer, beside.settings(family, specials)), family)
    if file.name in MERGES:
        return _assemble(_bpe(file, file.with_name(MERGES[file.name]), beside.config), beside, beside.family(file.name))
    if file.name == "vocab.txt":
        return _assemble(_bert(file, beside.config), beside, beside.family(file.name))
    raise ValueError("unknown kind of file; expected *.model, tokenizer.json, vocab.json or vocab.txt")


def _load_ranks(name: str, content: bytes, beside: _JsonFiles) -> Tokenizer:
    ranks = read_ranks(content)
    family = beside.family(name, len(ranks))
    if family is None and not beside.listed:
        raise ValueError(
            f"of a tiktoken file of {len(ranks)} ranks the control tokens are not known: list them in "
            "added_tokens.json, or name the tokenizer_class (such as ChatGLM4Tokenizer) in tokenizer_config.json"
        )
    return _assemble(tokenizer_from_ranks(ranks), beside, family)


def _load_sentencepiece(name: str, content: bytes, beside: _JsonFiles) -> Tokenizer:
    family = beside.family(name)
    sp = sentencepiece.SentencePieceProcessor(model_proto=content)
    added = families.added_tokens(family, sp.vocab_size(), beside.listed)
    config = beside.settings(family, added)
    tokenizer: SentencePieceTokenizer
    if family in ("chatglm", "glm130b"):
        # ChatGLM-6B's first release has 150,528 ids, 20,000 of them for pictures; its second release dropped these.
        if beside.model.get("vocab_size", 150_528) < 150_000:
            config = {"num_image_tokens": 0} | config
        tokenizer = IceTokenizer(content, added, config)
    else:
        roles = [config[key] for key in families.ROLE_IDS if key in config]
        tokenizer = SentencePieceTokenizer(content, {sp.id_to_piece(i): i for i in roles} | added, config)
    tokenizer.file = name
    return families.apply_family(tokenizer, family)


def _assemble(tokenizer: tokenizers.Tokenizer, beside: _JsonFiles, family: str | None) -> Tokenizer:
    """Adds control tokens and the family's prefix. Raises ValueError if a token would not get the id in its file."""
    added = families.added_tokens(family, tokenizer.get_vocab_size(), beside.listed)
    config = beside.settings(family, added)
    own = (*token_config.token_variables(config).values(), *token_config.extra_tokens(config))
    tokenizer.add_special_tokens([content for content in own if tokenizer.token_to_id(content) is not None])
    for content, token in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([content])
        if tokenizer.token_to_id(content) != token:
            raise ValueError(
                f"token {content!r} would have id {tokenizer.token_to_id(content)}, but its file says {token}"
            )
    prefix = () if family is None else families.TOKENIZER_FAMILIES[family].prefix
    if not prefix and token_config.flag(config, "add_bos_token"):
        bos = token_config.token_content(config.get("bos_token"))
        if bos is None or tokenizer.token_to_id(bos) is None:
            raise ValueError(f"tokenizer_config.json: add_bos_token needs a bos_token that has an id, not {bos!r}")
        prefix = (bos,)
    if prefix:
        # In the tokenizer.json that `save` writes, other libraries find the prefix in the post-processor.
        ids = [(content, tokenizer.token_to_id(content)) for content in prefix]
        single, pair = ([*prefix, *texts] for texts in (["$A"], ["$A", "$B"]))
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return families.apply_family(JsonTokenizer(tokenizer, config), family)


def _add_listed(tokenizer: tokenizers.Tokenizer, beside: _JsonFiles) -> None:
    """Adds the tokens that files beside a tokenizer.json list and it lacks, but none that would get another id."""
    for content, token in sorted((beside.ordinary | beside.listed).items(), key=lambda item: item[1]):
        known = tokenizer.token_to_id(content)
        if known is None and token == max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1:
            is_control = content in beside.listed
            (tokenizer.add_special_tokens if is_control else tokenizer.add_tokens)([content])
        elif known != token:
            _log.warning(
                "token %r is left out: its file says id %d, tokenizer.json has %s", content, token,
                "no place for it" if known is None else f"it at {known}",
            )  # fmt: skip
        elif content in beside.listed:
            tokenizer.add_special_tokens([content])


def _bpe(vocab: Path, merges: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE as openai/gpt-2 published it, or GPT-1's BPE, recognised by the many tokens that end in </w>."""
    if not merges.exists():
        raise FileNotFoundError(f"no tokenizer: {vocab} needs a {merges.name} beside it")
    ids, pairs = _read_json(vocab), _read_merges(merges)
    if 4 * sum(token.endswith("</w>") for token in ids) > len(ids):
        return _gpt1(ids, pairs)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    add_prefix_space = token_config.flag(config, "add_prefix_space")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in EOS_NAMES if tokenizer.token_to_id(name) is not None])
    return tokenizer


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges in a file: two tokens a line, after lines of comment."""
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{path.name}: line {number} is not two tokens: {line[:40]!r}")
        merges.append((pair[0], pair[1]))
    return merges


def _gpt1(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """GPT-1's BPE after BERT's lower-casing and splitting, as in transformers without spaCy: newlines become spaces."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def _bert(vocab: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """WordPiece as google-research/bert published it; GLM-base and -large use it."""
    if not token_config.flag(config, "do_basic_tokenize", default=True):
        raise ValueError("tokenizer_config.json: do_basic_tokenize=false is not implemented")
    words = vocab.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    wordpiece = tokenizers.BertWordPieceTokenizer(
        {word.rstrip(): i for i, word in enumerate(words)},
        lowercase=token_config.flag(config, "do_lower_case", default=True),
        handle_chinese_chars=token_config.flag(config, "tokenize_chinese_chars", default=True),
        strip_accents=None if config.get("strip_accents") is None else token_config.flag(config, "strip_accents"),
    )
    return tokenizers.Tokenizer.from_str(wordpiece.to_str())


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
