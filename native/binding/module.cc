// nearfar_native._core: conversions and the release of the GIL around work, no logic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "checksum.h"
#include "errors.h"
#include "kernels.h"
#include "model.h"
#include "paged_attention.h"
#include "roofline.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nearfar {
namespace {

template <typename T, size_t Rank>
using In = nb::ndarray<const T, nb::ndim<Rank>, nb::c_contig, nb::device::cpu>;
using RowsIn = In<float, 2>;
using RowsOut = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using Bytes = In<uint8_t, 1>;
using Flag = nb::ndarray<const uint8_t, nb::shape<1>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;
// kind, rows, cols, scale, data, row scales
using PanelArg = std::tuple<std::string, int64_t, int64_t, float, Bytes, Bytes>;
using PackedOut = std::tuple<std::string, BytesOut, BytesOut, uint64_t, uint64_t>;
using TensorArg = std::tuple<uint32_t, int64_t, int64_t, Bytes>;  // type, rows, cols, bytes

RowsView view(const RowsIn& h) {
  return {h.data(), static_cast<int64_t>(h.shape(0)), static_cast<int64_t>(h.shape(1))};
}

RawTensor view(const TensorArg& t) {
  const auto& [type, rows, cols, bytes] = t;
  return {static_cast<TensorType>(type), rows, cols, {bytes.data(), bytes.size()}};
}

// A numpy array [n] that owns its memory.
template <typename T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> make_row(size_t n) {
  T* raw = new T[n];
  return {raw, {n}, nb::capsule(raw, [](void* p) noexcept { delete[] static_cast<T*>(p); })};
}

Clock clock_of(bool cpu_time) { return cpu_time ? Clock::kCpu : Clock::kWall; }

std::vector<std::string_view> panel_kinds(const std::string& isa) {
  std::vector<std::string_view> kinds;
  for (int i = 0; i < kPanelKinds; ++i) {
    const auto kind = static_cast<PanelKind>(i);
    if (kind != PanelKind::kL3 || kernels(isa).lut_tables) kinds.push_back(kind_name(kind));
  }
  return kinds;
}

// A numpy array [rows, cols] that owns its memory, filled by work(data) without the GIL.
template <typename Work>
RowsOut make_rows(size_t rows, size_t cols, Work work) {
  auto data = std::make_unique_for_overwrite<float[]>(rows * cols);
  {
    const nb::gil_scoped_release released;
    work(data.get());
  }
  float* raw = data.release();
  return RowsOut(raw, {rows, cols},
                 nb::capsule(raw, [](void* p) noexcept { delete[] static_cast<float*>(p); }));
}

KeptPanels view(const PanelArg& p) {
  const auto& [kind, rows, cols, scale, data, row_scales] = p;
  return {kind_named(kind),
          rows,
          cols,
          scale,
          {data.data(), data.size()},
          {row_scales.data(), row_scales.size()}};
}

// A read-only numpy view of bytes that `owner` keeps alive.
BytesOut view_of(const AlignedBuffer& bytes, const nb::capsule& owner) {
  return BytesOut(bytes.data(), {bytes.size()}, owner);
}

// What make() packs, with the checksums of data and row scales.
template <typename Make>
PackedOut packed_out(Make make) {
  auto w = std::make_unique<PackedMat>();
  uint64_t sums[2];
  {
    const nb::gil_scoped_release released;
    *w = make();
    sums[0] = checksum({w->data.data(), w->data.size()});
    sums[1] = checksum({w->row_scales.data(), w->row_scales.size()});
  }
  PackedMat* raw = w.release();
  const nb::capsule owner(raw, [](void* p) noexcept { delete static_cast<PackedMat*>(p); });
  return {std::string(kind_name(raw->kind)), view_of(raw->data, owner),
          view_of(raw->row_scales, owner), sums[0], sums[1]};
}

// The engine's model beside what it needs of Python: the bytes of embedding and panels stay where
// they are.
struct PyModel {
  Bytes embedding;
  std::map<std::string, PanelArg> panels;
  std::unique_ptr<Model> model;
};

void make_model(PyModel* self, const ModelSpec& spec,
                const std::map<std::string, TensorArg>& matrices,
                const std::map<std::string, In<float, 1>>& vectors,
                const std::map<std::string, PanelArg>& panels, int first, int last, int threads,
                const std::string& isa, bool lut, const std::string& head,
                const std::string& floats) {
  Tensors tensors;
  for (const auto& [name, kept] : panels) tensors.panels[name] = view(kept);
  for (const auto& [name, tensor] : matrices) tensors.matrices[name] = view(tensor);
  for (const auto& [name, values] : vectors) tensors.vectors[name] = {values.data(), values.size()};
  std::unique_ptr<Model> model;
  {
    const nb::gil_scoped_release released;
    model = std::make_unique<Model>(spec, tensors,
                                    ModelOptions{first, last, threads, kernels(isa), lut,
                                                 head_mode(head), floats_named(floats)});
  }
  new (self) PyModel{std::get<3>(matrices.at("token_embd.weight")), panels, std::move(model)};
}

// One packed matrix, for tests and benchmarks of the kernels.
struct Matrix {
  PackedMat weight;
  const Kernels& kernels;
};

using Heads = In<float, 3>;       // [rows, heads, head_dim]
using SpansArg = In<int64_t, 2>;  // row, n, start, first
// Of f32, or of f16 as the bits in u16; written to.
template <typename Number>
using BlocksArg = nb::ndarray<Number, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

template <typename Number>
PagedKv paged_kv(const BlocksArg<Number>& k, const BlocksArg<Number>& v, int64_t n_kv_heads,
                 int64_t head_dim, bool bf16 = false) {
  const auto shaped = [&](const BlocksArg<Number>& x, int64_t a, int64_t b) {
    return static_cast<int64_t>(x.shape(1)) == n_kv_heads &&
           static_cast<int64_t>(x.shape(2)) == a && static_cast<int64_t>(x.shape(3)) == b;
  };
  if (k.shape(0) != v.shape(0) || !shaped(k, head_dim, kBlock) || !shaped(v, kBlock, head_dim)) {
    throw std::invalid_argument("blocks: expected K [n, KH, hd, 64] and V [n, KH, 64, hd]");
  }
  if (bf16 && (std::is_same_v<Number, float> || head_dim % 32 != 0)) {
    throw std::invalid_argument(
        "blocks of bf16: expected 16 bits, and heads of 32, 64, ... numbers");
  }
  return {std::is_same_v<Number, float> ? PagedType::kF32
          : bf16                        ? PagedType::kBF16
                                        : PagedType::kF16,
          static_cast<int64_t>(k.shape(0)),
          n_kv_heads,
          head_dim,
          k.data(),
          v.data()};
}

// Blocks of int8: a head is its codes and the bytes of its scales.
using CodesArg = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
PagedKv paged_codes(const CodesArg& k, const CodesArg& v, int64_t head_dim) {
  PagedKv kv{PagedType::kInt8,
             static_cast<int64_t>(k.shape(0)),
             static_cast<int64_t>(k.shape(1)),
             head_dim,
             k.data(),
             v.data()};
  const auto shaped = [&](const CodesArg& x) {
    return x.shape(0) == k.shape(0) && x.shape(1) == k.shape(1) &&
           static_cast<int64_t>(x.shape(2)) == kv.head_size();
  };
  if (head_dim < 32 || head_dim % 32 != 0 || !shaped(k) || !shaped(v)) {
    throw std::invalid_argument(
        "blocks of int8: expected heads of 32, 64, ... numbers, K and V [n, KH, hd * 64 + 256]");
  }
  return kv;
}

std::vector<PagedSpan> paged_spans(const SpansArg& table, const In<int32_t, 1>& blocks,
                                   int64_t n_blocks, int64_t n_rows) {
  std::vector<PagedSpan> list;
  const auto n_listed = static_cast<int64_t>(blocks.size());
  for (size_t i = 0; i < table.shape(0); ++i) {
    const int64_t* t = table.data() + 4 * i;
    const auto [row, n, start, first] = std::tuple(t[0], t[1], t[2], t[3]);
    const bool fits = table.shape(1) == 4 && row >= 0 && n > 0 && n <= n_rows - row && start >= 0 &&
                      start < int64_t{1} << 40 && first >= 0 &&
                      first <= n_listed - (start + n + kBlock - 1) / kBlock;
    if (!fits) throw std::invalid_argument("spans: row, n, start, first block do not fit");
    list.push_back({row, n, start, blocks.data() + first});
  }
  for (int64_t i = 0; i < n_listed; ++i) {
    if (blocks.data()[i] < 0 || blocks.data()[i] >= n_blocks) {
      throw std::invalid_argument("blocks: a number that the store does not have");
    }
  }
  return list;
}

// The blocks of all layers of a model; owned by numpy, kept alive here.
struct PagedStore {
  std::vector<PagedKv> layers;
  std::vector<nb::object> kept;

