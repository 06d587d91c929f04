"""Trains tokenizers on a corpus: SentencePiece pieces, or single characters."""

import io
import os
from collections.abc import Iterable, Sequence

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from garrulax.hub.tokenizers import GPT_SPECIALS, JsonTokenizer, SentencePieceTokenizer

_PASSAGE = 4096  # characters; the trainer expects sentences, and passages of this length serve as well


def train_sentencepiece(
    texts: Iterable[str],
    folder: str | os.PathLike | None = None,
    vocab: int = 4096,
    specials: Sequence[str] = GPT_SPECIALS,
    model_type: str = "bpe",
) -> SentencePieceTokenizer:
    """Trains a SentencePiece tokenizer that decodes every text exactly as it was.

    It does not normalise, encodes unknown characters as bytes, and has tokens for newline and tab. The same texts give
    the same tokenizer, byte for byte.

    Args:
        texts: Documents; about the first 64 Mi characters are used.
        folder: Where to save it; None does not save it.
        vocab: Number of ids, including 256 bytes and the control tokens.
        specials: Control tokens, with ids from 1 on. `<|endoftext|>` among them becomes eos, and pad unless there is
            `[PAD]`.
        model_type: "bpe" (4096 ids from 12 MB in about 2 s) or "unigram" (5 % fewer tokens, ten times slower).

    Raises:
        ValueError: There is no text, the text is too short for `vocab`, or `vocab` is too small for bytes and control
            tokens.
    """
    if model_type not in ("bpe", "unigram"):
        raise ValueError(f"model_type must be 'bpe' or 'unigram', not {model_type!r}")
    least = 256 + 1 + len(specials) + 2 + 1  # bytes, unknown, control tokens, newline and tab, one learned piece
    if vocab < least:
        raise ValueError(
            f"a vocabulary of {vocab} is too small: bytes and control tokens need {least}, so use 512 or more"
        )
    has_eos = "<|endoftext|>" in specials
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_passages(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            user_defined_symbols=["\n", "\t"],
            control_symbols=[name for name in specials if name != "<|endoftext|>"],
            unk_id=0,
            bos_id=-1,
            pad_id=-1,
            eos_id=1 if has_eos else -1,
            eos_piece="<|endoftext|>",
            max_sentence_length=4 * _PASSAGE,
            num_threads=4,  # fixed: it influences the result of unigram models
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab)) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    tokenizer.pad = tokenizer.specials.get("[PAD]", tokenizer.eos)
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def _passages(texts: Iterable[str], limit: int = 2**26) -> Iterable[str]:
    """The texts in passages, until `limit` characters are reached."""
    count = 0
    for text in texts:
        for at in range(0, len(text), _PASSAGE):
            yield text[at : at + _PASSAGE]
            count += _PASSAGE
            if count >= limit:
                return


def _explain(error: str, vocab: int) -> str:
    """A clear message for each of the three usual errors of the trainer."""
    if "Vocabulary size too high" in error:
        most = error.rsplit("<=", 1)[-1].strip(" .")
        return f"the text supports a vocabulary of at most {most}, not {vocab}: lower the vocabulary or add text"
    if "smaller than required_chars" in error:
        return f"a vocabulary of {vocab} cannot hold the characters of this text: raise it"
    if "sentences_.empty()" in error:
        return "no text to train a tokenizer on: the corpus is empty"
    return f"training the tokenizer failed: {error}"


def train_chars(
    text: str | Iterable[str], folder: str | os.PathLike | None = None, specials: Sequence[str] = ()
) -> JsonTokenizer:
    """A tokenizer with one id for each character of `text`, in code point order, followed by the control tokens.

    For character-level models, such as those of the 65 characters of tinyshakespeare. Its `encode` raises ValueError
    for other characters.

    Args:
        text: One text or several.
        folder: Where to save it; None does not save it.
        specials: Control tokens of two characters or more.

    Raises:
        ValueError: There is no text, or a control token is too short.
    """
    characters = sorted(set(text) if isinstance(text, str) else set().union(*map(set, text)))
    if not characters:
        raise ValueError("no text to train a tokenizer on: the corpus is empty")
    if bad := [name for name in specials if len(name) < 2]:
        raise ValueError(f"control tokens need names of two characters or more, not {bad}")
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab={c: i for i, c in enumerate(characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(specials))
    trained = JsonTokenizer(tokenizer)
    trained.pad = trained.specials.get("[PAD]", trained.eos)
    if folder is not None:
        trained.save(folder)
    return trained
