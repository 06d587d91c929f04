"""Finds the tokenizer of a folder and reads it, whatever its format.

The work has three steps: `find_tokenizer` chooses a file; `beside.read_json_files` reads the JSON files beside it;
`_load_file` builds the tokenizer, with the facts of its family (`families`), which the files do not state.
"""

import codecs
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from garrulax.hub.files import is_file, is_there, read_text
from garrulax.hub.json_files import read_object
from garrulax.hub.tokenizers import families, token_config
from garrulax.hub.tokenizers.base import Tokenizer
from garrulax.hub.tokenizers.beside import JsonFiles, read_json_files
from garrulax.hub.tokenizers.ice import IceTokenizer
from garrulax.hub.tokenizers.library import EOS_NAMES, JsonTokenizer
from garrulax.hub.tokenizers.pieces import SentencePieceTokenizer
from garrulax.hub.tokenizers.ranks import is_ranks, read_ranks, tokenizer_from_ranks

_log = logging.getLogger(__name__)
#: File of a vocabulary -> file of its merges, as Hugging Face and as openai/finetune-transformer-lm name them.
MERGES = {"vocab.json": "merges.txt", "encoder_bpe_40000.json": "vocab_40000.bpe"}

#: Classes of transformers whose bos is <|endoftext|> where no file names it.
_GPT2_NAMES = ("GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer")
#: Classes whose add_prefix_space, false where it is absent, wins over the one in tokenizer.json.
_SPACED = (*_GPT2_NAMES, "RobertaTokenizer", "Qwen2Tokenizer")
#: model_type -> class, where tokenizer_config.json names none.
_CLASSES = {"gpt2": "GPT2Tokenizer", "gpt_neo": "GPT2Tokenizer", "opt": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer"}


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
    if not is_there(path):
        raise FileNotFoundError(f"no tokenizer at {path}: no such file or folder")
    file = path if path.is_file() else find_tokenizer(path)
    if file is None:
        named = read_json_files(path).config.get("tokenizer_class")
        raise FileNotFoundError(
            f"no tokenizer in {path}{f' of class {named}' if named else ''}: expected tokenizer.json, tokenizer.model, "
            "vocab.json with merges.txt, or vocab.txt"
        )
    beside = read_json_files(file.parent)
    try:
        return _load_file(file, beside)
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
    found = next((name for name in names if is_file(folder / name)), None)
    if found in pieces and found != "tokenizer.model" and len(pieces) > 1:
        raise ValueError(f"{folder} has several tokenizers ({', '.join(pieces)}): give the path of one of them")
    return None if found is None else folder / found


def _load_file(file: Path, beside: JsonFiles) -> Tokenizer:
    """The tokenizer in `file`, read by its name; a .model by its content."""
    if file.suffix == ".model":
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        return (_load_ranks if is_ranks(content) else _load_sentencepiece)(file.name, content, beside)
    if file.name == "tokenizer.json":
        tokenizer = tokenizers.Tokenizer.from_str(read_text(file))
        _set_prefix_space(tokenizer, beside)
        _add_listed(tokenizer, beside)
        specials = frozenset(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
        beside = dataclasses.replace(beside, named=specials)  # tokenizer.json itself lists its added tokens
        family = beside.family(file.name)
        config = beside.settings(family, specials)
        return families.apply_family(JsonTokenizer(tokenizer, config, beside.origins), family)
    if file.name in MERGES:
        return _assemble(_bpe(file, file.with_name(MERGES[file.name]), beside.config), beside, beside.family(file.name))
    if file.name == "vocab.txt":
        return _assemble(_bert(file, beside.config), beside, beside.family(file.name))
    raise ValueError("unknown kind of file; expected *.model, tokenizer.json, vocab.json or vocab.txt")


def _load_ranks(name: str, content: bytes, beside: JsonFiles) -> Tokenizer:
    ranks = read_ranks(content)
    family = beside.family(name, len(ranks))
    if family is None and not beside.listed:
        raise ValueError(
            f"of a tiktoken file of {len(ranks)} ranks the control tokens are not known: list them in "
            "added_tokens.json, or name the tokenizer_class (such as ChatGLM4Tokenizer) in tokenizer_config.json"
        )
    return _assemble(tokenizer_from_ranks(ranks), beside, family)


def _load_sentencepiece(name: str, content: bytes, beside: JsonFiles) -> Tokenizer:
    family = beside.family(name)
    sp = sentencepiece.SentencePieceProcessor(model_proto=content)
    added = families.added_tokens(family, sp.vocab_size(), beside.listed)
    config = beside.settings(family, added)
    tokenizer: SentencePieceTokenizer
    if family in ("chatglm", "glm130b"):
        # ChatGLM-6B's first release has 150,528 ids, 20,000 of them for pictures; its second release dropped these.
        if beside.model.get("vocab_size", 150_528) < 150_000:
            config = {"num_image_tokens": 0} | config
        tokenizer = IceTokenizer(content, added, config, beside.origins)
    else:
        roles = [config[key] for key in families.ROLE_IDS if key in config]
        specials = {sp.id_to_piece(i): i for i in roles} | added
        tokenizer = SentencePieceTokenizer(content, specials, config, origins=beside.origins)
    tokenizer.file = name
    return families.apply_family(tokenizer, family)


def _assemble(tokenizer: tokenizers.Tokenizer, beside: JsonFiles, family: str | None) -> Tokenizer:
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
        if bos is None and "bos_token" not in beside.config and _tokenizer_class(beside) in (None, *_GPT2_NAMES):
            bos = config["bos_token"] = "<|endoftext|>"
        if bos is None:
            _log.warning("tokenizer_config.json: add_bos_token has no effect, since there is no bos_token")
        elif tokenizer.token_to_id(bos) is None:
            raise ValueError(f"tokenizer_config.json: add_bos_token needs a bos_token that has an id, not {bos!r}")
        prefix = () if bos is None else (bos,)
    if prefix:
        # In the tokenizer.json that `save` writes, other libraries find the prefix in the post-processor.
        ids = [(content, tokenizer.token_to_id(content)) for content in prefix]
        single, pair = ([*prefix, *texts] for texts in (["$A"], ["$A", "$B"]))
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return families.apply_family(JsonTokenizer(tokenizer, config, beside.origins), family)


def _tokenizer_class(beside: JsonFiles) -> str | None:
    """The class as which transformers 5 reads the folder, without the ending Fast; None if the files do not say it."""
    model_type = str(beside.model.get("model_type"))
    if model_type == "qwen2":  # whatever tokenizer_config.json names
        return "Qwen2Tokenizer"
    named = beside.config.get("tokenizer_class") or beside.model.get("tokenizer_class") or _CLASSES.get(model_type)
    return named.removesuffix("Fast") if isinstance(named, str) else None


def _set_prefix_space(tokenizer: tokenizers.Tokenizer, beside: JsonFiles) -> None:
    """Lets add_prefix_space decide where a class of transformers does so whatever its tokenizer.json says.

    In a sequence of steps only Qwen2Tokenizer does: there each word gets the space.
    """
    name, step = _tokenizer_class(beside), tokenizer.pre_tokenizer
    if name not in _SPACED or step is None:
        return
    wanted = token_config.flag(beside.config, "add_prefix_space")
    state = json.loads(step.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" and name == "Qwen2Tokenizer" else [state]
    odd = [s for s in steps if s["type"] == "ByteLevel" and s["add_prefix_space"] != wanted]
    for s in odd:
        s["add_prefix_space"] = wanted
    if odd:
        step.__setstate__(json.dumps(state).encode())
        tokenizer.pre_tokenizer = step


def _add_listed(tokenizer: tokenizers.Tokenizer, beside: JsonFiles) -> None:
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
    if not is_there(merges):
        raise FileNotFoundError(f"no tokenizer: {vocab} needs a {merges.name} beside it")
    ids, pairs = read_object(vocab), _read_merges(merges)
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
    for number, line in enumerate(read_text(path).split("\n"), 1):
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
    words = read_text(vocab).removesuffix("\n").split("\n")
    wordpiece = tokenizers.BertWordPieceTokenizer(
        {word.rstrip(): i for i, word in enumerate(words)},
        lowercase=token_config.flag(config, "do_lower_case", default=True),
        handle_chinese_chars=token_config.flag(config, "tokenize_chinese_chars", default=True),
        strip_accents=None if config.get("strip_accents") is None else token_config.flag(config, "strip_accents"),
    )
    return tokenizers.Tokenizer.from_str(wordpiece.to_str())
