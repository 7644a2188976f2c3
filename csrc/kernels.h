// Types shared by the drivers (attention.cpp) and the instruction-set specific kernels (isa_*.cpp).
// Plain data only: the isa_*.cpp files are compiled for processors the host may not have, so nothing inline lives here.
#pragma once

#include <cstdint>

namespace cdistill {

enum class DType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// (B, H, T, D) tensor with unit stride on D; strides count elements.
struct Operand {
  const void* data;
  DType dtype;
  int64_t stride_batch, stride_head, stride_token;
};

// What one call works on: P = exp(scale * q k^T - lse) at (rows, cols). Without `cols`, column j is key j.
struct Problem {
  Operand q, k;
  int64_t batch, heads, kv_heads, tokens, dim;
  int64_t n_rows, n_cols;
  const int32_t* rows;      // (B, n_rows) positions, -1 = padding
  const int32_t* cols;      // (B, n_cols) positions, -1 = padding, or null
  const uint8_t* key_mask;  // (B, T), 0 = hidden, or null
  bool causal;
  float scale;
};

// Gradient of the probabilities: dS = P * weight * factor, then dq += dS k and dk += dS^T q.
// The weight is a matrix (B, [H,] n_rows, n_cols), or with `row_weight` one number per (B, H, n_rows).
struct Gradient {
  const float* lse;  // (B, H, n_rows)
  const float* weight;
  int64_t weight_stride_batch, weight_stride_head;
  bool row_weight;
  float weight_factor;  // 1 / heads for the head mean
  float* dq;            // (B, H, T, D)
  float* dk;            // (B, Hkv, T, D)
  float* dlse;          // (B, H, n_rows) or null
};

// A part of one (sample, kv head): query heads [group_begin, group_end) of its group, rows and columns from..to.
struct Part {
  int64_t sample, kv_head;
  int64_t group_begin, group_end;
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
};

constexpr int64_t kRowTile = 48;    // rows of one score tile
constexpr int64_t kColTile = 128;   // columns of one score tile; part borders are multiples of it
constexpr int64_t kRowChunk = 288;  // most rows of a part that sums over heads or columns; a multiple of kRowTile
constexpr int64_t kMaxDim = 256;
constexpr int64_t kMaxLanes = 16;

// Working memory of one thread; zeroed before use, because hidden parts of `tile` are read (and dropped) unwritten.
struct alignas(64) Scratch {
  float queries[kRowTile * kMaxDim];  // (row, d)
  float keys[kColTile * kMaxDim];     // (col, d)
  float panels[kColTile * kMaxDim];   // (panel, d, col of the panel)
  float tile[kRowTile * kColTile];    // scores, then dS
  float sum[kRowChunk * kColTile];    // head sum of P
  float running_max[kRowChunk * kMaxLanes];
  float running_sum[kRowChunk * kMaxLanes];
  int32_t key_position[kColTile];  // INT32_MAX where the key is hidden from every row
  int32_t row_limit[kRowTile];     // last position the row may see; -1 for padding
  float* row_target[kRowTile];
  float* col_target[kColTile];
};

enum class Divergence : int64_t { kForwardKl = 0, kReverseKl = 1, kJsd = 2 };

// Rows of logits whose cross-entropy and divergence one call computes. Rows are padded: vectors of kMaxLanes may be read,
// and written in `student`, up to the strides, which are multiples of that.
struct VocabularyRows {
  void* student;        // (n_rows, vocab) logits; with `gradient`, that of ce_weight * ce + kd_weight * kd after
  const void* teacher;  // likewise, only read; null for a top-k teacher
  DType dtype;          // float32 or bfloat16
  int64_t student_stride, teacher_stride, n_rows, vocab;
  const int64_t* labels;      // (n_rows,)
  int64_t n_top;              // 0 for a teacher with logits
  const float* top_values;    // (n_rows, n_top) log-probabilities
  const int64_t* top_indices;
  const float* top_tail;      // (n_rows,) log-probability of all other tokens
  float* top_logits;          // (n_rows, n_top), working memory
  Divergence divergence;
  float temperature, beta, ce_weight, kd_weight;
  bool gradient;
  float* ce;  // (n_rows,)
  float* kd;
};

struct Kernels {
  const char* name;
  // out (B, n_rows, n_cols) mean over heads, or (B, H, n_rows, n_cols) with `each`.
  void (*slice_forward)(const Problem&, const Part&, const float* lse, float* out, bool each, Scratch&);
  void (*gradient)(const Problem&, const Part&, const Gradient&, bool want_dq, bool want_dk, Scratch&);
  // One query head (group_end == group_begin + 1), all columns; lse (B, H, n_rows).
  void (*row_lse)(const Problem&, const Part&, float* lse, Scratch&);
  void (*vocabulary_row)(const VocabularyRows&, int64_t row);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The kernels named by the environment variable CDISTILL_CPU_ISA, by default the widest this processor runs.
// Throws std::invalid_argument for a name that is unknown or that the processor does not support.
const Kernels& select_kernels();

}  // namespace cdistill
