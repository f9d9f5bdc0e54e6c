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
#include <utility>
#include <vector>

#include "checksum.h"
#include "errors.h"
#include "kernels.h"
#include "model.h"
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
                const std::string& isa, bool lut, const std::string& head) {
  Tensors tensors;
  for (const auto& [name, kept] : panels) tensors.panels[name] = view(kept);
  for (const auto& [name, tensor] : matrices) tensors.matrices[name] = view(tensor);
  for (const auto& [name, values] : vectors) tensors.vectors[name] = {values.data(), values.size()};
  std::unique_ptr<Model> model;
  {
    const nb::gil_scoped_release released;
    model = std::make_unique<Model>(
        spec, tensors, ModelOptions{first, last, threads, kernels(isa), lut, head_mode(head)});
  }
  new (self) PyModel{std::get<3>(matrices.at("token_embd.weight")), panels, std::move(model)};
}

// One packed matrix, for tests and benchmarks of the kernels.
struct Matrix {
  PackedMat weight;
  const Kernels& kernels;
};

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
          "matrices: GGUF name -> (type, rows, cols, bytes); vectors: name -> f32 [n], with the "
          "gains of the heads as \"final\" and \"exit.{layer}\"; panels: GGUF name -> (kind, rows, "
          "cols, scale, data, row_scales) of what `pack` made before.  Only the bytes of the "
          "embedding and of the panels are referred to later.  lut: ternary matrices multiply by "
          "lookup, near the exact product.")
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
             const std::string& isa, bool lut) {
            const Kernels& k = kernels(isa);
            const PanelKind ternary = lut ? PanelKind::kL3 : PanelKind::kI2;
            new (self) Matrix{pack(view({type, rows, cols, bytes}), 1.0f, ternary), k};
          },
          "type"_a, "rows"_a, "cols"_a, "bytes"_a, "isa"_a = "", "lut"_a = false)
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
}
