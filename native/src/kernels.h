// The table of kernels of each ISA, and the door to them. Chosen once, at load.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "activations.h"
#include "mat.h"
#include "ops.h"
#include "probe.h"
#include "quant.h"

namespace nearfar {

struct Kernels {
  const char* isa;              // "ref", "avx2", "neon", ...
  const Ops* ops;               // what lies between the products
  Matmul* matmul[kPanelKinds];  // by PanelKind
  bool five_trits;              // has a kernel of its own for kT5
  LutTables* lut_tables;        // null: has no kernel of its own for kL3
};

// The table named `isa`; "" is the best that this CPU has. Throws std::invalid_argument on an
// unknown name or one that this CPU, or this build, lacks.
const Kernels& kernels(std::string_view isa = "");

// Whether `k` has a kernel of its own for a kind, or the scalar one stands in.
bool has_own(const Kernels& k, PanelKind kind);

// The probes that measure what the instructions of `k` reach at most; portable ones where its ISA
// has none.
const Probe& probe(const Kernels& k);

// Names that kernels() takes here, worst first.
std::vector<std::string_view> isas_available();

// The panels of ternary matrices for these kernels; `n_weights` counts those of the whole model.
// Out of memory the fewest bytes win, out of a cache the 2-bit codes: they need less arithmetic.
// Throws std::invalid_argument for `lut` with kernels that have no lookups.
PanelKind ternary_kind(const Kernels& k, bool lut, int64_t n_weights);

// y[i, n] for all rows i of x and the rows n of panels [first, last): the unit of work of a thread.
// y is the whole output, [x.m, w.rows], row stride ldy. Throws std::invalid_argument when shapes,
// grain or the panel range do not fit.
void matmul(const Kernels& k, const PackedMat& w, const Rows& x, int64_t first, int64_t last,
            std::span<float> y, int64_t ldy);
void matmul(const Kernels& k, const PackedMat& w, const QuantRows& x, int64_t first, int64_t last,
            std::span<float> y, int64_t ldy);

// How a product of `rows` rows is handed out to threads: in chunks of whole panels, about as much
// work as 96 KiB of them for one row. By lookup also in groups of rows whose tables stay in L2; the
// chunks of one group come one after the other. No result depends on it.
class Cut {
 public:
  Cut(const PackedMat& w, int64_t rows);
  int64_t n_chunks() const { return across_ * ((rows_ + group_ - 1) / group_); }
  struct Part {
    int64_t first, last;  // panels
    int64_t row, m;       // rows [row, row + m)
  };
  Part part(int64_t chunk) const;

 private:
  int64_t n_panels_, rows_;  // of the product
  int64_t panels_, group_;   // of a chunk
  int64_t across_;           // chunks of a group
};

// All panels, y [x.m(), w.rows] without gaps.
void matmul(const Kernels& k, const PackedMat& w, const QuantRows& x, std::span<float> y);

}  // namespace nearfar
