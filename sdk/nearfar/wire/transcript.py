"""What a device has said in one answer, as far as it still counts: enough to tell it to another upper side.  Pure.

    rows or ids  | 0 ............................ n |      asks that are open      cuts, by generation

The ledger knows more; this reads only what leaves it.  `upper_hedged.py` keeps one for two upper sides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nearfar.wire.hashes import START, chain, crc_of_id
from nearfar.wire.messages import Ask, Cut, Ids, Opened, Rows, Up, Verdict

MAX_MESSAGE = 16 << 10  # bytes of rows in one message, unless one row is larger


@dataclass(slots=True)
class Transcript:
    by_ids: bool
    gen: int = 0
    rows: list[bytes] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)  # of every position
    hashes: list[bytes] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    asks: dict[int, Ask] = field(default_factory=dict)  # by request number: those without a verdict

    @property
    def n(self) -> int:
        """Positions."""
        return len(self.crcs)

    def hear(self, message: Up) -> None:
        """What the device says now; positions come without gaps, or again."""
        match message:
            case Rows(_, pos0, data, crcs):
                self.rows += data[self.n - pos0 :]
                self.crcs += crcs[self.n - pos0 :]
            case Ids(_, pos0, ids):
                self.ids += ids[self.n - pos0 :]
                self.crcs += [crc_of_id(i) for i in self.ids[self.n :]]
            case Ask(req):
                self.asks[req] = message
            case Cut(gen, keep):
                self.gen = gen
                self.cuts.append(message)
                self.asks.clear()
                del self.rows[keep:], self.ids[keep:], self.crcs[keep:], self.hashes[keep:]

    def catch_up(self, opened: Opened) -> tuple[list[Up], int]:
        """What brings an upper side that says `opened` to here, before any row; and how many positions it has then."""
        keep = min([opened.rows, self.n, *(cut.keep for cut in self.cuts if cut.gen > opened.gen)])
        return ([Cut(self.gen, keep)] if opened.gen < self.gen else []), keep

    def said(self, first: int) -> list[Up]:
        """Positions from `first` on, in messages, and the open asks."""
        messages: list[Up] = []
        while first < self.n:
            size = 4 if self.by_ids else len(self.rows[first])
            end = min(self.n, first + max(1, MAX_MESSAGE // max(1, size)))
            if self.by_ids:
                messages.append(Ids(self.gen, first, tuple(self.ids[first:end])))
            else:
                messages.append(Rows(self.gen, first, tuple(self.rows[first:end]), tuple(self.crcs[first:end])))
            first = end
        return [*messages, *self.asks.values()]

    def is_answer(self, v: Verdict) -> bool:
        """Whether a verdict can be one on an open ask about these positions."""
        ask = self.asks.get(v.req)
        if ask is None or v.gen != self.gen or v.pos0 != ask.verify_from + 1 or len(v.ids) != 1:
            return False
        fits = v.n_accept <= ask.pos - ask.verify_from
        return fits and (not v.state_hash or v.state_hash == self._hash(ask.pos))

    def _hash(self, position: int) -> bytes:
        for crc in self.crcs[len(self.hashes) : position + 1]:
            self.hashes.append(chain(self.hashes[-1] if self.hashes else START, crc))
        return self.hashes[position]
