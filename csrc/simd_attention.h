// The attention kernels, written once in the compiler's vector types. Include it only from isa_*.cpp, as simd_tiles.h.
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

// ---- gradient -------------------------------------------------------------------------------------------------------
// One tile of scores becomes probabilities, then dS. These are functions of their own, not inlined: compilers contract
// multiply-adds as the surroundings suggest, and dk must have the same bits however the work is cut.

// Scores to probabilities in place, 0 where hidden, up to a whole vector after the last key and an even number of rows;
// sums_i += sum_j P_ij if `sums` is not null.
__attribute__((noinline)) void to_probabilities(const Rows& r, const Keys& c, float* tile, int64_t tile_pitch,
                                                float* sums, const Scratch& s) {
  for (int64_t i = 0; i < round_up(r.n, 2); ++i) {
    Vec sum = {};
    for (int64_t j = 0; j < c.n; j += kLanes) {
      float* at = tile + i * tile_pitch + j;
      const Vec probability = exp(load(at) - s.row_lse[i]), shown = visible(s, i, j) ? probability : Vec{};
      store(at, shown);
      sum += shown;
    }
    if (sums && i < r.n) sums[i] += lane_sum(sum);
  }
}

inline const float* weight_row(const Problem& p, const Gradient& g, int64_t sample, int64_t head, const Rows& r,
                               const Keys& c, int64_t i) {
  return g.weight + sample * g.weight_stride_batch + head * g.weight_stride_head + (r.begin + i) * p.n_cols + c.begin;
}

// dlse_i -= factor * sum_j P_ij weight_ij
__attribute__((noinline)) void subtract_weighted(const Problem& p, const Gradient& g, int64_t sample, int64_t head,
                                                 const Rows& r, const Keys& c, const float* tile, int64_t tile_pitch,
                                                 const Scratch& s) {
  float* dlse = g.dlse + first_row(p, sample, head, r);
  for (int64_t i = 0; i < r.n; ++i) {
    const float* weight = weight_row(p, g, sample, head, r, c, i);
    Vec sum = {};
    for (int64_t j = 0; j < c.n_cols; j += kLanes) {
      const Vec product = load(tile + i * tile_pitch + j) * load_first(weight + j, c.n_cols - j);
      sum += visible(s, i, j) ? product : Vec{};
    }
    dlse[i] -= g.factor * lane_sum(sum);
  }
}

inline __attribute__((always_inline)) Vec gradient_of_scores(const Gradient& g, const float* weight,
                                                             float row, float scale, int64_t i, int64_t j,
                                                             const Keys& c, const float* tile, int64_t tile_pitch,
                                                             const Scratch& s) {
  Vec slope = Vec{} + row;
  if (weight) slope += load_first(weight + j, c.n_cols - j) * g.factor;
  const Vec ds = load(tile + i * tile_pitch + j) * slope * scale;
  return visible(s, i, j) ? ds : Vec{};
}

// Probabilities to dS: s.tile, or the two tiles of pairs.
template <bool kPairs>
__attribute__((noinline)) void to_score_gradient(const Problem& p, const Gradient& g, int64_t sample, int64_t head,
                                                 const Rows& r, const Keys& c, const float* tile, int64_t tile_pitch,
                                                 Scratch& s) {
  const bool weighted = g.weight && c.n_cols > 0;
  const float* dlse = g.denominator == Denominator::kApart ? nullptr : g.dlse + first_row(p, sample, head, r);
  const float* share = g.share ? g.share + first_row(p, sample, head, r) : nullptr;
  constexpr int kTogether = kPairs ? 2 : 1;
  for (int64_t i = 0; i < r.n; i += kTogether) {
    const float* weight[kTogether];
    float row[kTogether], scale[kTogether];
    for (int u = 0; u < kTogether; ++u) {
      const bool real = i + u < r.n;  // of rows beyond the last one every key is hidden
      weight[u] = weighted && real ? weight_row(p, g, sample, head, r, c, i + u) : nullptr;
      row[u] = dlse && real ? dlse[i + u] : 0.f;
      scale[u] = share && real ? p.scale * share[i + u] : p.scale;
    }
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const Vec first = gradient_of_scores(g, weight[0], row[0], scale[0], i, j, c, tile, tile_pitch, s);
      if constexpr (kPairs) {
        const Vec second = gradient_of_scores(g, weight[1], row[1], scale[1], i + 1, j, c, tile, tile_pitch, s);
        const BitVec low = narrow_bfloat16(first), high = narrow_bfloat16(second);
        const HalfVec rows[2] = {__builtin_convertvector(low, HalfVec), __builtin_convertvector(high, HalfVec)};
        memcpy(s.tile_pairs + (i * kKeyTile + j) / 2, &rows[0], sizeof(HalfVec));
        memcpy(s.tile_pairs + ((i + 1) * kKeyTile + j) / 2, &rows[1], sizeof(HalfVec));
        store(s.tile_columns + i / 2 * kKeyTile + j, (Vec)(low | high << 16));
      } else {
        store(s.tile + i * kKeyTile + j, first);
      }
    }
  }
}

