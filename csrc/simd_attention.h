// The attention kernels, written once in the compiler's vector types: here the forward passes, in simd_gradient.h the
// gradients. Include them only from isa_*.cpp, as simd_tiles.h.
//
// A part of the work is walked in tiles of kRowTile x kKeyTile. Per key tile the keys are packed as panels
// (d, kPanel) and as rows (key, d), per tile the queries as rows (row, d). Then
//   S = Q K^T          sum over d    of query[row, d] * panel[d, keys]
//   dq += dS K         sum over keys of dS[row, key]  * key[key, dims]
//   dk += dS^T Q       sum over rows of dS[row, key]  * query[row, dims]
// are one register microkernel, `multiply`. From a given log-sum-exp the forward pass turns S into P in registers and adds
// it to the head sum; backward, S, P and dS exist for one tile, in the first-level cache.
//
// Where the log-sum-exp is the op's own, it is known only after a row's last key, and its gradient only after the last
// column. Rather than computing S twice, the exponentials of one head and a few rows are kept until then in the thread's
// working memory, `spill`. They are divided by their sums: at large scores a log-sum-exp in fp32 would be too coarse.
//
// Every element of dq and dk is summed in the same order however the work is cut into parts. A key is visible to a row iff
// key_position <= row_limit, which covers causality, the key mask and both kinds of padding.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd_tiles.h"
#include "simd_vectors.h"

namespace cdistill {
namespace {

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// Calls work(Bool<whether tiles are of pairs>).
template <class Work>
inline void by_tile_kind(const Problem& p, const Part& part, Work work) {
  if constexpr (kDotPairs) {
    if (p.dot_pairs && p.dot_pairs[part.sample]) return work(Bool<true>{});
  }
  work(Bool<false>{});
}

bool has_subnormal(const uint16_t* x, int64_t n) {
  BitVec found = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const BitVec magnitude = load_halves(x + i, n - i) & 0x7fffu;
    found |= (BitVec)(magnitude - 1u < 0x7fu);  // zero wraps around
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (found[lane]) return true;
  return false;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// A row of one of the matrices (n_rows, n_cols) in out.
inline float* matrix_row(const Problem& p, int64_t matrix, int64_t row, float* out) {
  return out + (matrix * p.n_rows + row) * p.n_cols;
}

void store_sum(const Problem& p, const Part& part, int64_t matrix, const Keys& c, float factor, float* out,
               const Scratch& s) {
  for (int64_t i = part.row_begin; i < part.row_end; ++i) {
    const float* sum = s.sum + (i - part.row_begin) * kKeyTile;
    float* to = matrix_row(p, matrix, i, out) + c.begin;
    for (int64_t j = 0; j < c.n; ++j) to[j] = sum[j] * factor;
  }
}

template <bool kPairs>
void slice_forward_as(const Problem& p, const Part& part, const float* lse, float* out, bool each, Scratch& s) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t sum_bytes = round_up(part.row_end - part.row_begin, kRowTile) * kKeyTile * sizeof(float);
  for (int64_t key = part.key_begin; key < part.key_end; key += kKeyTile) {
    const Keys c = locate_keys(p, part.sample, key, part.key_end, s);
    memset(s.sum, 0, sum_bytes);
    for (int64_t head = 0; head < p.heads; ++head) {
      if (head % group == 0 && c.first_position != kNever) pack_panels<kPairs>(p, part.sample, head / group, c, s);
      for (int64_t row = part.row_begin; row < part.row_end; row += kRowTile) {
        const Rows r = locate_rows(p, part.sample, row, part.row_end, s);
        if (c.first_position > r.last_limit) continue;
        find_queries<kPairs>(p, part.sample, head, r, s);
        read_lse(p, part.sample, head, r, lse, s);
        float* sum = s.sum + (row - part.row_begin) * kKeyTile;
        for_scores<kPairs>(p, r, c, s, [&](int64_t i, int64_t j, Vec score) __attribute__((always_inline)) {
          const Vec probability = exp(score - s.row_lse[i]);
          float* to = sum + i * kKeyTile + j;
          store(to, load(to) + (visible(s, i, j) ? probability : Vec{}));
        });
      }
      if (each) {
        store_sum(p, part, part.sample * p.heads + head, c, 1.f, out, s);
        memset(s.sum, 0, sum_bytes);
      }
    }
    if (!each) store_sum(p, part, part.sample, c, 1.f / static_cast<float>(p.heads), out, s);
  }
}

void slice_forward(const Problem& p, const Part& part, const float* lse, float* out, bool each, Scratch& s) {
  by_tile_kind(p, part, [&](auto pairs) { slice_forward_as<decltype(pairs)::value>(p, part, lse, out, each, s); });
}

// ---- log-sum-exp ----------------------------------------------------------------------------------------------------

constexpr float kHidden = -1.f;  // no exponential is below zero

// Online softmax of one tile, a running maximum and a sum per lane. The scores become exp(score - running maximum), and
// kHidden where hidden; `maxima` gets the running maximum of every row if it is not null.
void update_lse(const Rows& r, const Keys& c, float* scores, int64_t scores_pitch, float* running_max,
                float* running_sum, float* maxima, int64_t maxima_pitch, const Scratch& s) {
  for (int64_t i = 0; i < r.n; ++i) {
    float* row = scores + i * scores_pitch;
    const Vec old_max = load(running_max + i * kLanes);
    Vec max = old_max;
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const Vec shown = visible(s, i, j) ? load(row + j) : Vec{} + kLowest;
      max = shown > max ? shown : max;
    }
    Vec sum = load(running_sum + i * kLanes) * exp(old_max - max);
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const Vec term = exp(load(row + j) - max);
      const IntVec shown = visible(s, i, j);
      sum += shown ? term : Vec{};
      if (maxima) store(row + j, shown ? term : Vec{} + kHidden);
    }
    store(running_max + i * kLanes, max);
    store(running_sum + i * kLanes, sum);
    if (maxima) store(maxima + i * maxima_pitch, max);
  }
}

