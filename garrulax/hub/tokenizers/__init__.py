"""Tokenizers: text to token ids and back, whatever the file format.

One interface, `Tokenizer`, over

    SentencePieceTokenizer   a SentencePiece `.model` (LLaMA-1/2, Baichuan, ChatGLM2/3, GLM-Chinese, our own training)
    IceTokenizer             ice_text.model, SentencePiece with tokens for whitespace (ChatGLM-6B, GLM-130B)
    JsonTokenizer            a `tokenizer.json`; vocab.json + merges.txt (GPT-2; GPT-1, whose words end in </w>);
                             BERT's vocab.txt; tiktoken's rank files (LLaMA-3, GLM-4)
    ByteTokenizer            UTF-8 bytes, nothing to train

Three rules hold for all of them. *Control tokens cannot be forged*: `encode` reads plain text, so no text, not even the
text "<|endoftext|>", encodes to a control token; programs insert those by id, from `specials`, and `prompt` and
`apply_chat_template` put them where a model expects them. *Decoding is bytes*: a token stands for a byte string, a text
is the concatenation decoded as UTF-8; hence streaming and decoding at once give the same text. *Files are data*: what
kind of tokenizer a folder holds is read off its files (`families`), never by running the code that lies beside them.
"""

from garrulax.hub.tokenizers.base import GLM_SPECIALS, GPT_SPECIALS, Message, StreamDecoder, Tokenizer
from garrulax.hub.tokenizers.ice import IceTokenizer
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
