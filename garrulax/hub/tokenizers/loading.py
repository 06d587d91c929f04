"""Finding and reading the tokenizer of a folder."""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from garrulax.hub.json_files import read_object
from garrulax.hub.tokenizers import families, ranks
from garrulax.hub.tokenizers.base import Tokenizer
from garrulax.hub.tokenizers.ice import IceTokenizer
from garrulax.hub.tokenizers.library import EOS_NAMES, JsonTokenizer
from garrulax.hub.tokenizers.pieces import SentencePieceTokenizer

#: A vocabulary in JSON and the file of its merges: as Hugging Face names them, and openai/finetune-transformer-lm.
MERGES = {"vocab.json": "merges.txt", "encoder_bpe_40000.json": "vocab_40000.bpe"}


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a file (`*.model`, `tokenizer.json`, ...) or in a folder that holds one.

    A folder may hold tokenizer.json, tokenizer.model (or any single *.model, of SentencePiece or tiktoken), vocab.json
    with merges.txt, or vocab.txt. Names of bos, eos and pad come from tokenizer_config.json or special_tokens_map.json
    beside it, further control tokens from added_tokens.json, a chat template from tokenizer_config.json or
    chat_template.jinja. What the code of a family would add is known to `families`; without all that eos is the model's
    own, or a control token named like <|endoftext|>.

    Raises FileNotFoundError if there is none, ValueError if the file is not what its name says.
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
    """The file that says most about the tokenizer of a folder, or None. ValueError for several *.model."""
    pieces = sorted(file.name for file in folder.glob("*.model"))
    names = ["tokenizer.json", "tokenizer.model", *pieces[:1], *MERGES, "vocab.txt"]
    found = next((name for name in names if (folder / name).is_file()), None)
    if found in pieces and found != "tokenizer.model" and len(pieces) > 1:
        raise ValueError(f"{folder} has several tokenizers ({', '.join(pieces)}): give the path of one of them")
    return None if found is None else folder / found


@dataclasses.dataclass(frozen=True)
class _Folder:
    """What the JSON files beside a tokenizer say. listed: control tokens. named: all added tokens."""

    config: dict[str, Any]
    model: dict[str, Any]
    generation: dict[str, Any]
    listed: dict[str, int]
    named: frozenset[str]

    def family(self, file: str, ranks: int = 0) -> str | None:
        return families.recognise(file, self.config, self.model, self.named, ranks)

    def settings(self, family: str | None, added: Collection[str]) -> dict[str, Any]:
        return families.complete(family, self.config, self.generation, added)


def _read_folder(folder: Path) -> _Folder:
    names = ("special_tokens_map.json", "tokenizer_config.json", "config.json", "generation_config.json")
    tokens, config, model, generation = (_read_json(folder / name) for name in names)
    config = tokens | config
    if (template := folder / "chat_template.jinja").is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    listed = _read_json(folder / "added_tokens.json")
    named = frozenset(listed)
    for token, entry in config.get("added_tokens_decoder", {}).items():
        named |= {entry["content"]}
        if entry.get("special"):
            listed[entry["content"]] = int(token)
    return _Folder(config, model, generation, listed, named)


def _load_file(file: Path) -> Tokenizer:
    folder = _read_folder(file.parent)
    if file.suffix == ".model":
        content = file.read_bytes()
        return (_from_ranks if ranks.is_ranks(content) else _from_pieces)(file.name, content, folder)
    if file.name == "tokenizer.json":
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))  # holds its added tokens
        specials = frozenset(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
        folder = dataclasses.replace(folder, named=specials)
        family = folder.family(file.name)
        return families.adopt(JsonTokenizer(tokenizer, folder.settings(family, specials)), family)
    if file.name in MERGES:
        return _assembled(_bpe(file, file.with_name(MERGES[file.name])), folder, folder.family(file.name))
    if file.name == "vocab.txt":
        lowercase = folder.config.get("do_lower_case", True)
        return _assembled(_bert(file, lowercase), folder, folder.family(file.name))
    raise ValueError("unknown kind of file; expected *.model, tokenizer.json, vocab.json or vocab.txt")


def _from_ranks(name: str, content: bytes, folder: _Folder) -> Tokenizer:
    table = ranks.read_ranks(content)
    family = folder.family(name, len(table))
    if family is None and not folder.listed:
        raise ValueError(
            f"of a tiktoken file of {len(table)} ranks the control tokens are not known: list them in "
            "added_tokens.json, or name the tokenizer_class (such as ChatGLM4Tokenizer) in tokenizer_config.json"
        )
    return _assembled(ranks.from_ranks(table), folder, family)


def _from_pieces(name: str, content: bytes, folder: _Folder) -> Tokenizer:
    family = folder.family(name)
    sp = sentencepiece.SentencePieceProcessor(model_proto=content)
    added = families.added_tokens(family, sp.vocab_size(), folder.listed)
    config = folder.settings(family, added)
    tokenizer: SentencePieceTokenizer
    if family in ("chatglm", "glm130b"):
        if folder.model.get("vocab_size", 150_528) < 150_000:  # the second release moved the ids down
            config = {"num_image_tokens": 0} | config
        tokenizer = IceTokenizer(content, added, config)
    else:
        roles = [config[key] for key in families.ROLE_IDS if key in config]
        tokenizer = SentencePieceTokenizer(content, {sp.id_to_piece(i): i for i in roles} | added, config)
    tokenizer.file = name
    return families.adopt(tokenizer, family)


def _assembled(tokenizer: tokenizers.Tokenizer, folder: _Folder, family: str | None) -> Tokenizer:
    """`tokenizer` with its control tokens, which must get the ids that the files give them, and its prefix."""
    added = families.added_tokens(family, tokenizer.get_vocab_size(), folder.listed)
    config = folder.settings(family, added)
    own = [content for content in families.names_of(config).values() if tokenizer.token_to_id(content) is not None]
    tokenizer.add_special_tokens(own)
    for content, token in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([content])
        if tokenizer.token_to_id(content) != token:
            raise ValueError(
                f"token {content!r} would have id {tokenizer.token_to_id(content)}, but its file says {token}"
            )
    if family is not None and (prefix := families.FAMILIES[family].prefix):
        # As other libraries read it from the tokenizer.json that `save` writes.
        ids = [(content, tokenizer.token_to_id(content)) for content in prefix]
        single, pair = ([*prefix, *texts] for texts in (["$A"], ["$A", "$B"]))
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return families.adopt(JsonTokenizer(tokenizer, config), family)


def _bpe(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE in the files that openai/gpt-2 published, or GPT-1's, whose words end in </w>."""
    if not merges.exists():
        raise FileNotFoundError(f"no tokenizer: {vocab} needs a {merges.name} beside it")
    if 4 * sum(token.endswith("</w>") for token in _read_json(vocab)) > len(_read_json(vocab)):
        return _gpt1(vocab, merges)
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in EOS_NAMES if tokenizer.token_to_id(name) is not None])
    return tokenizer


def _gpt1(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """GPT-1's BPE behind BERT's lower-casing and splitting, as in transformers without spaCy: newlines are spaces."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE.from_file(str(vocab), str(merges), unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def _bert(vocab: Path, lowercase: bool) -> tokenizers.Tokenizer:
    """WordPiece in the files that google-research/bert published (GLM-base and -large use them)."""
    wordpiece = tokenizers.BertWordPieceTokenizer(str(vocab), lowercase=lowercase)
    return tokenizers.Tokenizer.from_str(wordpiece.to_str())


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
