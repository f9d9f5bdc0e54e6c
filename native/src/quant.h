// Weights: from the rows of a GGUF tensor to the panels that the kernels read, once, at load.
//
// A panel is 64 rows. Its codes lie in blocks of 64 bytes: 16 rows x 4 bytes, so that an i32 lane
// is a row and the bytes of a lane are 4 neighbouring k. An activation is then a 4-byte broadcast,
// nothing is shuffled or added across lanes, and one panel is one sequential stream.
//
//   block | row0: k k+1 k+2 k+3 | row1: k k+1 k+2 k+3 | ... | row15: k k+1 k+2 k+3 |
//
// A step is 4 blocks, rows 0..63 of the panel: 256 bytes. A plane of b bits is a run of steps of
// 32 / b k each, whose byte c = 0..3 holds
//   sum over f = 0 .. 8/b - 1 of code[4 f + c] << (b f)
// so 1 bit: 32 k a step, 2 bits: 16 k, 4 bits: 8 k, 8 bits: 4 k. Codes of 3, 5 and 6 bits are a
// plane of their low bits and, behind it, one of the bits above.
//
//   kind       a panel, in this order                                            bits a weight
//   kT5        two halves of 32 rows; in each, per 20 k, 2 blocks, whose byte c holds the
//              trits + 1 of k = 4 f + c: r = sum over f = 0..3 of 3^f code[f], 0..80, and code[4]
//              as r | code[4] << 6 where r < 64, else 192 + 3 (r - 64) + code[4]             1.6
//   kI2        each 16 k: 2 bits of w + 1, w in -1..2                                     2.0
//   kL3        signed codes of three trits, drawn in lut_gemv.h                           1.67
//   kI2Blocks  each 256 k: 64 f32 scales, 16 steps as kI2                                 2.13
//   kQ4        each 32 k: 64 f16 scales, 4 bits of w + 8                                  4.5
//   kQ4_1      each 32 k: 64 f16 scales, 64 f16 mins, 4 bits                              5.0
//   kInt8      each 32 k: 64 f16 scales, 8 bits of w + 128                                8.5
//   kQ2K       each 256 k: 64 f16 d, 64 f16 dmin,
//              then each 16 k: 64 bytes scale | min << 4, 2 bits                          2.63
//   kQ3K       each 256 k: 64 f16 d, then each 32 k: 64 i8 scales of the first 16 k,
//              64 of the second, 2 bits, 1 bit of w + 4                                   3.56
//   kQ4K       each 256 k: 64 f16 d, 64 f16 dmin,
//              then each 32 k: 64 u8 scales, 64 u8 mins, 4 bits                           4.63
//   kQ5K       the same, 4 bits, 1 bit                                                    5.63
//   kQ6K       as kQ3K: 4 bits, 2 bits of w + 32                                          6.56
//   kF32, kF16, kBF16   each k: 64 values                                         32, 16, 16
//   kW8        each 4 k: 8 bits of w + 128, w in -127..127; k is filled up as below      8.0
//   kBF16Dot   each 2 k: 64 rows of two values; k is filled up to a multiple of 32,
//              kW8 of 64                                                                  16
//
// kForms in mat.h says the same in numbers. Rows pad to 64 with zeros, whose products nobody reads.
// Every type's block is a multiple of its step, but for kT5, whose last step is filled up with
// weights that meet activations of zero.
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
  AlignedBuffer row_scales;  // Scheme::kRow only: f32 [64 * n_panels()]

  int64_t n_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  int grain() const;  // of the activations that this matrix multiplies
  Panels view() const;
};

constexpr const Form& form(PanelKind kind) { return kForms[static_cast<int>(kind)]; }
std::string_view kind_name(PanelKind kind);
PanelKind kind_named(std::string_view name);  // throws std::invalid_argument on any other name

// What becomes of matrices of floats: they stay as they are and multiply f32, or are rounded for
// more speed, to bf16 that multiply bf16, or to 8 bits with one scale a row that multiply int8.
enum class Floats : uint8_t { kExact, kBF16, kW8 };

// "exact", "bf16", "w8"; throws std::invalid_argument on any other name.
Floats floats_named(std::string_view name);

// Repacks a tensor. `scale` multiplies every product (the `.scale` tensors of some files).
// `ternary` is taken where all rows have one scale each and no code 3 (+2): kT5 has fewest bytes,
// for matrices that come from memory, out of a cache kI2 is faster, kL3 is not exact.
// Throws std::invalid_argument when sizes do not match or a scale is not finite. A ternary block
// with d = 0 counts as all zero, whatever its codes.
PackedMat pack(const RawTensor& w, float scale = 1.0f, PanelKind ternary = PanelKind::kI2,
               Floats floats = Floats::kExact);

// Raise it with any change of what `pack` writes: panels that were kept are then packed again.
constexpr int kPanelVersion = 2;

// What `pack` made before, kept by somebody: in a file, say.
struct KeptPanels {
  PanelKind kind;
  int64_t rows, cols;
  float scale;
  std::span<const uint8_t> data, row_scales;  // row_scales is empty for kinds that have none
};

// The matrix on those bytes, which must outlive it.  Throws std::invalid_argument on sizes other
// than those of the kind, or bytes that do not begin at a multiple of 64.  What the bytes say is
// not looked at: no value in them leads a kernel outside of them.
PackedMat packed_from(const KeptPanels& kept);

// out[cols] = row `row` of a packed matrix, without its `scale`: what the panels say. For tests and
// tools.
void unpack_row(const PackedMat& w, int64_t row, std::span<float> out);

}  // namespace nearfar
