"""Which rows are held out: decided by the text itself, the same in training and in evaluation.  Ground floor.

    residue 0    dev      steers training; never trained on
    residue 1    test     where a data set has no test file of its own (SNIPS)
    the rest     train

A row's residue depends on nothing but its words, so two spellings of one sentence never land on two sides.  Running
text is held out by the pieces that training cuts it into.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b

RESIDUES = 20
DEV = 0
HELD_OUT = 1
PIECE_CHARS = 1_400  # about 450 tokens: a piece of running text that fits sequences of 512


def normalise(text: str) -> str:
    """Casefolded, without punctuation and symbols (Unicode P* and S*), runs of whitespace made one space."""
    kept = (c for c in text.casefold() if unicodedata.category(c)[0] not in "PS")
    return " ".join("".join(kept).split())


def split_residue(text: str, modulus: int = RESIDUES) -> int:
    """0..modulus-1: BLAKE2b of the normalised text (8-byte digest, big-endian), modulo `modulus`."""
    digest = blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % modulus


def pieces(document: str, max_chars: int = PIECE_CHARS) -> list[str]:
    """Pieces of at most `max_chars`, cut between paragraphs where possible; none is blank."""
    found, piece = [], ""
    for paragraph in re.split(r"(?<=\n)\n+", document):
        if len(paragraph) > max_chars:
            found.append(piece)
            piece = ""
        while len(paragraph) > max_chars:
            cut = paragraph.rfind(" ", 0, max_chars) + 1 or max_chars
            found.append(paragraph[:cut])
            paragraph = paragraph[cut:]
        if piece and len(piece) + len(paragraph) > max_chars:
            found.append(piece)
            piece = ""
        piece += paragraph + "\n"
    found.append(piece.strip("\n"))
    return [p for p in found if p.strip()]
