"""Tokenizers: text to token ids and back, for every file format.

`Tokenizer` is the base class of

    SentencePieceTokenizer   a SentencePiece `.model` (LLaMA-1/2, Baichuan, ChatGLM2/3, GLM-Chinese, our own training)
    IceTokenizer             ice_text.model, SentencePiece with tokens for whitespace (ChatGLM-6B, GLM-130B)
    JsonTokenizer            a `tokenizer.json`; vocab.json + merges.txt (GPT-2; GPT-1, whose words end in </w>);
                             BERT's vocab.txt; tiktoken's rank files (LLaMA-3, GLM-4)
    ByteTokenizer            UTF-8 bytes, nothing to train

Three rules hold for all of them.

* Control tokens cannot be forged. `encode` reads plain text: no text, not even "<|endoftext|>", encodes to a control
  token. Programs insert control tokens by id, from `specials`; `prompt` and `apply_chat_template` put them where a
  model expects them.
* Decoding works on bytes. A token stands for a byte string, and a text is their concatenation, decoded as UTF-8. So
  decoding token by token and decoding at once give the same text.
* Files are data. The kind of tokenizer is recognised from the files of a folder (`families`); code in the folder never
  runs.
"""

from garrulax.hub.tokenizers.base import StreamDecoder, Tokenizer
from garrulax.hub.tokenizers.ice import IceTokenizer
from garrulax.hub.tokenizers.interface import GLM_SPECIALS, GPT_SPECIALS, Message
from garrulax.hub.tokenizers.library import ByteTokenizer, JsonTokenizer
from garrulax.hub.tokenizers.loading import find_tokenizer, load_tokenizer
from garrulax.hub.tokenizers.pieces import SentencePieceTokenizer

__all__ = [
    "GLM_SPECIALS",
    "GPT_SPECIALS",
    "ByteTokenizer",
    "IceTokenizer",
    "JsonTokenizer",
    "Message",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "find_tokenizer",
    "load_tokenizer",
]
