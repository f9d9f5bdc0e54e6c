// The layer loop: embed ids, run any range of layers over rows, norm and multiply by a head.
//
//   ids [T] -> embed -> h [T, D] -> forward(first, last) -> h [T, D] -> logits(head) -> [M, V]
//
// A Model does not change after construction but for its scratch; sequences live in KvCache.  One
// thread at a time. Row invariance: a row's bits depend on its own input and the rows before it in
// the cache, not on how many rows share the call, how they are cut into chunks, or on threads.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "attention.h"
#include "head.h"
#include "kernels.h"
#include "kv_cache.h"
#include "paged_attention.h"
#include "quant.h"
#include "rope.h"
#include "threads.h"

namespace nearfar {

enum class Activation : uint8_t { kSilu, kRelu2 };  // silu(gate) * up, relu(gate)^2 * up

// Sizes and variants of one decoder-only transformer.
struct ModelSpec {
  int n_layers;
  int64_t d_model, n_heads, n_kv_heads, head_dim, d_ff, n_vocab;
  float norm_eps;
  double rope_base, rope_scale;
  RopePairs rope_pairs;
  Activation activation;
  bool has_sub_norms, has_qk_norms;  // before wo and down; on the heads of q and k
};

// What a file holds, by its GGUF names: matrices `*.weight`, vectors (norm gains, `*.bias`,
// `rope_freqs.weight`) and scalars `*.scale`; "final" and "exit.{e}" name the gains of the heads.
// `panels` holds, by the same names, matrices that were packed before for kernels of the same
// layout: those are not packed again; the head of HeadMode::kQ4 is the requantised one. The bytes
// of `token_embd.weight` and of `panels` must outlive the Model, the rest may go.
struct Tensors {
  std::map<std::string, RawTensor> matrices;
  std::map<std::string, KeptPanels> panels;
  std::map<std::string, std::span<const float>> vectors;
};

// f32 rows of a caller, without gaps.
struct RowsView {
  const float* data;
  int64_t rows, cols;
};

struct PanelInfo {
  std::string name;
  std::string_view kind;
  int64_t rows, cols;
  size_t n_bytes;
};

// Choices of a caller that belong to the engine, not to the model.
struct ModelOptions {
  int first, last;  // the layers [first, last)
  int n_threads;
  const Kernels& kernels;
  bool lut = false;  // ternary matrices multiply by lookup, near the exact product (lut_gemv.h)
  HeadMode head = HeadMode::kFile;
  Floats floats = Floats::kExact;
};

class Model {
 public:
  // Packs the layers of `options` and, if there is a gain for any head, the head's matrix
  // (`output.weight`, or the embedding).  Throws std::invalid_argument that names a tensor which is
  // missing or has another shape, and for `lut` with kernels that have no lookups.
  Model(const ModelSpec& spec, const Tensors& tensors, const ModelOptions& options);

  const ModelSpec& spec() const { return spec_; }
  int n_threads() const { return pool_.size(); }
  const char* isa() const { return kernels_.isa; }

  // What a token reads, matrix by matrix.
  std::vector<PanelInfo> panels() const;

  std::unique_ptr<KvCache> new_kv(int64_t max_len, KvType type, KvPolicy policy = {}) const;

  // out [ids, D]: rows of the embedding.  Throws std::invalid_argument on an id outside the
  // vocabulary.
  void embed(std::span<const int32_t> ids, float* out) const;

  // h [rows, D] -> out [rows, D], the raw residual rows (input of layer `last`); `out` may be `h`.
  // K and V of the layers [first, last) grow by `rows`.  `cancel`: null, or a byte that another
  // thread sets to end the call. Throws std::invalid_argument, ContextFull, Cancelled, EngineBusy,
  // EngineFailure (a number that is not finite), std::bad_alloc; then the cache is as it was.
  void forward(RowsView h, KvCache& kv, int first, int last, const uint8_t* cancel, float* out);

  // The same for rows of many sequences, whose keys and values lie in blocks: the spans follow each
  // other and cover the rows, kv[i - first] holds the blocks of layer i. Throws as above, but for
  // ContextFull and Cancelled; the blocks of the spans' positions may then hold anything.
  void forward(RowsView h, std::span<const PagedSpan> spans, std::span<const PagedKv> kv, int first,
               int last, float* out);