  int64_t n_blocks() const { return layers.empty() ? 0 : layers[0].n_blocks; }
};

// make(i) is layer i; the arrays of k and v stay.
template <typename Arrays, typename Make>
void make_store(PagedStore* self, const Arrays& k, const Arrays& v, const Make& make) {
  if (k.empty() || k.size() != v.size()) {
    throw std::invalid_argument("expected K and V of every layer");
  }
  PagedStore made;
  for (size_t i = 0; i < k.size(); ++i) {
    made.layers.push_back(make(i));
    if (made.layers[i].n_blocks != made.layers[0].n_blocks) {
      throw std::invalid_argument("layers with different numbers of blocks");
    }
    made.kept.push_back(nb::cast(k[i]));
    made.kept.push_back(nb::cast(v[i]));
  }
  new (self) PagedStore(std::move(made));
}

template <typename Number>
void make_float_store(PagedStore* self, const std::vector<BlocksArg<Number>>& k,
                      const std::vector<BlocksArg<Number>>& v, bool bf16) {
  make_store(self, k, v, [&](size_t i) {
    return paged_kv<Number>(k[i], v[i], static_cast<int64_t>(k[0].shape(1)),
                            static_cast<int64_t>(k[0].shape(2)), bf16);
  });
}

void make_code_store(PagedStore* self, const std::vector<CodesArg>& k,
                     const std::vector<CodesArg>& v, int64_t head_dim) {
  make_store(self, k, v, [&](size_t i) { return paged_codes(k[i], v[i], head_dim); });
}

// What paged attention needs between calls, and the checks of its arguments.
struct PagedAttention {
  int64_t n_heads, n_kv_heads, head_dim;
  const Kernels& kernels;
  std::unique_ptr<ThreadPool> pool;
  std::vector<PagedScratch> scratch;

