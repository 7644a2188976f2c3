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

// A gradient (B, H, T, D) with unit stride on D that is added to; in fp32, or rounded once per element.
struct Result {
  void* data;
  DType dtype;
  int64_t stride_batch, stride_head, stride_token;
};

// What one call works on: P = exp(scale * q k^T - lse) of the rows with the keys. The first n_cols keys are the columns of
// the slice; others take part in the softmax denominator alone. Without `keys`, key j is token j.
struct Problem {
  Operand q, k;
  int64_t batch, heads, kv_heads, tokens, dim;
  int64_t n_rows, n_cols, n_keys;
  const int32_t* rows;      // (B, n_rows) positions, -1 = padding
  const int32_t* keys;      // (B, n_keys) positions, -1 = padding, or null
  const uint8_t* key_mask;  // (B, T), 0 = hidden, or null
  bool causal;
  float scale;
  const uint8_t* dot_pairs;  // (B), whether products are of bf16 pairs with fp32 sums instead of fp32; null for never
};

// What becomes of dlse_i = -factor * sum_j P_ij * weight_ij, the gradient of the rows' log-sum-exp.
enum class Denominator {
  kApart,  // it is a result
  kGiven,  // it is an argument
  kOwn,    // it is a result, and its own part of the gradient is added as if it were given
};

// Gradient of the probabilities: dS_ij = scale * share_i * P_ij * (weight_ij * factor + dlse_i), weight only in the slice
// and dlse only if it is given or own; then dq += dS k and dk += dS^T q.
struct Gradient {
  const float* lse;     // (B, H, n_rows)
  const float* weight;  // (B, [H,] n_rows, n_cols), or null
  int64_t weight_stride_batch, weight_stride_head;
  float factor;  // 1 / heads for the head mean
  Denominator denominator;
  float* dlse;     // (B, H, n_rows); may be null if apart
  float* share;    // (B, H, n_rows), what P is multiplied by to sum to 1 over all keys; null where it stays as it is
  Result dq, dk;   // (B, H, T, D), (B, Hkv, T, D); without data if only dlse is wanted
};

// A part of one (sample, kv head): query heads [group_begin, group_end) of its group, rows and keys from..to.
struct Part {
  int64_t sample, kv_head;
  int64_t group_begin, group_end;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
};

constexpr int64_t kRowTile = 48;    // rows of one score tile
constexpr int64_t kKeyTile = 128;   // keys of one score tile; part borders are multiples of it
constexpr int64_t kRowChunk = 288;  // most rows of a part that sums over heads or keys; a multiple of kRowTile
constexpr int64_t kRowUnit = 12;    // a multiple of the rows of every register tile
constexpr int64_t kMaxLanes = 16;

// Working memory of one thread. A pitch is the head dim in whole vectors of kMaxLanes; a unit is four bytes, an fp32
// number or a pair of bf16 numbers.
struct Scratch {
  float* zeros;         // (pitch), the query of padding
  float* queries;       // (row, d) of a row tile as fp32, or pairs of rows (row / 2, d)
  float* keys;          // (key, d) of a key tile as fp32, or pairs of keys (key / 2, d)
  float* panels;        // (panel, unit of d, key of the panel)
  float* tile;          // (kRowTile, kKeyTile): scores, then probabilities, then dS
  float* tile_pairs;    // dS in pairs along the keys (row, key / 2)
  float* tile_columns;  // dS in pairs of rows (row / 2, key)
  float* sum;           // (kRowChunk, kKeyTile), head sum of P
  float* running_max;   // (kRowChunk, kMaxLanes)
  float* running_sum;
  float* spill;         // (chunk_rows, spill_pitch): exponentials or probabilities of one head, in whole tiles
  float* maxima;        // (chunk_rows, spill_pitch / kKeyTile, kMaxLanes): what they were taken from
  int64_t spill_pitch;
  int64_t chunk_rows;              // of one head that are worked on together where `spill` or `dq` is used
  float* dq;                       // (chunk_rows, pitch), or null if results are fp32 and summed in place
  float* dk;                       // (keys of the part, pitch), likewise
  int32_t key_position[kKeyTile];  // INT32_MAX where the key is hidden from every row
  int32_t row_limit[kRowTile];     // last position the row may see; -1 for padding
  const char* query[kRowTile];     // units along d
  float row_lse[kRowTile];         // +inf beyond the rows
  float* row_target[kRowTile];
  float* key_target[kKeyTile];
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
  bool dot_pairs;  // whether the processor multiplies pairs of bf16 numbers
  // From a given lse: out (B, n_rows, n_cols) mean over heads, or (B, H, n_rows, n_cols) with `each`.
  void (*slice_forward)(const Problem&, const Part&, const float* lse, float* out, bool each, Scratch&);
  // The same, and lse (B, H, n_rows) over all keys, of which the slice's come first and fill whole tiles.
  void (*slice_forward_with_lse)(const Problem&, const Part&, float* lse, float* out, bool each, Scratch&);
  void (*gradient)(const Problem&, const Part&, const Gradient&, bool want_dq, bool want_dk, Scratch&);
  // One query head (group_end == group_begin + 1), all keys; lse (B, H, n_rows).
  void (*row_lse)(const Problem&, const Part&, float* lse, Scratch&);
  // Whether a bf16 vector holds a number below the normal ones, which dot products of pairs would take for zero.
  bool (*has_subnormal)(const uint16_t* x, int64_t n);
  void (*vocabulary_row)(const VocabularyRows&, int64_t row);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
#endif

// The kernels named by the environment variable CDISTILL_CPU_ISA, by default the widest this processor runs.
// Throws std::invalid_argument for a name that is unknown or that the processor does not support.
const Kernels& select_kernels();

}  // namespace cdistill
