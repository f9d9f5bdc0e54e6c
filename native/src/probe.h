// What a core can do at most, by the instructions of one ISA: reading, and multiplying int8.
//
// The roofs that roofline.h measures.  A probe is no kernel: it computes nothing of use, as fast as
// the instructions allow.  One file per ISA, as the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nearfar {

struct Probe {
  // The instruction of `multiply`, for people.
  const char* multiplier;
  // Operations (a multiply-add is 2) of one step of `multiply`.
  int64_t ops_per_step;
  // Reads `n_bytes`, a multiple of 1024, from a multiple of 64; the result depends on all of them.
  uint64_t (*read)(const uint8_t* data, size_t n_bytes);
  // `n_steps` of int8 multiply-adds on registers; the result depends on all of them.
  uint64_t (*multiply)(int64_t n_steps);
};

namespace ref {
extern const Probe kProbe;
}
namespace avx2 {
extern const Probe kProbe;
}
namespace avxvnni {
extern const Probe kProbe;
}
namespace avx512 {
extern const Probe kProbe;
}
namespace neon_dot {
extern const Probe kProbe;
}

}  // namespace nearfar