// Where a tile of dk is summed: in place, or in s.dk from the key `from` on. Null where the key is hidden.
void find_key_targets(const Problem& p, int64_t sample, int64_t kv_head, const Result& dk, int64_t from, const Keys& c,
                      Scratch& s) {
  for (int64_t j = 0; j < c.n; ++j) {
    const int32_t token = s.key_position[j];
    if (token == kNever) s.key_target[j] = nullptr;
    else if (s.dk) s.key_target[j] = s.dk + (c.begin - from + j) * pitch(p);
    else s.key_target[j] = reinterpret_cast<float*>(address(dk, sample, kv_head, token));
  }
}

void find_row_targets(const Problem& p, int64_t sample, int64_t head, const Result& dq, int64_t from, const Rows& r,
                      Scratch& s) {
  for (int64_t i = 0; i < r.n; ++i) {
    if (s.row_limit[i] < 0) s.row_target[i] = nullptr;
    else if (s.dq) s.row_target[i] = s.dq + (r.begin - from + i) * pitch(p);
    else s.row_target[i] = reinterpret_cast<float*>(address(dq, sample, head, p.rows[sample * p.n_rows + r.begin + i]));
  }
}

// Adds the rows of s.dq, of the part's rows, to half-precision results.
void flush_dq(const Problem& p, const Part& part, int64_t head, const Result& dq, const Scratch& s) {
  for (int64_t i = part.row_begin; i < part.row_end; ++i) {
    const int64_t token = p.rows[part.sample * p.n_rows + i];
    if (token >= 0)
      add_rounded(s.dq + (i - part.row_begin) * pitch(p), p.dim, dq.dtype, address(dq, part.sample, head, token));
  }
}

void flush_dk(const Problem& p, const Part& part, const Result& dk, Scratch& s) {
  for (int64_t key = part.key_begin; key < part.key_end; key += kKeyTile) {
    const Keys c = locate_keys(p, part.sample, key, part.key_end, s);
    for (int64_t j = 0; j < c.n; ++j)
      if (s.key_position[j] != kNever)
        add_rounded(s.dk + (key - part.key_begin + j) * pitch(p), p.dim, dk.dtype,
                    address(dk, part.sample, part.kv_head, s.key_position[j]));
  }
}

// dq += dS K and dk += dS^T Q of one tile whose keys are packed.
template <bool kPairs>
void add_products(const Problem& p, const Part& part, const Gradient& g, int64_t head, const Rows& r, const Keys& c,
                  bool want_dq, bool want_dk, Scratch& s) {
  if (want_dq) {
    find_row_targets(p, part.sample, head, g.dq, part.row_begin, r, s);
    if constexpr (kPairs)
      accumulate<true>(s.row_target, r.n, s.tile_pairs, kKeyTile / 2, 1, s.keys, pitch(p), (c.n + 1) / 2, p.dim);
    else accumulate<false>(s.row_target, r.n, s.tile, kKeyTile, 1, s.keys, pitch(p), c.n, p.dim);
  }
  if (want_dk) {
    find_key_targets(p, part.sample, part.kv_head, g.dk, part.key_begin, c, s);
    if constexpr (kPairs) {
      pack_query_pairs(p, part.sample, head, r, s);
      accumulate<true>(s.key_target, c.n, s.tile_columns, 1, kKeyTile, s.queries, pitch(p), (r.n + 1) / 2, p.dim);
    } else {
      pack_queries<true>(p, part.sample, head, r, s);
      accumulate<false>(s.key_target, c.n, s.tile, 1, kKeyTile, s.queries, pitch(p), r.n, p.dim);
    }
  }
}

// A dlse that is not the rows' own: tile by tile.
template <bool kPairs>
void gradient_by_tiles(const Problem& p, const Part& part, const Gradient& g, bool want_dq, bool want_dk, Scratch& s) {
  const int64_t group = p.heads / p.kv_heads;
  const bool sums = g.denominator == Denominator::kApart && g.dlse && (want_dq || !want_dk);
  for (int64_t key = part.key_begin; key < part.key_end; key += kKeyTile) {
    const Keys c = locate_keys(p, part.sample, key, part.key_end, s);
    if (c.first_position == kNever) continue;
    pack_panels<kPairs>(p, part.sample, part.kv_head, c, s);
    if (want_dq) pack_key_rows<kPairs>(p, part.sample, part.kv_head, c, s);
    for (int64_t head = part.kv_head * group + part.group_begin; head < part.kv_head * group + part.group_end; ++head)
      for (int64_t row = part.row_begin; row < part.row_end; row += kRowTile) {
        const Rows r = locate_rows(p, part.sample, row, part.row_end, s);
        if (c.first_position > r.last_limit) continue;
        find_queries<kPairs>(p, part.sample, head, r, s);
        read_lse(p, part.sample, head, r, g.lse, s);
        compute_scores<kPairs>(p, r, c, s.tile, kKeyTile, s);
        to_probabilities(r, c, s.tile, kKeyTile, nullptr, s);
        if (sums) subtract_weighted(p, g, part.sample, head, r, c, s.tile, kKeyTile, s);
        if (!want_dq && !want_dk) continue;
        to_score_gradient<kPairs>(p, g, part.sample, head, r, c, s.tile, kKeyTile, s);
        add_products<kPairs>(p, part, g, head, r, c, want_dq, want_dk, s);
      }
  }
}

