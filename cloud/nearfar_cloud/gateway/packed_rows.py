"""Rows of a device as they came, for the engine: packed until they are run."""

from __future__ import annotations

from nearfar.wire.codec import Codec
from nearfar_cloud.outside import Array


class PackedRows:
    """A `RowStore` over rows of `codec.row_bytes` bytes each."""

    def __init__(self, codec: Codec, rows: tuple[bytes, ...]) -> None:
        self._codec, self._rows, self.width = codec, rows, codec.d

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, first: int, n: int) -> Array:
        """f32 [n, D].  Raises WireError for rows that hold no numbers."""
        return self._codec.decode(self._rows[first : first + n])

    def truncate(self, n: int) -> None:
        self._rows = self._rows[:n]
