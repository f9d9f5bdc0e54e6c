// How tiles are set up: what the two files of AMX share.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace nearfar {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 64;

// Rows of each tile, 0 to 16; a row is 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t n_rows) {
    rows[tile] = static_cast<uint8_t>(n_rows);
    row_bytes[tile] = n_rows > 0 ? kTileBytes : 0;
  }

  // What the tiles held is lost.
  void load() const {
    // Some compilers do not know that tiles read memory: all of it is there from here on.
    asm volatile("" ::"r"(this) : "memory");
    _tile_loadconfig(this);
  }
};

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

}  // namespace
}  // namespace nearfar