  // h [rows, D] -> out [rows, D]: what the head multiplies.  Throws std::invalid_argument on an
  // unknown head.
  void norm(RowsView h, const std::string& head, float* out) const;
  // h [rows, D] -> out [rows, V]: norm, then the head's matrix.
  void logits(RowsView h, const std::string& head, float* out);
  // For each row of h the id of the largest logit, the lowest of equals, and its probability: with
  // a screen the id is the same, the probability an estimate from the logits of the copy,
  // and n_panels says how many panels of the head were read besides the screen.  Throws as
  // `logits`, and EngineFailure where a logit is not a number.
  struct Greedy {
    int32_t* ids;       // [rows]
    float* sure;        // [rows]
    int32_t* n_panels;  // [rows]
  };
  void greedy(RowsView h, const std::string& head, const Greedy& out);
  bool is_screened() const { return screen_.weight.rows > 0; }

 private:
  struct Linear {
    std::string name;
    PackedMat weight;
    std::vector<float> bias;  // empty: none
  };
  struct Layer {
    std::vector<float> attn_norm, ffn_norm, attn_sub_norm, ffn_sub_norm, q_norm, k_norm;
    Linear q, k, v, o, gate, up, down;
  };
  struct Product {
    const Linear& w;
    float* y;  // [rows, w.rows]
  };
  struct Scratch {
    ScratchRows q, k, v, o, gate, up, y;      // [kChunkRows, ...]
    ScratchRows far_q, plain_k;               // as q and k, for caches with a window
    std::vector<float> cos, sin;              // [kChunkRows, head_dim / 2]
    std::vector<float> far_cos, far_sin;      // [head_dim / 2]
    std::vector<std::vector<float>> row;      // a row for each thread
    std::array<QuantRows, 6> inputs;          // the input of a product, by grain
    std::vector<AttentionScratch> attention;  // for each thread
    std::vector<PagedScratch> paged;          // the same, made when first needed
    ScratchRows scores;                       // [kGreedyRows, V]
    std::vector<uint8_t> marks;               // a panel of the head each
  };

  void make_head(const RawTensor& raw, HeadMode mode);
  void run_layer(int index, float* h, int64_t rows, int64_t start, KvCache& kv);
  void run_layer(int index, float* h, int64_t rows, std::span<const PagedSpan> spans,
                 const PagedKv& kv);
  // The parts of a layer before and behind its attention; q and k of a row are normed, then
  // rotated.
  void project(const Layer& layer, const float* h, int64_t rows);
  void norm_heads(const Layer& layer, int64_t row);
  void rotate_heads(int64_t row);
  void finish(const Layer& layer, float* h, int64_t rows);
  // Makes the input of `products`: make_row(i, a scratch row) returns row i of it, f32 [cols].
  template <typename MakeRow>
  void quantize(std::span<const Product> products, int64_t rows, MakeRow make_row);
  void multiply(std::span<const Product> products, int64_t rows);
  // One row of `greedy`: scores [V] are those of the screen, or of the head if there is none.
  void decide(int64_t row, std::span<float> scores, int64_t index, const Greedy& out);
  // Calls work(row, worker) for each row; `width` numbers of a row tell what that costs.
  template <typename Work>
  void for_rows(int64_t rows, int64_t width, Work work);
  const std::vector<float>& gain(const std::string& head) const;
  void check_rows(RowsView h) const;
  void check_layers(int first, int last) const;
  int64_t check_call(RowsView h, const KvCache& kv, int first, int last) const;

  ModelSpec spec_;
  int first_, last_;
  const Kernels& kernels_;
  const Ops& ops_;
  ThreadPool pool_;
  RawTensor embedding_;
  HugeArena arena_;            // matrices lie in it: it must outlive them
  std::vector<Layer> layers_;  // [last - first]
  Linear head_;
  Linear screen_;  // a copy of the head that `greedy` looks at first; without rows: none
  ScreenBounds bounds_;
  std::map<std::string, std::vector<float>> gains_;
  std::vector<double> frequencies_;
  Scratch scratch_;
  mutable std::atomic_flag in_use_ = ATOMIC_FLAG_INIT;
};

}  // namespace nearfar
