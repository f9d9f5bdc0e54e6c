"""Rows of a device as they came, for the engine: packed until they are run."""

from __future__ import annotations

from collections.abc import Iterator

from nearfar.wire.codec import Codec
from nearfar_cloud.outside import Array, mark_of


class PackedRows:
    """A `RowStore` over rows of `codec.row_bytes` bytes each."""

    def __init__(self, codec: Codec, rows: tuple[bytes, ...]) -> None:
        self._codec, self._rows, self.width = codec, rows, codec.d

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, first: int, n: int) -> Array:
        """f32 [n, D].  Raises WireError for rows that hold no numbers."""
        return self._codec.decode(self._rows[first : first + n])

    def content(self, first: int, n: int) -> Iterator[bytes]:
        """The packed bytes: what they are decoded to depends on them, the codec and the width alone."""
        spec = self._codec.spec
        mark = mark_of(f"{spec.id.name} {spec.group} {spec.outliers} {self.width}")
        for row in self._rows[first : first + n]:
            yield mark
            yield row

    def truncate(self, n: int) -> None:
        self._rows = self._rows[:n]
