"""Prints the table of test_quant.cc: CRC-32 of what the `gguf` package makes of eight pseudo-random rows per type.

Run with the development environment: `python native/tests/golden_blocks.py`.
"""

import zlib

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "TQ1_0": [52],
    "TQ2_0": [64],
}


def lcg(n: int, state: int = 1) -> np.ndarray:
    """u8 [n]: the top bytes of state = state * 1664525 + 1013904223 modulo 2^32."""
    out = np.empty(n, np.uint8)
    for i in range(n):
        state = (state * 1664525 + 1013904223) % 2**32
        out[i] = state >> 24
    return out


for name in ["F16", "BF16", *SCALES]:
    kind = GGMLQuantizationType[name]
    weights, size = GGML_QUANT_SIZES[kind]
    blocks = lcg(8 * 512 // weights * size).reshape(-1, size)
    for at in SCALES.get(name, []):
        blocks[:, at + 1] &= 0xBF  # finite: below 2
    if name in ("F16", "BF16"):
        blocks[:, 1] &= 0xBF
    values = dequantize(blocks.reshape(8, -1), kind).astype(np.float32)
    print(f"    {{TensorType::k{name}, 0x{zlib.crc32(values.tobytes()):08x}u}},")