  void check(const Heads& x, int64_t heads) const {
    if (static_cast<int64_t>(x.shape(1)) != heads || static_cast<int64_t>(x.shape(2)) != head_dim) {
      throw std::invalid_argument("rows: expected [rows, heads, head_dim] of this attention");
    }
  }
};

// The two calls, on blocks of one type of numbers.
template <typename Number>
void bind_paged(nb::class_<PagedAttention>& paged) {
  using Blocks = BlocksArg<Number>;
  paged
      .def(
          "append",
          [](PagedAttention& self, const Heads& k, const Heads& v, const Blocks& k_store,
             const Blocks& v_store, const SpansArg& spans, const In<int32_t, 1>& blocks) {
            self.check(k, self.n_kv_heads);
            self.check(v, self.n_kv_heads);
            if (k.shape(0) != v.shape(0)) throw std::invalid_argument("k and v differ in rows");
            const PagedKv kv = paged_kv<Number>(k_store, v_store, self.n_kv_heads, self.head_dim);
            const auto list =
                paged_spans(spans, blocks, kv.n_blocks, static_cast<int64_t>(k.shape(0)));
            const nb::gil_scoped_release released;
            paged_append(kv, list, k.data(), v.data(), *self.kernels.ops, *self.pool);
          },
          "k"_a.noconvert(), "v"_a.noconvert(), "k_store"_a.noconvert(), "v_store"_a.noconvert(),
          "spans"_a.noconvert(), "blocks"_a.noconvert(),
          "k, v f32 [R, KH, hd] into the blocks of their spans, i64 [S, 4]: row, n, start, and "
          "where in `blocks` i32 [*] the list of the sequence begins.")
      .def(
          "attend",
          [](PagedAttention& self, const Heads& q, const Blocks& k_store, const Blocks& v_store,
             const SpansArg& spans, const In<int32_t, 1>& blocks) {
            self.check(q, self.n_heads);
            const PagedKv kv = paged_kv<Number>(k_store, v_store, self.n_kv_heads, self.head_dim);
            const auto list =
                paged_spans(spans, blocks, kv.n_blocks, static_cast<int64_t>(q.shape(0)));
            return make_rows(q.shape(0), self.n_heads * self.head_dim, [&](float* out) {
              paged_attention(kv, list, self.n_heads, q.data(), out, *self.kernels.ops, *self.pool,
                              self.scratch);
            });
          },
          "q"_a.noconvert(), "k_store"_a.noconvert(), "v_store"_a.noconvert(),
          "spans"_a.noconvert(), "blocks"_a.noconvert(),
          "q f32 [R, H, hd] -> f32 [R, H * hd]; rows outside the spans are left undefined.");
}

}  // namespace
}  // namespace nearfar

