"""ice_text.model: the SentencePiece model of GLM-130B and ChatGLM-6B (THUDM/icetk), with tokens for whitespace."""

import re
import struct
from collections.abc import Mapping
from typing import Any

import sentencepiece

from garrulax.hub.tokenizers.pieces import SentencePieceTokenizer

CONTROLS = ("[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
IMAGES = 20000  # ids of picture tokens before those of the text, in GLM-130B and in ChatGLM-6B's first release
_BLANKS = {" " * length: f"<|blank_{length}|>" for length in range(2, 81)}
_TOKEN_OF = {"\n": "<n>", "\t": "<|tab|>"} | _BLANKS
_SPACE_OF = {token: space for space, token in _TOKEN_OF.items()}
_WHITESPACE = re.compile("\n|\t| {2,80}")
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # SentencePiece.Type


class IceTokenizer(SentencePieceTokenizer):
    """SentencePiece with whitespace tokens: a line break is `<n>`, a tab `<|tab|>`, 2 to 80 spaces `<|blank_k|>`.

    As in the published tokenizer, the text "<n>" decodes to a line break, and "<|blank_4|>" to four spaces.

    Args:
        model: Content of ice_text.model. If it lacks the control, whitespace and byte tokens (icetk's own file does),
            they are appended to its pieces, as the published code does.
        specials: As in SentencePieceTokenizer.
        config: As in SentencePieceTokenizer; `num_image_tokens` (default 20000) is added to every id of the model.
        origins: As in SentencePieceTokenizer.

    Raises:
        ValueError: `num_image_tokens` is not a count.
    """

    file = "ice_text.model"

    def __init__(
        self,
        model: bytes,
        specials: dict[str, int] | None = None,
        config: dict[str, Any] | None = None,
        origins: Mapping[str, str] | None = None,
    ):
        config = {"num_image_tokens": IMAGES} | (config or {})
        offset = config["num_image_tokens"]
        if not isinstance(offset, int) or offset < 0:
            raise ValueError(f"tokenizer_config.json: num_image_tokens must be a count, not {offset!r}")
        model = _with_added_pieces(model)
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = {name: sp.piece_to_id(name) for name in (*CONTROLS, "<unused_0>", "<pad>", "<s>", "</s>")}
        own = {name: i + offset for name, i in ids.items() if i != sp.unk_id()}
        super().__init__(model, own | (specials or {}), config, offset, origins)

    def _prepare(self, text: str) -> str:
        return _WHITESPACE.sub(lambda match: _TOKEN_OF[match[0]], text)

    def _text_of(self, piece: str) -> str:
        return _SPACE_OF.get(piece) or super()._text_of(piece)


def _with_added_pieces(model: bytes) -> bytes:
    """The model with control, whitespace and byte tokens, in the order of icetk's `_configure_tokenizer`."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    if sp.piece_to_id("[gMASK]") != sp.unk_id():
        return model
    pieces = [_piece(name, _CONTROL) for name in CONTROLS]
    pieces += [_piece(name, _USER_DEFINED) for name in ("<|tab|>", *_BLANKS.values())]
    pieces += [_piece(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    byte_fallback = _field(2, bytes([35 << 3 & 0x7F | 0x80, 35 << 3 >> 7, 1]))  # trainer_spec.byte_fallback = true
    return model + b"".join(pieces) + byte_fallback


def _piece(content: str, kind: int) -> bytes:
    """A piece in protobuf: field 1 of the model, which holds 1 the text, 2 the score and 3 the type."""
    return _field(1, _field(1, content.encode()) + b"\x15" + struct.pack("<f", 0.0) + bytes([3 << 3, kind]))


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content  # every length here is below 128: one byte