void hide(const Rows& r, const Keys& c, float* scores, int64_t scores_pitch) {
  for (int64_t i = 0; i < r.n; ++i)
    for (int64_t j = 0; j < c.n; j += kLanes) store(scores + i * scores_pitch + j, Vec{} + kHidden);
}

// Maximum of a row's scores and the sum of exp(score - maximum).
struct Softmax {
  float top;
  double total;
};

Softmax join_lanes(const float* max, const float* sum) {
  Softmax row{kLowest, 0};
  for (int lane = 0; lane < kLanes; ++lane) row.top = max[lane] > row.top ? max[lane] : row.top;
  const Vec terms = load(sum) * exp(load(max) - row.top);
  for (int lane = 0; lane < kLanes; ++lane) row.total += terms[lane];
  return row;
}

// Log-sum-exp of the part's rows and one head over all keys. With kKeep the slice stays in s.spill as `update_lse` leaves
// it, and the maxima of its tiles in s.maxima.
template <bool kPairs, bool kKeep>
void head_lse(const Problem& p, const Part& part, int64_t head, float* lse, Scratch& s) {
  const int64_t n_rows = part.row_end - part.row_begin;
  for (int64_t i = 0; i < n_rows * kLanes; ++i) {
    s.running_max[i] = kLowest;
    s.running_sum[i] = 0.f;
  }
  int32_t first_position = kNever;
  for (int64_t key = 0; key < p.n_keys; key += kKeyTile) {
    const Keys c = locate_keys(p, part.sample, key, p.n_keys, s);
    first_position = c.first_position < first_position ? c.first_position : first_position;
    const bool keep = kKeep && c.n_cols > 0;
    bool packed = false;
    for (int64_t row = part.row_begin; row < part.row_end; row += kRowTile) {
      const Rows r = locate_rows(p, part.sample, row, part.row_end, s);
      const int64_t from = row - part.row_begin;
      float* scores = keep ? s.spill + from * s.spill_pitch + key : s.tile;
      const int64_t scores_pitch = keep ? s.spill_pitch : kKeyTile;
      if (c.first_position > r.last_limit) {
        if (keep) hide(r, c, scores, scores_pitch);
        continue;
      }
      if (!packed) {
        pack_panels<kPairs>(p, part.sample, head / (p.heads / p.kv_heads), c, s);
        packed = true;
      }
      find_queries<kPairs>(p, part.sample, head, r, s);
      compute_scores<kPairs>(p, r, c, scores, scores_pitch, s);
      const int64_t maxima_pitch = s.spill_pitch / kKeyTile * kLanes;
      float* maxima = keep ? s.maxima + from * maxima_pitch + key / kKeyTile * kLanes : nullptr;
      update_lse(r, c, scores, scores_pitch, s.running_max + from * kLanes, s.running_sum + from * kLanes, maxima,
                 maxima_pitch, s);
    }
  }
  for (int64_t i = 0; i < n_rows; ++i) {
    const Softmax row = join_lanes(s.running_max + i * kLanes, s.running_sum + i * kLanes);
    const int32_t position = p.rows[part.sample * p.n_rows + part.row_begin + i];
    const bool sees_key = position >= 0 && first_position <= (p.causal ? position : kNever - 1);
    if (row.total != 0) lse[i] = static_cast<float>(row.top + __builtin_log(row.total));
    else lse[i] = sees_key ? __builtin_nanf("") : kInfinity;  // softmax of nothing but -inf
  }
}

