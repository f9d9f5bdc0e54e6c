// Weights: from the rows of a GGUF tensor to the panels that the kernels read, once, at load.
//
// A panel is 64 rows. Its codes lie in blocks of 64 bytes: 16 rows x 4 bytes, so that an i32 lane
// is a row and the bytes of a lane are 4 neighbouring k. An activation is then a 4-byte broadcast,
// nothing is shuffled or added across lanes, and one panel is one sequential stream.
//
//   block | row0: k k+1 k+2 k+3 | row1: k k+1 k+2 k+3 | ... | row15: k k+1 k+2 k+3 |
//
// A step is 4 blocks, rows 0..63 of the panel. Steps differ in the k that a byte c = 0..3 holds:
//   step2, 16 k   sum over f = 0..3 of code[4f + c] << 2f, codes of 2 bits
//   step4, 8 k    low nibble code[c], high nibble code[4 + c]
//   step8, 4 k    code[c]
//
//   kind       a panel, in this order                                            bits a weight
//   kI2        each 16 k: a step2 of w + 1, w in -1..2                                    2.0
//   kI2Blocks  each 256 k: 64 f32 scales, 16 steps as kI2                                 2.13
//   kQ4        each 32 k: 64 f16 scales, 4 step4 of w + 8                                 4.5
//   kQ4K       each 256 k: 64 f16 d, 64 f16 dmin,
//              then each 32 k: 64 u8 scales, 64 u8 mins, 4 step4 of the code              4.63
//   kInt8      each 32 k: 64 f16 scales, 8 step8 of w + 128                               8.5
//   kInt8K     each 256 k: 64 f16 d, then each 16 k: 64 i8 scales, 4 step8 of w + 128     8.56
//   kF32, kF16, kBF16   each k: 64 values                                           32, 16, 16
//
// Rows pad to 64 with zeros, whose products nobody reads. K needs no padding: every type's block is
// a multiple of its step.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "blocks.h"
#include "buffer.h"
#include "mat.h"

namespace nearfar {

// A packed matrix [rows, cols], with its bytes or on those of a mapped file.
struct PackedMat {
  PanelKind kind = PanelKind::kF32;
  int64_t rows = 0, cols = 0;
  int64_t panel_bytes = 0;
  float scale = 1.0f;  // multiplies every product
  AlignedBuffer data;
  AlignedBuffer row_scales;  // kI2 only: f32 [64 * n_panels()]

  int64_t n_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  int grain() const;  // of the activations that this matrix multiplies
  Panels view() const;
};

int grain(PanelKind kind);
std::string_view kind_name(PanelKind kind);

// Repacks a tensor. `scale` multiplies every product (the `.scale` tensors of some files).
// Throws std::invalid_argument when sizes do not match or a scale is not finite. A ternary block
// with d = 0 counts as all zero, whatever its codes.
PackedMat pack(const RawTensor& w, float scale = 1.0f);

// A matrix on bytes that `pack` made before and somebody kept: `row_scales` is empty for kinds that
// have none.  Throws std::invalid_argument on sizes other than those of the kind; what the bytes
// say is not looked at, and no value in them leads a kernel outside of them.
PackedMat packed_from(PanelKind kind, int64_t rows, int64_t cols, float scale, AlignedBuffer data,
                      AlignedBuffer row_scales);

// out[cols] = row `row` of a packed matrix, without its `scale`: what the panels say. For tests and
// tools.
void unpack_row(const PackedMat& w, int64_t row, std::span<float> out);

}  // namespace nearfar
