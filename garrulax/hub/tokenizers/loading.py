"""Finds the tokenizer of a folder and reads it, whatever its format.

The work has three steps: `find_tokenizer` chooses a file; `_read_json_files` reads the JSON files beside it;
`_load_file` builds the tokenizer, with the facts of its family (`families`), which the files do not state.
"""

import dataclasses
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
from garrulax.hub.tokenizers.ice import IceTokenizer
from garrulax.hub.tokenizers.library import EOS_NAMES, JsonTokenizer
from garrulax.hub.tokenizers.pieces import SentencePieceTokenizer
from garrulax.hub.tokenizers.ranks import is_ranks, read_ranks, tokenizer_from_ranks

#: File of a vocabulary -> file of its merges, as Hugging Face and as openai/finetune-transformer-lm name them.
MERGES = {"vocab.json": "merges.txt", "encoder_bpe_40000.json": "vocab_40000.bpe"}


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a file or in a folder.

    A folder may hold tokenizer.json, tokenizer.model (or any single *.model, of SentencePiece or tiktoken), vocab.json
    with merges.txt, or vocab.txt. Names of bos, eos and pad come from tokenizer_config.json or special_tokens_map.json
    beside it, further control tokens from added_tokens.json, a chat template from tokenizer_config.json or
    chat_template.jinja. Facts that only the code of a family states come from `families`. If no source names eos, it is
    the eos of the SentencePiece model, or else a control token with a usual name, such as <|endoftext|>.

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
        config: tokenizer_config.json, completed with special_tokens_map.json and chat_template.jinja.
        model: Config.json.
        generation: generation_config.json.
        listed: Text -> id of the control tokens that files list.
        named: Texts of all added tokens that files name, control tokens or not.
    """

    config: dict[str, Any]
    model: dict[str, Any]
    generation: dict[str, Any]
    listed: dict[str, int]
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
    if (template := folder / "chat_template.jinja").is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    listed = _read_json(folder / "added_tokens.json")
    named = frozenset(listed)
    for token, entry in config.get("added_tokens_decoder", {}).items():
        named |= {entry["content"]}
        if entry.get("special"):
            listed[entry["content"]] = int(token)
    return _JsonFiles(config, model, generation, listed, named)


def _load_file(file: Path) -> Tokenizer:
    """The tokenizer in `file`, read by its name; a .model by its content."""
    beside = _read_json_files(file.parent)
    if file.suffix == ".model":
        content = file.read_bytes()
        return (_load_ranks if is_ranks(content) else _load_sentencepiece)(file.name, content, beside)
    if file.name == "tokenizer.json":
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        specials = frozenset(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
        beside = dataclasses.replace(beside, named=specials)  # tokenizer.json itself lists its added tokens
        family = beside.family(file.name)
        return families.apply_family(JsonTokenizer(tokenizer, beside.settings(family, specials)), family)
    if file.name in MERGES:
        return _assemble(_bpe(file, file.with_name(MERGES[file.name])), beside, beside.family(file.name))
    if file.name == "vocab.txt":
        lowercase = beside.config.get("do_lower_case", True)
        return _assemble(_bert(file, lowercase), beside, beside.family(file.name))
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
    own = token_config.token_variables(config).values()
    tokenizer.add_special_tokens([content for content in own if tokenizer.token_to_id(content) is not None])
    for content, token in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([content])
        if tokenizer.token_to_id(content) != token:
            raise ValueError(
                f"token {content!r} would have id {tokenizer.token_to_id(content)}, but its file says {token}"
            )
    if family is not None and (prefix := families.TOKENIZER_FAMILIES[family].prefix):
        # In the tokenizer.json that `save` writes, other libraries find the prefix in the post-processor.
        ids = [(content, tokenizer.token_to_id(content)) for content in prefix]
        single, pair = ([*prefix, *texts] for texts in (["$A"], ["$A", "$B"]))
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return families.apply_family(JsonTokenizer(tokenizer, config), family)


def _bpe(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE as openai/gpt-2 published it, or GPT-1's BPE, recognised by the many tokens that end in </w>."""
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
    """GPT-1's BPE after BERT's lower-casing and splitting, as in transformers without spaCy: newlines become spaces."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE.from_file(str(vocab), str(merges), unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def _bert(vocab: Path, lowercase: bool) -> tokenizers.Tokenizer:
    """WordPiece as google-research/bert published it; GLM-base and -large use it."""
    wordpiece = tokenizers.BertWordPieceTokenizer(str(vocab), lowercase=lowercase)
    return tokenizers.Tokenizer.from_str(wordpiece.to_str())


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