template <bool kPairs>
void row_lse_as(const Problem& p, const Part& part, float* lse, Scratch& s) {
  const int64_t head = part.kv_head * (p.heads / p.kv_heads) + part.group_begin;
  head_lse<kPairs, false>(p, part, head, lse + (part.sample * p.heads + head) * p.n_rows + part.row_begin, s);
}

void row_lse(const Problem& p, const Part& part, float* lse, Scratch& s) {
  by_tile_kind(p, part, [&](auto pairs) { row_lse_as<decltype(pairs)::value>(p, part, lse, s); });
}

// out (+)= probabilities of the slice in s.spill for the part's rows; then what is there is multiplied by the factor.
void add_spilled(const Problem& p, const Part& part, const float* lse, int64_t matrix, bool first, float factor,
                 float* out, const Scratch& s) {
  const int64_t maxima_pitch = s.spill_pitch / kKeyTile * kLanes;
  for (int64_t i = 0; i < part.row_end - part.row_begin; ++i) {
    const float* terms = s.spill + i * s.spill_pitch;
    float* to = matrix_row(p, matrix, part.row_begin + i, out);
    const Softmax row = join_lanes(s.running_max + i * kLanes, s.running_sum + i * kLanes);
    const float top = lse[i] < kInfinity ? row.top : lse[i];  // NaN or inf stay what they are
    const float part_of_one = lse[i] < kInfinity ? static_cast<float>(1 / row.total) : 1.f;
    for (int64_t col = 0; col < p.n_cols; col += kKeyTile) {
      const Vec share = exp(load(s.maxima + i * maxima_pitch + col / kKeyTile * kLanes) - top) * part_of_one;
      for (int64_t j = col; j < smaller(col + kKeyTile, p.n_cols); j += kLanes) {
        const Vec term = load(terms + j), shown = term < 0.f ? Vec{} : term * share;
        const Vec sum = first ? shown : load_first(to + j, p.n_cols - j) + shown;
        store_first(to + j, sum * factor, p.n_cols - j);
      }
    }
  }
}

template <bool kPairs>
void slice_forward_with_lse_as(const Problem& p, const Part& part, float* lse, float* out, bool each, Scratch& s) {
  for (int64_t head = 0; head < p.heads; ++head) {
    float* head_rows = lse + (part.sample * p.heads + head) * p.n_rows + part.row_begin;
    head_lse<kPairs, true>(p, part, head, head_rows, s);
    const bool mean = !each && head == p.heads - 1;
    add_spilled(p, part, head_rows, each ? part.sample * p.heads + head : part.sample, each || head == 0,
                mean ? 1.f / static_cast<float>(p.heads) : 1.f, out, s);
  }
}

void slice_forward_with_lse(const Problem& p, const Part& part, float* lse, float* out, bool each, Scratch& s) {
  by_tile_kind(p, part, [&](auto pairs) { slice_forward_with_lse_as<decltype(pairs)::value>(p, part, lse, out, each, s); });
}

}  // namespace
}  // namespace cdistill
