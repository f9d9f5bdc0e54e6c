#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "errors.h"

namespace nearfar {
namespace {

constexpr int64_t kChunkRows = 256;  // rows that scratch is made for; longer inputs go in chunks
constexpr size_t kArenaBytes = 32 << 20;  // of a model whose matrices share huge pages
constexpr int64_t kGreedyRows = 8;        // rows whose logits `greedy` holds at once
constexpr int64_t kAloneBelow =
    64 << 10;  // bytes of panels times rows that a second thread does not speed up
constexpr int64_t kRowsChunk = 16 << 10;  // numbers of rows that one thread takes at a time
constexpr const char* kBusy =
    "another thread is at work in this model: one thread at a time, or one model for each";

std::string shape_text(int64_t rows, int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

std::string range_text(int first, int last) {
  return "[" + std::to_string(first) + ", " + std::to_string(last) + ")";
}

bool is_ternary(TensorType type) {
  return type == TensorType::kTQ1_0 || type == TensorType::kTQ2_0;
}

bool is_set(const uint8_t* cancel) {
  return cancel != nullptr && __atomic_load_n(cancel, __ATOMIC_RELAXED) != 0;
}

void check_spec(const ModelSpec& s, int first, int last) {
  const auto expect = [](bool fine, const char* what) {
    if (!fine) throw std::invalid_argument(std::string("model: expected ") + what);
  };
  expect(s.n_layers > 0 && s.d_model > 0 && s.d_ff > 0 && s.n_vocab > 0, "sizes of at least 1");
  expect(s.head_dim > 0 && s.head_dim % 2 == 0, "an even head size");
  expect(s.n_kv_heads > 0 && s.n_heads > 0 && s.n_heads % s.n_kv_heads == 0,
         "query heads that share the key-value heads evenly");
  expect(s.norm_eps >= 0 && s.rope_base > 0, "norm_eps >= 0 and rope_base > 0");
  if (first < 0 || last <= first || last > s.n_layers) {
    throw std::invalid_argument("layers " + range_text(first, last) + ": the model has " +
                                range_text(0, s.n_layers));
  }
}

// Looks tensors up and checks their shapes.
class Reader {
 public:
  explicit Reader(const Tensors& tensors) : tensors_(tensors) {}

  const RawTensor& matrix(const std::string& name, int64_t rows, int64_t cols) const {
    const auto found = tensors_.matrices.find(name);
    if (found == tensors_.matrices.end()) throw std::invalid_argument(name + " is missing");
    const RawTensor& t = found->second;
    if (t.rows != rows || t.cols != cols) {
      throw std::invalid_argument(name + " is " + shape_text(t.rows, t.cols) + ": expected " +
                                  shape_text(rows, cols));
    }
    return t;
  }

  std::vector<float> vector(const std::string& name, int64_t n) const {
    std::vector<float> v = optional(name, n);
    if (v.empty()) throw std::invalid_argument(name + " is missing");
    return v;
  }

  // Empty if the file has none.
  std::vector<float> optional(const std::string& name, int64_t n) const {
    const auto found = tensors_.vectors.find(name);
    if (found == tensors_.vectors.end()) return {};
    const auto& v = found->second;
    if (static_cast<int64_t>(v.size()) != n) {
      throw std::invalid_argument(name + " holds " + std::to_string(v.size()) +
                                  " numbers: expected " + std::to_string(n));
    }
    return {v.begin(), v.end()};
  }

  // What was packed before of the matrix `raw`, or null.
  const KeptPanels* panels(const std::string& name, const RawTensor& raw, float scale) const {
    const auto found = tensors_.panels.find(name);
    if (found == tensors_.panels.end()) return nullptr;
    const KeptPanels& kept = found->second;
    if (kept.rows != raw.rows || kept.cols != raw.cols || kept.scale != scale) {
      throw std::invalid_argument(name + ": the panels of " + shape_text(kept.rows, kept.cols) +
                                  " are those of another matrix");
    }
    return &kept;
  }

  bool has_matrix(const std::string& name) const { return tensors_.matrices.contains(name); }

 private:
  const Tensors& tensors_;
};

constexpr std::array kGrains = {kGrainFloat, kGrainBF16, kGrainRow, kGrainTables, 32, 256};

size_t grain_slot(int grain) {
  return std::find(kGrains.begin(), kGrains.end(), grain) - kGrains.begin();
}

}  // namespace

Model::Model(const ModelSpec& spec, const Tensors& tensors, const ModelOptions& options)
    : spec_((check_spec(spec, options.first, options.last), spec)),
      first_(options.first),
      last_(options.last),
      kernels_(options.kernels),
      ops_(*kernels_.ops),
      pool_(options.n_threads) {
  const Reader reader(tensors);
  const int64_t d = spec.d_model, d_q = spec.n_heads * spec.head_dim;
  const int64_t d_kv = spec.n_kv_heads * spec.head_dim;

  // Matrices are packed by all threads, so first they are only listed.
  std::vector<std::pair<Linear*, RawTensor>> to_pack;
  const auto linear = [&](Linear& to, const std::string& name, int64_t rows, int64_t cols) {
    to.name = name;
    to.bias = reader.optional(name + ".bias", rows);
    to_pack.emplace_back(&to, reader.matrix(name + ".weight", rows, cols));
  };

  embedding_ = reader.matrix("token_embd.weight", spec.n_vocab, d);
  layers_.resize(last_ - first_);
  for (int i = first_; i < last_; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    Layer& layer = layers_[i - first_];
    layer.attn_norm = reader.vector(block + "attn_norm.weight", d);
    layer.ffn_norm = reader.vector(block + "ffn_norm.weight", d);
    if (spec.has_sub_norms) {
      layer.attn_sub_norm = reader.vector(block + "attn_sub_norm.weight", d_q);
      layer.ffn_sub_norm = reader.vector(block + "ffn_sub_norm.weight", spec.d_ff);
    }
    if (spec.has_qk_norms) {
      layer.q_norm = reader.vector(block + "attn_q_norm.weight", spec.head_dim);
      layer.k_norm = reader.vector(block + "attn_k_norm.weight", spec.head_dim);
    }
    linear(layer.q, block + "attn_q", d_q, d);
    linear(layer.k, block + "attn_k", d_kv, d);
    linear(layer.v, block + "attn_v", d_kv, d);
    linear(layer.o, block + "attn_output", d, d_q);
    linear(layer.gate, block + "ffn_gate", spec.d_ff, d);
    linear(layer.up, block + "ffn_up", spec.d_ff, d);
    linear(layer.down, block + "ffn_down", d, spec.d_ff);
  }
  for (const auto& [name, values] : tensors.vectors) {
    if (name == "final" || name.starts_with("exit.")) gains_[name] = reader.vector(name, d);
  }
  if (!gains_.empty()) {
    linear(head_, reader.has_matrix("output.weight") ? "output" : "token_embd", spec.n_vocab, d);
  }
  frequencies_ = rope_frequencies(spec.rope_base, spec.head_dim,
                                  reader.optional("rope_freqs.weight", spec.head_dim / 2));

  int64_t ternary_weights = 0;
  for (const auto& [to, raw] : to_pack) {
    if (is_ternary(raw.type)) ternary_weights += raw.rows * raw.cols;
  }
  size_t n_bytes = 0;
  for (const auto& [to, raw] : to_pack) n_bytes += raw.bytes.size();
  const bool is_large = n_bytes > kArenaBytes;  // a small model would only take more memory
  const PanelKind ternary = ternary_kind(kernels_, options.lut, ternary_weights);

  pool_.run(static_cast<int64_t>(to_pack.size()), [&](int64_t i, int) {
    auto& [to, raw] = to_pack[i];
    const std::string name = to->name + ".weight";
    const std::vector<float> scales = reader.optional(to->name + ".scale", 1);
    const float scale = scales.empty() ? 1.0f : scales[0];
    const KeptPanels* kept = reader.panels(name, raw, scale);
    if (kept == nullptr && to == &head_ && options.head == HeadMode::kQ4) {
      to->weight.scale = scale;  // the rest in make_head
      return;
    }
    try {
      to->weight = kept != nullptr ? packed_from(*kept) : pack(raw, scale, ternary, options.floats);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(name + ": " + error.what());
    }
    if (kept == nullptr && is_large) to->weight.data = arena_.moved(std::move(to->weight.data));
  });

  if (!gains_.empty()) make_head(to_pack.back().second, options.head);

  Scratch& s = scratch_;
  s.q.resize(kChunkRows * d_q);
  s.k.resize(kChunkRows * d_kv);
  s.v.resize(kChunkRows * d_kv);
  s.o.resize(kChunkRows * d_q);
  s.gate.resize(kChunkRows * spec.d_ff);
  s.up.resize(kChunkRows * spec.d_ff);
  s.y.resize(kChunkRows * d);
  s.far_q.resize(kChunkRows * d_q);
  s.plain_k.resize(kChunkRows * d_kv);
  s.far_cos.resize(spec.head_dim / 2);
  s.far_sin.resize(spec.head_dim / 2);
  s.cos.resize(kChunkRows * spec.head_dim / 2);
  s.sin.resize(kChunkRows * spec.head_dim / 2);
  for (int i = 0; i < pool_.size(); ++i) {
    s.row.emplace_back(std::max({d, d_q, spec.d_ff}));
    s.attention.emplace_back(spec.n_heads, spec.n_kv_heads, spec.head_dim);
  }
  for (const auto& [to, raw] : to_pack) {
    s.inputs[grain_slot(to->weight.grain())].reset(kChunkRows, raw.cols, to->weight.grain());
  }
  if (is_screened()) {
    s.inputs[grain_slot(screen_.weight.grain())].reset(kChunkRows, d, screen_.weight.grain());
  }
}

void Model::make_head(const RawTensor& raw, HeadMode mode) {
  if (mode == HeadMode::kQ4 && head_.weight.rows == 0) {
    try {
      head_.weight = requantized(raw, head_.weight.scale, pool_);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(head_.name + ".weight: " + error.what());
    }
  }
  if (mode == HeadMode::kScreened && head_.bias.empty() && can_be_screened(head_.weight)) {
    screen_.name = head_.name + ".screen";
    screen_.weight = screen_copy(raw, head_.weight, pool_, bounds_);
  }
}

std::vector<PanelInfo> Model::panels() const {
  std::vector<PanelInfo> list;
  const auto add = [&](const Linear& l) {
    const PackedMat& w = l.weight;
    list.push_back(
        {l.name, kind_name(w.kind), w.rows, w.cols, w.data.size() + w.row_scales.size()});
  };
  for (const Layer& l : layers_) {
    for (const Linear* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) add(*w);
  }
  if (!gains_.empty()) add(head_);
  if (is_screened()) add(screen_);
  return list;
}

std::unique_ptr<KvCache> Model::new_kv(int64_t max_len, KvType type, KvPolicy policy) const {
  return std::make_unique<KvCache>(
      KvShape{first_, last_, spec_.n_kv_heads, spec_.head_dim, max_len, type, policy});
}

void Model::embed(std::span<const int32_t> ids, float* out) const {
  if (ids.empty()) throw std::invalid_argument("no token ids: expected at least 1");
  for (const int32_t id : ids) {
    if (id < 0 || id >= spec_.n_vocab) {
      throw std::invalid_argument("token id " + std::to_string(id) + ": the vocabulary holds 0.." +
                                  std::to_string(spec_.n_vocab - 1));
    }
    dequantize_row(embedding_, id, {out, static_cast<size_t>(spec_.d_model)});
    out += spec_.d_model;
  }
}

void Model::check_rows(RowsView h) const {
  if (h.rows < 1 || h.cols != spec_.d_model) {
    throw std::invalid_argument("rows of shape " + shape_text(h.rows, h.cols) + ": expected [T, " +
                                std::to_string(spec_.d_model) + "], T >= 1");
  }
}

void Model::check_layers(int first, int last) const {
  if (first < first_ || last <= first || last > last_) {
    throw std::invalid_argument("layers " + range_text(first, last) + ": the model has " +
                                range_text(first_, last_));
  }
}

// The position of the first row.
int64_t Model::check_call(RowsView h, const KvCache& kv, int first, int last) const {
  check_rows(h);
  check_layers(first, last);
  const KvShape& s = kv.shape();
  if (s.first != first_ || s.last != last_ || s.n_kv_heads != spec_.n_kv_heads ||
      s.head_dim != spec_.head_dim) {
    throw std::invalid_argument("the KV cache was made for a model of another shape");
  }
  const int64_t start = kv.length(first);
  for (int i = first; i < last; ++i) {
    if (kv.length(i) != start) {
      throw std::invalid_argument("layers " + range_text(first, last) +
                                  " have run different positions: layer " + std::to_string(first) +
                                  " " + std::to_string(start) + ", layer " + std::to_string(i) +
                                  " " + std::to_string(kv.length(i)));
    }
  }
  if (h.rows > s.max_len - start) {
    throw ContextFull(std::to_string(start + h.rows) + " positions: the cache holds " +
                      std::to_string(s.max_len));
  }
  return start;
}

void Model::forward(RowsView h, KvCache& kv, int first, int last, const uint8_t* cancel,
                    float* out) {
  pool_.check_process();
  const Occupied model_occupied(in_use_, kBusy);
  const Occupied kv_occupied(kv.in_use(), "another thread is at work with this KV cache");
  const int64_t start = check_call(h, kv, first, last), d = spec_.d_model;
  if (out != h.data) std::memcpy(out, h.data, h.rows * d * sizeof(float));
  rope_angles(frequencies_, spec_.rope_scale, kv.shape().policy.window, 1, scratch_.far_cos.data(),
              scratch_.far_sin.data());
  try {
    for (int64_t done = 0; done < h.rows; done += kChunkRows) {
      const int64_t n = std::min(kChunkRows, h.rows - done);
      rope_angles(frequencies_, spec_.rope_scale, start + done, n, scratch_.cos.data(),
                  scratch_.sin.data());
      for (int i = first; i < last; ++i) {
        if (is_set(cancel)) throw Cancelled("stopped on request");
        run_layer(i, out + done * d, n, start + done, kv);
      }
    }
  } catch (...) {
    for (int i = first; i < last; ++i) kv.take_back(i);
    throw;
  }
  for (int i = first; i < last; ++i) kv.keep(i);
}

void Model::forward(RowsView h, std::span<const PagedSpan> spans, std::span<const PagedKv> kv,
                    int first, int last, float* out) {
  pool_.check_process();
  const Occupied model_occupied(in_use_, kBusy);
  check_rows(h);
  check_layers(first, last);
  if (static_cast<int>(kv.size()) != last - first) {
    throw std::invalid_argument("stores of " + std::to_string(kv.size()) +
                                " layers for the layers " + range_text(first, last));
  }
  for (const PagedKv& store : kv) {
    if (store.n_kv_heads != spec_.n_kv_heads || store.head_dim != spec_.head_dim) {
      throw std::invalid_argument("the blocks were made for a model of another shape");
    }
  }
  int64_t covered = 0;
  for (const PagedSpan& s : spans) {
    if (s.row != covered) throw std::invalid_argument("spans: expected one behind the other");
    covered += s.n;
  }
  if (covered != h.rows) {
    throw std::invalid_argument("spans of " + std::to_string(covered) + " rows: expected " +
                                std::to_string(h.rows));
  }
  if (scratch_.paged.empty()) {
    for (int i = 0; i < pool_.size(); ++i) {
      scratch_.paged.emplace_back(spec_.n_heads, spec_.n_kv_heads, spec_.head_dim);
    }
  }
  const int64_t d = spec_.d_model, half = spec_.head_dim / 2;
  if (out != h.data) std::memcpy(out, h.data, h.rows * d * sizeof(float));
  for (int64_t done = 0; done < h.rows; done += kChunkRows) {
    const int64_t n = std::min(kChunkRows, h.rows - done);
    std::vector<PagedSpan> part;  // of the spans, what lies in this chunk
    for (const PagedSpan& s : spans) {
      const int64_t begin = std::max(s.row, done), end = std::min(s.row + s.n, done + n);
      if (begin >= end) continue;
      part.push_back({begin - done, end - begin, s.start + begin - s.row, s.blocks});
      rope_angles(frequencies_, spec_.rope_scale, part.back().start, part.back().n,
                  scratch_.cos.data() + part.back().row * half,
                  scratch_.sin.data() + part.back().row * half);
    }
    for (int i = first; i < last; ++i) run_layer(i, out + done * d, n, part, kv[i - first]);
  }
}

void Model::run_layer(int index, float* h, int64_t rows, int64_t start, KvCache& kv) {
  const Layer& layer = layers_[index - first_];
  Scratch& s = scratch_;
  const int64_t hd = spec_.head_dim, d_q = spec_.n_heads * hd, d_kv = spec_.n_kv_heads * hd;
  project(layer, h, rows);
  const AttentionCall call{kv,         index,      start,         rows, spec_.n_heads,
                           s.q.data(), s.o.data(), s.far_q.data()};
  const int64_t n_sinks = kv.sinks_among(start, rows);
  for_rows(rows, d_q + d_kv, [&](int64_t i, int) {
    norm_heads(layer, i);
    if (i < n_sinks) std::copy_n(s.k.data() + i * d_kv, d_kv, s.plain_k.data() + i * d_kv);
    if (call.sees_far_sinks()) {
      float* far_q = s.far_q.data() + i * d_q;
      std::copy_n(s.q.data() + i * d_q, d_q, far_q);
      rotate(far_q, spec_.n_heads, hd / 2, s.far_cos.data(), s.far_sin.data(), spec_.rope_pairs);
    }
    rotate_heads(i);
  });
  kv.append(index, {s.k.data(), s.plain_k.data(), s.v.data(), rows}, ops_);
  attention(call, ops_, pool_, s.attention);
  finish(layer, h, rows);
}

void Model::run_layer(int index, float* h, int64_t rows, std::span<const PagedSpan> spans,
                      const PagedKv& kv) {
  const Layer& layer = layers_[index - first_];
  Scratch& s = scratch_;
  project(layer, h, rows);
  for_rows(rows, (spec_.n_heads + spec_.n_kv_heads) * spec_.head_dim, [&](int64_t i, int) {
    norm_heads(layer, i);
    rotate_heads(i);
  });
  paged_append(kv, spans, s.k.data(), s.v.data(), ops_, pool_);
  paged_attention(kv, spans, spec_.n_heads, s.q.data(), s.o.data(), ops_, pool_, s.paged);
  finish(layer, h, rows);
}

void Model::project(const Layer& layer, const float* h, int64_t rows) {
  const int64_t d = spec_.d_model;
  const Product qkv[] = {
      {layer.q, scratch_.q.data()}, {layer.k, scratch_.k.data()}, {layer.v, scratch_.v.data()}};
  quantize(qkv, rows, [&](int64_t i, float* row) -> const float* {
    ops_.rms_norm(h + i * d, layer.attn_norm.data(), d, spec_.norm_eps, row);
    return row;
  });
  multiply(qkv, rows);
}

void Model::norm_heads(const Layer& layer, int64_t row) {
  if (!spec_.has_qk_norms) return;
  const int64_t hd = spec_.head_dim, d_q = spec_.n_heads * hd, d_kv = spec_.n_kv_heads * hd;
  float* q = scratch_.q.data() + row * d_q;
  float* k = scratch_.k.data() + row * d_kv;
  for (int64_t j = 0; j < d_q; j += hd)
    ops_.rms_norm(q + j, layer.q_norm.data(), hd, spec_.norm_eps, q + j);
  for (int64_t j = 0; j < d_kv; j += hd)
    ops_.rms_norm(k + j, layer.k_norm.data(), hd, spec_.norm_eps, k + j);
}

void Model::rotate_heads(int64_t row) {
  const int64_t hd = spec_.head_dim;
  const float* cos = scratch_.cos.data() + row * (hd / 2);
  const float* sin = scratch_.sin.data() + row * (hd / 2);
  rotate(scratch_.q.data() + row * spec_.n_heads * hd, spec_.n_heads, hd / 2, cos, sin,
         spec_.rope_pairs);
  rotate(scratch_.k.data() + row * spec_.n_kv_heads * hd, spec_.n_kv_heads, hd / 2, cos, sin,
         spec_.rope_pairs);
}

void Model::finish(const Layer& layer, float* h, int64_t rows) {
  Scratch& s = scratch_;
  const int64_t d = spec_.d_model, d_q = spec_.n_heads * spec_.head_dim, d_ff = spec_.d_ff;
  const float eps = spec_.norm_eps;
  const Product wo[] = {{layer.o, s.y.data()}};
  quantize(wo, rows, [&](int64_t i, float* row) -> const float* {
    const float* o = s.o.data() + i * d_q;
    if (!spec_.has_sub_norms) return o;
    ops_.rms_norm(o, layer.attn_sub_norm.data(), d_q, eps, row);
    return row;
  });
  multiply(wo, rows);
  ops_.add(s.y.data(), rows * d, h);

  const Product gate_up[] = {{layer.gate, s.gate.data()}, {layer.up, s.up.data()}};
  quantize(gate_up, rows, [&](int64_t i, float* row) -> const float* {
    ops_.rms_norm(h + i * d, layer.ffn_norm.data(), d, eps, row);
    return row;
  });
  multiply(gate_up, rows);
  const Product down[] = {{layer.down, s.y.data()}};
  const auto activate = spec_.activation == Activation::kRelu2 ? ops_.relu2_mul : ops_.silu_mul;
  quantize(down, rows, [&](int64_t i, float* row) -> const float* {
    activate(s.gate.data() + i * d_ff, s.up.data() + i * d_ff, d_ff, row);
    if (spec_.has_sub_norms) ops_.rms_norm(row, layer.ffn_sub_norm.data(), d_ff, eps, row);
    return row;
  });
  multiply(down, rows);
  ops_.add(s.y.data(), rows * d, h);
}

template <typename MakeRow>
void Model::quantize(std::span<const Product> products, int64_t rows, MakeRow make_row) {
  const int64_t cols = products[0].w.weight.cols;
  std::array<bool, kGrains.size()> needed = {};
  for (const Product& p : products) needed[grain_slot(p.w.weight.grain())] = true;
  for (size_t slot = 0; slot < needed.size(); ++slot) {
    if (needed[slot]) scratch_.inputs[slot].reset(rows, cols, kGrains[slot]);
  }
  for_rows(rows, cols, [&](int64_t i, int worker) {
    const std::span<const float> x(make_row(i, scratch_.row[worker].data()), cols);
    try {
      for (size_t slot = 0; slot < needed.size(); ++slot) {
        if (needed[slot]) scratch_.inputs[slot].quantize_row(x, i, ops_, kernels_.lut_tables);
      }
    } catch (const std::invalid_argument& error) {
      throw EngineFailure("input of " + products[0].w.name + ": " + error.what());
    }
  });
}

void Model::multiply(std::span<const Product> products, int64_t rows) {
  int64_t n_chunks = 0, n_bytes = 0;
  for (const Product& p : products) {
    n_chunks += Cut(p.w.weight, rows).n_chunks();
    n_bytes += p.w.weight.n_panels() * p.w.weight.panel_bytes;
  }
  const auto work = [&](int64_t chunk, int) {
    for (const Product& p : products) {
      const PackedMat& w = p.w.weight;
      const Cut cut(w, rows);
      if (chunk >= cut.n_chunks()) {
        chunk -= cut.n_chunks();
        continue;
      }
      const Cut::Part part = cut.part(chunk);
      float* y = p.y + part.row * w.rows;
      const Rows x = some_rows(scratch_.inputs[grain_slot(w.grain())].view(), part.row, part.m);
      matmul(kernels_, w, x, part.first, part.last, {y, static_cast<size_t>(part.m * w.rows)},
             w.rows);
      if (p.w.bias.empty()) return;
      const int64_t begin = part.first * kPanelRows;
      const int64_t end = std::min(w.rows, part.last * kPanelRows);
      for (int64_t i = 0; i < part.m; ++i) {
        ops_.add(p.w.bias.data() + begin, end - begin, y + i * w.rows + begin);
      }
      return;
    }
  };
  pool_.run(n_chunks, work, n_bytes * rows < kAloneBelow);
}

template <typename Work>
void Model::for_rows(int64_t rows, int64_t width, Work work) {
  const int64_t step = std::max<int64_t>(1, kRowsChunk / width);
  pool_.run((rows + step - 1) / step, [&](int64_t chunk, int worker) {
    for (int64_t i = chunk * step; i < std::min(rows, (chunk + 1) * step); ++i) work(i, worker);
  });
}

const std::vector<float>& Model::gain(const std::string& head) const {
  const auto found = gains_.find(head);
  if (found != gains_.end()) return found->second;
  std::string known;
  for (const auto& [name, values] : gains_) known += (known.empty() ? "" : ", ") + name;
  throw std::invalid_argument("head \"" + head + "\": the model has " +
                              (known.empty() ? "none" : known));
}

void Model::norm(RowsView h, const std::string& head, float* out) const {
  check_rows(h);
  const float* g = gain(head).data();
  const int64_t d = spec_.d_model;
  for (int64_t i = 0; i < h.rows; ++i) {
    ops_.rms_norm(h.data + i * d, g, d, spec_.norm_eps, out + i * d);
  }
}

void Model::logits(RowsView h, const std::string& head, float* out) {
  pool_.check_process();
  const Occupied occupied(in_use_, kBusy);
  check_rows(h);
  const float* g = gain(head).data();
  const int64_t d = spec_.d_model;
  for (int64_t done = 0; done < h.rows; done += kChunkRows) {
    const int64_t n = std::min(kChunkRows, h.rows - done);
    const Product product[] = {{head_, out + done * spec_.n_vocab}};
    quantize(product, n, [&](int64_t i, float* row) -> const float* {
      ops_.rms_norm(h.data + (done + i) * d, g, d, spec_.norm_eps, row);
      return row;
    });
    multiply(product, n);
  }
}

void Model::greedy(RowsView h, const std::string& head, const Greedy& out) {
  pool_.check_process();
  const Occupied occupied(in_use_, kBusy);
  check_rows(h);
  const float* g = gain(head).data();
  const int64_t d = spec_.d_model, n_vocab = spec_.n_vocab;
  scratch_.scores.resize(kGreedyRows * n_vocab);
  scratch_.marks.resize(head_.weight.n_panels());
  for (int64_t done = 0; done < h.rows; done += kGreedyRows) {
    const int64_t n = std::min(kGreedyRows, h.rows - done);
    float* scores = scratch_.scores.data();
    const Product products[] = {{head_, scores}, {screen_, scores}};  // one of them is multiplied
    const std::span<const Product> inputs(products, is_screened() ? 2 : 1);
    quantize(inputs, n, [&](int64_t i, float* row) -> const float* {
      ops_.rms_norm(h.data + (done + i) * d, g, d, spec_.norm_eps, row);
      return row;
    });
    multiply(inputs.last(1), n);
    for (int64_t i = 0; i < n; ++i) {
      decide(i, {scores + i * n_vocab, static_cast<size_t>(n_vocab)}, done + i, out);
    }
  }
}

void Model::decide(int64_t row, std::span<float> scores, int64_t index, const Greedy& out) {
  const PackedMat& w = head_.weight;
  std::vector<uint8_t>& marks = scratch_.marks;
  int64_t n_marked = w.n_panels();
  if (is_screened()) {
    const Rows exact = scratch_.inputs[grain_slot(w.grain())].view();
    const Rows copy = scratch_.inputs[grain_slot(screen_.weight.grain())].view();
    n_marked = mark_candidates(bounds_, scores, input_norms(exact, copy, row), pool_, marks);
    const Rows x = some_rows(exact, row, 1);
    const auto work = [&](int64_t panel, int) {
      if (marks[panel]) matmul(kernels_, w, x, panel, panel + 1, scores, w.rows);
    };
    pool_.run(w.n_panels(), work, n_marked * w.panel_bytes < kAloneBelow);
  } else {
    std::fill(marks.begin(), marks.end(), uint8_t{1});
  }
  int64_t best = -1;
  bool finite = true;
  for (int64_t v = 0; v < w.rows; ++v) {
    finite &= scores[v] - scores[v] == 0;
    if (marks[v / kPanelRows] && (best < 0 || scores[v] > scores[best])) best = v;
  }
  if (!finite) throw EngineFailure("a logit is not a finite number: the weights are damaged");
  float sum = 0;  // of exp(score - best), but for those below e^-20
  for (const float score : scores) {
    if (score > scores[best] - 20.0f) sum += std::exp(std::min(score - scores[best], 0.0f));
  }
  out.ids[index] = static_cast<int32_t>(best);
  out.sure[index] = 1.0f / sum;
  out.n_panels[index] = is_screened() ? static_cast<int32_t>(n_marked) : 0;
}

}  // namespace nearfar
