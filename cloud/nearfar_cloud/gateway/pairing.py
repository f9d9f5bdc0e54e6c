"""Whether a device's file and this server's belong together, and how rows travel between them: the answer to a hello.

codecs of the device, in its order ──> the first one for which all needed parts are the same on both sides
                                       ids: tokenizer and sampler       rows: everything that a row goes through
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from nearfar.errors import UsageError
from nearfar.weights import Weights
from nearfar.wire.codec import Codec
from nearfar.wire.fingerprint import (
    FOR_IDS,
    FOR_ROWS,
    Mismatch,
    Split,
    codec_part,
    compare,
    declared_parts,
    model_fp,
    own_parts,
    split_of,
)
from nearfar.wire.messages import PROTOCOL, ClientHello, CodecId, CodecSpec, Limits, ServerHello

MOST_SPLITS = 64  # ways to cut the model whose parts are kept


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a hello came to.

    `fits`: the layers where rows may enter (0: ids), each with how they travel.  `why`: what keeps the others out.
    """

    answer: ServerHello
    fits: frozenset[tuple[int, CodecSpec]] = frozenset()
    why: str = ""


class Pairing:
    """Owns what is known of this server's file.  For the event loop; digests are taken in threads."""

    def __init__(self, weights: Weights, limits: Limits, epoch: int, region: str = "") -> None:
        self.weights, self.limits, self.epoch, self.region = weights, limits, epoch, region
        self._parts: dict[Split, asyncio.Task[dict[str, bytes]]] = {}  # by where the model is cut
        self._known: dict[str, bytes] = {}  # digests of tensors
        self._reading = asyncio.Lock()

    def prepare(self) -> None:
        """Begin to read the file, so that no device waits for it."""
        self._of(Split.of(self.weights.config))

    async def judge(self, hello: ClientHello) -> Judgement:
        """Match or not; if not, `why` of the answer names the part and both fingerprints."""
        if PROTOCOL not in hello.proto:
            return self._no(b"", f"it speaks protocol {list(hello.proto)}, this server {PROTOCOL}")
        config = self.weights.config
        at = Split.of(config) if config.split_layer else split_of(hello.parts, config.n_layers)
        ours = await asyncio.shield(self._of(at))
        whys = {codec: self._why_not(codec, hello.parts, ours) for codec in hello.codecs}
        fitting = [codec for codec, why in whys.items() if not why]
        said = "; ".join(f"{codec.id.name}: {why}" for codec, why in whys.items() if why)
        if not fitting:
            return self._no(model_fp(ours), said or "it offers no codec")
        yes = ServerHello(True, model_fp(ours), "", fitting[0], self.epoch, self.limits, region=self.region)
        fits = frozenset((0 if codec.id == CodecId.IDS else at.rows_at, codec) for codec in fitting)
        return Judgement(yes, fits, said)

    def _why_not(self, codec: CodecSpec, theirs: Mapping[str, bytes], ours: Mapping[str, bytes]) -> str:
        """What keeps the two from using a codec; "": nothing."""
        is_half = self.weights.config.role == "upper"
        if codec.id == CodecId.IDS:
            if is_half:
                return "this server has the upper layers alone, which take rows"
            return ", ".join(map(str, compare(theirs, ours, FOR_IDS)))
        # A whole model has no channels of its own: a device's are as good as any, if they are those of its file.
        needed = FOR_ROWS if is_half else [part for part in FOR_ROWS if part != "codec"]
        if found := compare(theirs, ours, needed):
            return ", ".join(map(str, found))
        if "split" not in ours:
            return "the device does not say where its model is cut"
        try:
            Codec.of(codec, self.weights.config.d_model)
        except UsageError as error:
            return str(error)
        if codec.outliers and (channels := codec_part(codec.outliers)) != theirs.get("codec"):
            return str(Mismatch("codec", theirs.get("codec", b""), channels))
        return ""

    def _no(self, fingerprint: bytes, why: str) -> Judgement:
        no = ServerHello(False, fingerprint, why, None, self.epoch, self.limits, region=self.region)
        return Judgement(no, why=why)

    def _of(self, at: Split) -> asyncio.Task[dict[str, bytes]]:
        """Parts of the model cut there, read once; whoever waits for them does not own them.

        What could not be read, as a disk may fail for a moment, is read again for the next hello.
        """
        found = self._parts.get(at)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            found = asyncio.create_task(self._read(at))
            self._parts.pop(at, None)
            if len(self._parts) >= MOST_SPLITS:
                del self._parts[next(iter(self._parts))]  # its tensors stay known
            self._parts[at] = found
        return found

    async def _read(self, at: Split) -> dict[str, bytes]:
        async with self._reading:  # what one of them has read the others know
            own = await asyncio.to_thread(own_parts, self.weights, at, self._known)
        return declared_parts(self.weights.file) | own
