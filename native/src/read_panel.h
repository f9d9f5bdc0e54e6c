// Reads a panel one weight at a time: what the scalar kernels and unpack_row share. For files
// compiled with portable flags only.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"
#include "lut_gemv.h"
#include "quant.h"

namespace nearfar {

constexpr int64_t kStepBytes = 256;     // 4 k x 64 rows of bytes
constexpr int64_t kT5StepColumns = 20;  // k

// Bytes of `block` k of a panel.
constexpr int64_t block_bytes(const Form& f) {
  return f.head + f.block / f.unit * (f.side + f.unit * 8 * (f.low + f.high));
}

// Where the 4 bytes of a row lie in a step of kT5: its two halves are one stream each.
constexpr int64_t t5_lane(int64_t panel_bytes, int64_t row, int64_t step) {
  return row / 32 * (panel_bytes / 2) + step * 128 + row % 32 * 4;
}

// Code `i` of a plane of `bits` bits.
inline int plane_code(const uint8_t* plane, int64_t row, int64_t i, int bits) {
  const int64_t per_step = 32 / bits;  // k
  const uint8_t byte = plane[i / per_step * kStepBytes + row * 4 + i % 4];
  return byte >> (i % per_step / 4 * bits) & ((1 << bits) - 1);
}

// The trit of weight k in a panel of kL3.
inline int l3_trit(const uint8_t* panel, int64_t row, int64_t k) {
  const uint8_t* block = panel + kLutHead + k / kLutUnit * kLutUnitBytes + row / 16 * kLutBlock;
  const int64_t j = k % kLutUnit / kLutLookup;
  const int64_t lane = row % 16 * 4 + k % kLutLookup / kLutGroup;
  const int code = block[j / 2 * 64 + lane] >> (j % 2 * 4) & 15;
  const int trit = lut_trit(code, static_cast<int>(k % kLutGroup));
  return (block[4 * 64 + lane] >> j & 1) != 0 ? -trit : trit;
}

// One row of one panel.
class PanelRow {
 public:
  PanelRow(const Panels& w, int64_t row)
      : form_(kForms[static_cast<int>(w.kind)]),
        is_t5_(w.kind == PanelKind::kT5),
        is_l3_(w.kind == PanelKind::kL3),
        panel_bytes_(w.panel_bytes),
        panel_(w.data + row / kPanelRows * w.panel_bytes),
        row_(row % kPanelRows) {}

  // The code of weight k, without its offset.
  int code(int64_t k) const {
    if (is_t5_) {
      const int byte = panel_[t5_lane(panel_bytes_, row_, k / kT5StepColumns) + k % 4];
      const int low = byte & 63;
      int r = byte < 192 ? low : 64 + low / 3;
      if (k % kT5StepColumns >= 16) return (byte < 192 ? byte >> 6 : low % 3) - form_.offset;
      for (int64_t f = k % kT5StepColumns / 4; f > 0; --f) r /= 3;
      return r % 3 - form_.offset;
    }
    if (is_l3_) return l3_trit(panel_, row_, k);
    const int64_t i = k % form_.unit;
    const uint8_t* plane = side(k) + form_.side;
    int code = plane_code(plane, row_, i, form_.low);
    if (form_.high > 0) {
      plane += form_.unit * 8 * form_.low;
      code |= plane_code(plane, row_, i, form_.high) << form_.low;
    }
    return code - form_.offset;
  }

  // Of the block that weight k is in.
  float d(int64_t k) const {
    return form_.scheme == Scheme::kBlocks ? value<float>(head(k) + row_ * 4)
                                           : f16_to_f32(value<uint16_t>(head(k) + row_ * 2));
  }
  float dmin(int64_t k) const { return f16_to_f32(value<uint16_t>(head(k) + 128 + row_ * 2)); }

  // Scheme::kSuper: of the group that weight k is in.
  int scale(int64_t k) const {
    if (form_.side == 64) return side(k)[row_] & 15;
    if (form_.has_min) return side(k)[row_];
    return static_cast<int8_t>(side(k)[k % form_.unit / form_.group * 64 + row_]);
  }
  int min(int64_t k) const { return form_.side == 64 ? side(k)[row_] >> 4 : side(k)[64 + row_]; }

 private:
  template <class T>
  static T value(const uint8_t* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  const uint8_t* head(int64_t k) const { return panel_ + k / form_.block * block_bytes(form_); }
  const uint8_t* side(int64_t k) const {
    const int64_t unit_bytes = form_.side + form_.unit * 8 * (form_.low + form_.high);
    return head(k) + form_.head + k % form_.block / form_.unit * unit_bytes;
  }

  const Form& form_;
  bool is_t5_, is_l3_;
  int64_t panel_bytes_;
  const uint8_t* panel_;
  int64_t row_;
};

}  // namespace nearfar