NB_MODULE(_core, m) {
  using namespace nearfar;
  m.doc() = "The C++ engine of nearfar.  Use it through nearfar.lower_native.";

  nb::exception<EngineBusy>(m, "EngineBusy", PyExc_RuntimeError);
  nb::exception<Cancelled>(m, "Cancelled", PyExc_RuntimeError);
  nb::exception<ContextFull>(m, "ContextFull", PyExc_RuntimeError);
  nb::exception<KvTruncated>(m, "KVTruncated", PyExc_RuntimeError);
  nb::exception<EngineFailure>(m, "EngineFailure", PyExc_RuntimeError);

  m.def("isas_available", &isas_available,
        "Kernel sets that this CPU and build have, worst first.");
  m.def(
      "isa", [](const std::string& name) { return std::string(kernels(name).isa); }, "name"_a = "",
      "The kernel set that `name` selects (\"\": the best).  ValueError if the CPU lacks it.");
  m.def(
      "has_lookups", [](const std::string& isa) { return kernels(isa).lut_tables != nullptr; },
      "isa"_a = "", "Whether a kernel set multiplies by lookup.");
  m.def("default_threads", &default_threads, "Physical cores that this process may use.");
  m.def(
      "read_bandwidth",
      [](int threads, size_t n_bytes, int n_passes, const std::string& isa, bool cpu_time) {
        const nb::gil_scoped_release released;
        return read_bandwidth(kernels(isa), threads, n_bytes, n_passes, clock_of(cpu_time));
      },
      "threads"_a, "n_bytes"_a, "n_passes"_a = 5, "isa"_a = "", "cpu_time"_a = false,
      "GB/s (1e9) that `threads` read together from `n_bytes` of memory, best pass.");
  m.def(
      "int8_peak",
      [](int threads, int n_passes, const std::string& isa, bool cpu_time) {
        const Kernels& k = kernels(isa);
        const nb::gil_scoped_release released;
        return std::make_pair(int8_multiplier(k),
                              int8_peak(k, threads, n_passes, clock_of(cpu_time)));
      },
      "threads"_a, "n_passes"_a = 5, "isa"_a = "", "cpu_time"_a = false,
      "The int8 multiplier, and the GOPS (a multiply-add is 2) that `threads` reach with it.");
  m.def("panel_kinds", &panel_kinds, "isa"_a = "", "Kinds of packed matrices that `isa` has.");
  m.def(
      "product_speed",
      [](const std::string& kind, int64_t cols, size_t n_bytes, int64_t m, int threads,
         double seconds, const std::string& isa, bool cpu_time) {
        const nb::gil_scoped_release released;
        const ProductSpeed s =
            product_speed(kernels(isa), {kind_named(kind), cols, n_bytes, m, threads, seconds},
                          clock_of(cpu_time));
        return std::make_tuple(s.rows, s.n_bytes, s.seconds, s.fastest_seconds);
      },
      "kind"_a, "cols"_a, "n_bytes"_a, "m"_a, "threads"_a, "seconds"_a, "isa"_a = "",
      "cpu_time"_a = false,
      "(rows, bytes, median seconds, fewest seconds) of a product with `m` rows of activations, "
      "its matrix of random codes, `cols` wide and of about `n_bytes`.");

  m.def(
      "largest",
      [](const RowsIn& z) {
        if (z.shape(1) == 0) throw std::invalid_argument("rows of no numbers");
        auto ids = make_row<int32_t>(z.shape(0));
        const Ops& ops = *kernels().ops;
        const nb::gil_scoped_release released;
        const auto n = static_cast<int64_t>(z.shape(1));
        for (size_t i = 0; i < z.shape(0); ++i) {
          ids.data()[i] = static_cast<int32_t>(ops.largest(z.data() + i * z.shape(1), n));
        }
        return ids;
      },
      "z"_a.noconvert(),
      "f32 [M, V] -> i32 [M]: where the largest number of each row is, the first of equals; -1 if "
      "not all are finite.");

  m.def(
      "float_forms",
      [](const std::string& isa) {
        std::vector<std::string> names = {"exact"};
        if (has_own(kernels(isa), PanelKind::kBF16Dot)) names.emplace_back("bf16");
        if (has_own(kernels(isa), PanelKind::kW8)) names.emplace_back("w8");
        return names;
      },
      "isa"_a = "", "What matrices of floats can become, of which `isa` has kernels of its own.");

  m.attr("PANEL_VERSION") = kPanelVersion;
  m.def(
      "ternary_kind",
      [](const std::string& isa, bool lut, int64_t n_weights) {
        return std::string(kind_name(ternary_kind(kernels(isa), lut, n_weights)));
      },
      "isa"_a, "lut"_a, "n_weights"_a,
      "The panels of ternary matrices in a model with as many ternary weights.");
  m.def(
      "pack",
      [](const TensorArg& tensor, float scale, const std::string& ternary) {
        return packed_out([&] { return pack(view(tensor), scale, kind_named(ternary)); });
      },
      "tensor"_a, "scale"_a, "ternary"_a,
      "(type, rows, cols, bytes) -> kind, panels u8, row scales u8, the checksums of both.");
  m.def(
      "requantize",
      [](const TensorArg& tensor, float scale, int threads) {
        return packed_out([&] {
          ThreadPool pool(threads);
          return requantized(view(tensor), scale, pool);
        });
      },
      "tensor"_a, "scale"_a, "threads"_a, "As `pack`, to 4.5 bits: the head of the mode \"q4\".");
  m.def(
      "checksums",
      [](const std::vector<Bytes>& parts, int threads) {
        std::vector<std::span<const uint8_t>> spans;
        for (const Bytes& part : parts) spans.emplace_back(part.data(), part.size());
        const nb::gil_scoped_release released;
        ThreadPool pool(threads);
        return checksums(spans, pool);
      },
      "parts"_a, "threads"_a, "One checksum for each of `parts`, at the speed of memory.");

  nb::class_<ModelSpec>(m, "ModelSpec", "Sizes and variants of one model; immutable.")
      .def(
          "__init__",
          [](ModelSpec* self, int n_layers, int64_t d_model, int64_t n_heads, int64_t n_kv_heads,
             int64_t head_dim, int64_t d_ff, int64_t n_vocab, float norm_eps, double rope_base,
             double rope_scale, bool rope_adjacent, bool relu2, bool has_sub_norms,
             bool has_qk_norms) {
            new (self) ModelSpec{n_layers,
                                 d_model,
                                 n_heads,
                                 n_kv_heads,
                                 head_dim,
                                 d_ff,
                                 n_vocab,
                                 norm_eps,
                                 rope_base,
                                 rope_scale,
                                 rope_adjacent ? RopePairs::kAdjacent : RopePairs::kHalves,
                                 relu2 ? Activation::kRelu2 : Activation::kSilu,
                                 has_sub_norms,
                                 has_qk_norms};
          },
          nb::kw_only(), "n_layers"_a, "d_model"_a, "n_heads"_a, "n_kv_heads"_a, "head_dim"_a,
          "d_ff"_a, "n_vocab"_a, "norm_eps"_a, "rope_base"_a, "rope_scale"_a, "rope_adjacent"_a,
          "relu2"_a, "has_sub_norms"_a, "has_qk_norms"_a);

  nb::class_<PagedStore>(
      m, "PagedStore",
      "Blocks of 64 positions in all layers of a model: K [n, KH, hd, 64] and V [n, KH, 64, hd] "
      "each, f32, or f16 as the bits in u16; with `bf16`, bf16 in pairs (paged_attention.h).")
      .def("__init__", &make_float_store<float>, "k"_a, "v"_a, "bf16"_a = false)
      .def("__init__", &make_float_store<uint16_t>, "k"_a, "v"_a, "bf16"_a = false)
      .def("__init__", &make_code_store, "k"_a, "v"_a, "head_dim"_a,
           "Of int8 with a scale for each position of a head: u8 [n, KH, hd * 64 + 256].");

  nb::class_<KvCache>(m, "KVCache", "Keys and values of one sequence; made by Model.new_kv.")
      .def("length", &KvCache::length, "layer"_a, "Positions that `layer` has run.")
      .def("truncate", &KvCache::truncate, "n"_a,
           "Forget the positions from `n` on, in all layers.")
      .def("fork", &KvCache::fork, "n"_a,
           "An independent cache with the first `n` positions; full blocks are shared.")
      .def_prop_ro("n_bytes", &KvCache::n_bytes, "Bytes of the blocks, shared ones included.")
      .def_prop_ro("max_len", [](const KvCache& kv) { return kv.shape().max_len; });

  nb::class_<PyModel>(m, "Model", "Layers [first, last) of a model, packed for `isa`.")
      .def(
          "__init__", &make_model, "spec"_a, "matrices"_a, "vectors"_a, "panels"_a, "first"_a,
          "last"_a, "threads"_a, "isa"_a = "", "lut"_a = false, "head"_a = "file",
          "floats"_a = "exact",
          "matrices: GGUF name -> (type, rows, cols, bytes); vectors: name -> f32 [n], with the "
          "gains of the heads as \"final\" and \"exit.{layer}\"; panels: GGUF name -> (kind, rows, "
          "cols, scale, data, row_scales) of what `pack` made before.  Only the bytes of the "
          "embedding and of the panels are referred to later.  lut: ternary matrices multiply by "
          "lookup, near the exact product.  floats: matrices of floats stay \"exact\", or become "
          "\"bf16\" that multiply bf16, or \"w8\", int8 with a scale a row that multiply int8.")
      .def_prop_ro("isa", [](const PyModel& self) { return std::string(self.model->isa()); })
      .def_prop_ro("n_threads", [](const PyModel& self) { return self.model->n_threads(); })
      .def(
          "panels",
          [](const PyModel& self) {
            std::vector<std::tuple<std::string, std::string, int64_t, int64_t, size_t>> list;
            for (const PanelInfo& p : self.model->panels()) {
              list.emplace_back(p.name, p.kind, p.rows, p.cols, p.n_bytes);
            }
            return list;
          },
          "(name, kind, rows, cols, bytes) of each packed matrix.")
      .def(
          "new_kv",
          [](const PyModel& self, int64_t max_len, const std::string& dtype, int64_t sink,
             int64_t window) {
            return self.model->new_kv(max_len, kv_type(dtype), {sink, window});
          },
          "max_len"_a, "dtype"_a, "sink"_a = 0, "window"_a = 0,
          "An empty cache in \"f16\", \"f32\" or \"int8\".  With a window, rows see the last "
          "`window` positions and the first `sink` ones; without, all.")
      .def(
          "embed",
          [](const PyModel& self, const In<int32_t, 1>& ids) {
            return make_rows(ids.size(), self.model->spec().d_model,
                             [&](float* out) { self.model->embed({ids.data(), ids.size()}, out); });
          },
          "ids"_a.noconvert(), "i32 [T] -> f32 [T, D]")
      .def(
          "forward",
          [](PyModel& self, const RowsIn& h, KvCache& kv, int first, int last,
             const std::optional<Flag>& cancel) {
            const uint8_t* flag = cancel ? cancel->data() : nullptr;
            return make_rows(h.shape(0), h.shape(1), [&](float* out) {
              self.model->forward(view(h), kv, first, last, flag, out);
            });
          },
          "h"_a.noconvert(), "kv"_a, "first"_a, "last"_a, "cancel"_a.none() = nb::none(),
          "f32 [T, D] -> f32 [T, D]; the cache grows by T, or by nothing if the call fails.")
      .def(
          "forward_paged",
          [](PyModel& self, const RowsIn& h, const PagedStore& store, const SpansArg& spans,
             const In<int32_t, 1>& blocks, int first, int last) {
            const auto n_rows = static_cast<int64_t>(h.shape(0));
            const auto list = paged_spans(spans, blocks, store.n_blocks(), n_rows);
            if (first < 0 || last < first || last > static_cast<int>(store.layers.size())) {
              throw std::invalid_argument("layers that the store does not have");
            }
            const std::span<const PagedKv> layers(store.layers.data() + first, last - first);
            return make_rows(h.shape(0), h.shape(1), [&](float* out) {
              self.model->forward(view(h), list, layers, first, last, out);
            });
          },
          "h"_a.noconvert(), "store"_a, "spans"_a.noconvert(), "blocks"_a.noconvert(), "first"_a,
          "last"_a,
          "f32 [R, D] of many sequences -> f32 [R, D]; spans and blocks as in PagedAttention, "
          "whose rows are all of h in order.")
      .def(
          "norm",
          [](const PyModel& self, const RowsIn& h, const std::string& head) {
            return make_rows(h.shape(0), h.shape(1),
                             [&](float* out) { self.model->norm(view(h), head, out); });
          },
          "h"_a.noconvert(), "head"_a, "f32 [M, D] -> f32 [M, D]: what the head multiplies.")
      .def(
          "logits",
          [](PyModel& self, const RowsIn& h, const std::string& head) {
            return make_rows(h.shape(0), self.model->spec().n_vocab,
                             [&](float* out) { self.model->logits(view(h), head, out); });
          },
          "h"_a.noconvert(), "head"_a, "f32 [M, D] -> f32 [M, V]: norm and head.")
      .def_prop_ro("is_screened", [](const PyModel& self) { return self.model->is_screened(); })
      .def(
          "greedy",
          [](PyModel& self, const RowsIn& h, const std::string& head) {
            const size_t m = h.shape(0);
            auto ids = make_row<int32_t>(m);
            auto sure = make_row<float>(m);
            auto n_panels = make_row<int32_t>(m);
            {
              const nb::gil_scoped_release released;
              self.model->greedy(view(h), head, {ids.data(), sure.data(), n_panels.data()});
            }
            return std::tuple(ids, sure, n_panels);
          },
          "h"_a.noconvert(), "head"_a,
          "f32 [M, D] -> the ids of the largest logits i32 [M], their probabilities f32 [M], the "
          "panels of the head that were read besides the screen i32 [M].");

  nb::class_<Matrix>(m, "Matrix", "One packed matrix, for tests and benchmarks of the kernels.")
      .def(
          "__init__",
          [](Matrix* self, uint32_t type, int64_t rows, int64_t cols, const Bytes& bytes,
             const std::string& isa, bool lut, const std::string& floats) {
            const Kernels& k = kernels(isa);
            const PanelKind ternary = lut ? PanelKind::kL3 : PanelKind::kI2;
            new (self) Matrix{
                pack(view({type, rows, cols, bytes}), 1.0f, ternary, floats_named(floats)), k};
          },
          "type"_a, "rows"_a, "cols"_a, "bytes"_a, "isa"_a = "", "lut"_a = false,
          "floats"_a = "exact")
      .def_prop_ro("kind",
                   [](const Matrix& self) { return std::string(kind_name(self.weight.kind)); })
      .def_prop_ro("n_bytes", [](const Matrix& self) { return self.weight.data.size(); })
      .def(
          "multiply",
          [](const Matrix& self, const RowsIn& x) {
            return make_rows(x.shape(0), self.weight.rows, [&](float* y) {
              QuantRows q;
              const auto [data, rows, cols] = view(x);
              quantize_rows({data, x.size()}, rows, cols, self.weight.grain(), q);
              matmul(self.kernels, self.weight, q,
                     {y, static_cast<size_t>(rows * self.weight.rows)});
            });
          },
          "x"_a.noconvert(), "x f32 [M, cols] -> f32 [M, rows], one thread.");

  nb::class_<PagedAttention> paged(
      m, "PagedAttention", "Attention of many sequences over one store of blocks of 64 positions.");
  paged.def(
      "__init__",
      [](PagedAttention* self, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int threads,
         const std::string& isa) {
        if (n_kv_heads < 1 || n_heads < 1 || n_heads % n_kv_heads || head_dim < 16 ||
            head_dim % 16 || head_dim > 1 << 16 || n_heads > 1 << 16) {
          throw std::invalid_argument(
              "expected heads that are a multiple of the KV heads, of 16, 32, 48, ... numbers");
        }
        auto pool = std::make_unique<ThreadPool>(threads);
        std::vector<PagedScratch> scratch(pool->size(),
                                          PagedScratch(n_heads, n_kv_heads, head_dim));
        new (self) PagedAttention{n_heads,      n_kv_heads,      head_dim,
                                  kernels(isa), std::move(pool), std::move(scratch)};
      },
      "n_heads"_a, "n_kv_heads"_a, "head_dim"_a, "threads"_a, "isa"_a = "");
  bind_paged<float>(paged);
  bind_paged<uint16_t>(paged);
}
