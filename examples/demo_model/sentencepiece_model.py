"""Write ``tokenizer.model`` from ``tokenizer.json``: llama.cpp's converter reads Phi-3's vocabulary from no other file.

A SentencePiece model of type BPE is a list of pieces with scores. llama.cpp joins the two neighbouring pieces whose
union has the highest score, again and again; a BPE in ``tokenizer.json`` joins the pair of the lowest rank. So minus
the rank as the score gives the same tokens, if no other pair of pieces joins to the same text: compare both on text.

    tokenizer.json                     piece                        type
    special tokens before the table    as they are                  unknown for <unk>, else control
    "<0x0A>"                           as it is                     byte
    "▁the" (SentencePiece's own)       as it is                     normal
    "Ġthe" (byte level)                "▁the"                       normal
    "h", "Ł" (byte level, one byte)    "<0x68>", "<0xA1>"           byte; normal for the space, "▁"

The file is a protocol buffer: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
_BPE = 2


def write_sentencepiece_model(folder: Path) -> None:
    """Write ``folder/tokenizer.model`` from the BPE in ``folder/tokenizer.json``."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = b"".join(_field(1, _piece(*piece)) for piece in _pieces(tokenizer))
    trainer_spec = _varint_field(3, _BPE) + _varint_field(35, 1)  # model_type, byte_fallback
    model += _field(2, trainer_spec) + _field(3, _field(1, b"identity"))
    (folder / "tokenizer.model").write_bytes(model)


def _pieces(tokenizer: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Return text, score and type of each id of the table."""
    bpe, special = tokenizer["model"], {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(bpe["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    is_byte_level, alphabet = not bpe["byte_fallback"], _byte_alphabet()
    pieces = []
    for text, position in sorted(bpe["vocab"].items(), key=lambda item: item[1]):
        assert position == len(pieces), f"the table skips an id before {text!r}"
        score, kind = -float(ranks.get(text, len(ranks))), NORMAL
        if text in special:
            kind = UNKNOWN if text == "<unk>" else CONTROL
        elif is_byte_level:
            raw = bytes(alphabet[character] for character in text)
            kind = BYTE if len(raw) == 1 and raw != b" " else NORMAL
            text = f"<0x{raw[0]:02X}>" if kind == BYTE else raw.decode().replace(" ", "▁")
        elif text.startswith("<0x"):
            kind = BYTE
        pieces.append((text, score, kind))
    if is_byte_level:  # sentencepiece wants all 256; the converter takes the added tokens' texts from tokenizer.json
        free = max(position for text, position in special.items() if text not in ("<unk>", "<s>", "</s>"))
        pieces[free] = ("<0x20>", 0.0, BYTE)
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """Return the character that stands for a byte in a byte-level BPE -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _varint_field(3, kind)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


if __name__ == "__main__":
    write_sentencepiece_model(Path(sys.argv[1]))