// Calls work(c, r) for the tiles of all keys and the part's rows that see one of them, after pack(c) for their keys.
template <class Pack, class Work>
inline __attribute__((always_inline)) void for_visible_tiles(const Problem& p, const Part& part, Scratch& s, Pack pack,
                                                             Work work) {
  for (int64_t key = 0; key < p.n_keys; key += kKeyTile) {
    const Keys c = locate_keys(p, part.sample, key, p.n_keys, s);
    bool packed = false;
    for (int64_t row = part.row_begin; row < part.row_end; row += kRowTile) {
      const Rows r = locate_rows(p, part.sample, row, part.row_end, s);
      if (c.first_position > r.last_limit) continue;
      if (!packed) pack(c);
      packed = true;
      work(c, r);
    }
  }
}

// The rows' own dlse, known after the last column: P of one head and the part's rows waits in s.spill.
template <bool kPairs>
void gradient_with_denominator(const Problem& p, const Part& part, const Gradient& g, int64_t head, bool want_dk,
                               Scratch& s) {
  const auto spilled = [&](const Keys& c, const Rows& r) {
    return s.spill + (r.begin - part.row_begin) * s.spill_pitch + c.begin;
  };
  for_visible_tiles(
      p, part, s, [&](const Keys& c) { pack_panels<kPairs>(p, part.sample, part.kv_head, c, s); },
      [&](const Keys& c, const Rows& r) {
        find_queries<kPairs>(p, part.sample, head, r, s);
        read_lse(p, part.sample, head, r, g.lse, s);
        float* tile = spilled(c, r);
        compute_scores<kPairs>(p, r, c, tile, s.spill_pitch, s);
        to_probabilities(r, c, tile, s.spill_pitch, g.share + first_row(p, part.sample, head, r), s);
        if (c.n_cols) subtract_weighted(p, g, part.sample, head, r, c, tile, s.spill_pitch, s);
      });
  const int64_t first = (part.sample * p.heads + head) * p.n_rows;
  for (int64_t i = first + part.row_begin; i < first + part.row_end; ++i) {
    g.share[i] = g.share[i] == 0.f ? 1.f : 1.f / g.share[i];
    g.dlse[i] *= g.share[i];
  }
  for_visible_tiles(
      p, part, s, [&](const Keys& c) { pack_key_rows<kPairs>(p, part.sample, part.kv_head, c, s); },
      [&](const Keys& c, const Rows& r) {
        to_score_gradient<kPairs>(p, g, part.sample, head, r, c, spilled(c, r), s.spill_pitch, s);
        add_products<kPairs>(p, part, g, head, r, c, true, want_dk, s);
      });
}

template <bool kPairs>
void gradient_as(const Problem& p, const Part& part, const Gradient& g, bool want_dq, bool want_dk, Scratch& s) {
  const int64_t first_head = part.kv_head * (p.heads / p.kv_heads);
  if (want_dk && s.dk) memset(s.dk, 0, (part.key_end - part.key_begin) * pitch(p) * sizeof(float));
  if (g.denominator == Denominator::kOwn || (want_dq && s.dq)) {
    // dq of one head and one chunk of rows at a time
    for (int64_t head = part.group_begin; head < part.group_end; ++head)
      for (int64_t row = part.row_begin; row < part.row_end; row += s.chunk_rows) {
        Part chunk = part;
        chunk.group_begin = head;
        chunk.group_end = head + 1;
        chunk.row_begin = row;
        chunk.row_end = smaller(row + s.chunk_rows, part.row_end);
        if (s.dq) memset(s.dq, 0, (chunk.row_end - row) * pitch(p) * sizeof(float));
        if (g.denominator == Denominator::kOwn)
          gradient_with_denominator<kPairs>(p, chunk, g, first_head + head, want_dk, s);
        else gradient_by_tiles<kPairs>(p, chunk, g, want_dq, want_dk, s);
        if (s.dq) flush_dq(p, chunk, first_head + head, g.dq, s);
      }
  } else {
    gradient_by_tiles<kPairs>(p, part, g, want_dq, want_dk, s);
  }
  if (want_dk && s.dk) flush_dk(p, part, g.dk, s);
}

void gradient(const Problem& p, const Part& part, const Gradient& g, bool want_dq, bool want_dk, Scratch& s) {
  by_tile_kind(p, part, [&](auto pairs) { gradient_as<decltype(pairs)::value>(p, part, g, want_dq, want_dk, s); });
}

}  // namespace
}  // namespace cdistill
