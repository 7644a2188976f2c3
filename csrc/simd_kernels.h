// The attention kernels, written once in the compiler's vector types. Include it only from isa_*.cpp, after the target
// pragma and the constants kLanes, kRegisterRows, kRegisterVectors: everything here is compiled for that instruction
// set, so it has internal linkage and calls no inline function of another header.
//
// A part of the work is walked in tiles of kRowTile x kColTile. Per column tile the keys are packed twice, as rows
// (col, d) and as panels (d, kPanel); per tile the queries are packed as rows (row, d). Then
//   S = Q K^T          sum over d    of query[row, d] * panel[d, cols]
//   dq += dS K         sum over cols of dS[row, col]  * key[col, dims]
//   dk += dS^T Q       sum over rows of dS[row, col]  * query[row, dims]
// are one register microkernel, `multiply`. S and dS exist for one tile, in the first-level cache. Every element of dq
// and dk is summed in the same order however the work is cut into parts.
//
// A key is visible to a row iff key_position <= row_limit, which covers causality, the key mask and both kinds of
// padding.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd_vectors.h"

namespace cdistill {
namespace {

constexpr int kPanel = kRegisterVectors * kLanes;
static_assert(kRowTile % kRegisterRows == 0 && kColTile % kPanel == 0, "register tiles must fill a tile");
static_assert(kLanes <= kMaxLanes, "scratch memory is laid out for kMaxLanes");
constexpr int32_t kNever = INT32_MAX;

// acc[i][j] = sum_k a[i * a_row + k * a_step] * b[k * b_step + j * kLanes ..]
template <int N>
inline __attribute__((always_inline)) void multiply(Vec (&acc)[kRegisterRows][N], const float* a, int64_t a_row,
                                                    int64_t a_step, const float* b, int64_t b_step, int64_t depth) {
#pragma GCC unroll 8
  for (int i = 0; i < kRegisterRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = Vec{};
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Vec row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRegisterRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] += a[i * a_row] * row[j];
  }
}

// ---- packing --------------------------------------------------------------------------------------------------------

inline Vec widen_half(BitVec h) {
  const BitVec sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  const BitVec finite = (BitVec)((Vec)rest * 0x1p112f);
  return (Vec)(sign | ((h & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : finite));
}

void widen(const Operand& x, int64_t offset, int64_t dim, float* out) {
  if (x.dtype == DType::kFloat32) {
    memcpy(out, static_cast<const float*>(x.data) + offset, dim * sizeof(float));
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(x.data) + offset;
  for (int64_t d = 0; d < dim; d += kLanes) {
    HalfVec narrow = {};
    memcpy(&narrow, in + d, smaller(kLanes, dim - d) * sizeof(uint16_t));
    const BitVec bits = __builtin_convertvector(narrow, BitVec);
    store(out + d, x.dtype == DType::kFloat16 ? widen_half(bits) : (Vec)(bits << 16));
  }
}

// One token's vector as fp32, padded with zeros to whole vectors; all zeros where `hidden`.
void pack_vector(const Operand& x, int64_t sample, int64_t head, int64_t token, bool hidden, int64_t dim, float* out) {
  const int64_t width = round_up(dim, kLanes);
  if (hidden) {
    memset(out, 0, width * sizeof(float));
    return;
  }
  widen(x, sample * x.stride_batch + head * x.stride_head + token * x.stride_token, dim, out);
  for (int64_t d = dim; d < width; ++d) out[d] = 0.f;
}

// Columns [begin, begin + n) of a column tile.
struct Columns {
  int64_t begin, n, n_panels;
  int32_t first_position;  // smallest visible key position, kNever if none
  int32_t panel_first[kColTile / kPanel];
};

Columns locate_columns(const Problem& p, int64_t sample, int64_t begin, int64_t end, Scratch& s) {
  Columns c{};
  c.begin = begin;
  c.n = smaller(kColTile, end - begin);
  c.n_panels = round_up(c.n, kPanel) / kPanel;
  c.first_position = kNever;
  for (int64_t panel = 0; panel < c.n_panels; ++panel) {
    int32_t first = kNever;
    for (int64_t j = panel * kPanel; j < (panel + 1) * kPanel; ++j) {
      int32_t position = -1;
      if (j < c.n) position = p.cols ? p.cols[sample * p.n_cols + begin + j] : static_cast<int32_t>(begin + j);
      if (position < 0 || (p.key_mask && !p.key_mask[sample * p.tokens + position])) position = kNever;
      s.key_position[j] = position;
      first = position < first ? position : first;
    }
    c.panel_first[panel] = first;
    c.first_position = first < c.first_position ? first : c.first_position;
  }
  return c;
}

// out[d * kPanel + u] = in[u * width + d] for 4 x 4 elements.
inline void transpose(const float* in, int64_t width, float* out) {
  const Quad r0 = load_as<Quad>(in), r1 = load_as<Quad>(in + width);
  const Quad r2 = load_as<Quad>(in + 2 * width), r3 = load_as<Quad>(in + 3 * width);
  const Quad a = __builtin_shufflevector(r0, r1, 0, 4, 1, 5), b = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
  const Quad c = __builtin_shufflevector(r0, r1, 2, 6, 3, 7), d = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
  const Quad columns[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                           __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) memcpy(out + i * kPanel, &columns[i], sizeof(Quad));
}

void pack_keys(const Problem& p, int64_t sample, int64_t kv_head, const Columns& c, Scratch& s) {
  const int64_t width = round_up(p.dim, kLanes);
  for (int64_t j = 0; j < c.n_panels * kPanel; ++j)
    pack_vector(p.k, sample, kv_head, s.key_position[j], s.key_position[j] == kNever, p.dim, s.keys + j * width);
  for (int64_t j = 0; j < c.n_panels * kPanel; j += 4)
    for (int64_t d = 0; d < p.dim; d += 4)
      transpose(s.keys + j * width + d, width, s.panels + j / kPanel * kPanel * width + d * kPanel + j % kPanel);
}

// Rows [begin, begin + n) of a row tile, `padded` up to whole register tiles.
struct Rows {
  int64_t begin, n, padded;
  int32_t last_limit;
  int32_t group_last[kRowTile / kRegisterRows];
};

Rows locate_rows(const Problem& p, int64_t sample, int64_t begin, int64_t end, Scratch& s) {
  Rows r{};
  r.begin = begin;
  r.n = smaller(kRowTile, end - begin);
  r.padded = round_up(r.n, kRegisterRows);
  r.last_limit = -1;
  for (int64_t i = 0; i < r.padded; i += kRegisterRows) {
    int32_t last = -1;
    for (int64_t u = i; u < i + kRegisterRows; ++u) {
      int32_t limit = u < r.n ? p.rows[sample * p.n_rows + begin + u] : -1;
      if (limit >= 0 && !p.causal) limit = kNever - 1;
      s.row_limit[u] = limit;
      last = limit > last ? limit : last;
    }
    r.group_last[i / kRegisterRows] = last;
    r.last_limit = last > r.last_limit ? last : r.last_limit;
  }
  return r;
}

void pack_queries(const Problem& p, int64_t sample, int64_t head, const Rows& r, Scratch& s) {
  const int64_t width = round_up(p.dim, kLanes);
  for (int64_t i = 0; i < r.padded; ++i) {
    const bool hidden = s.row_limit[i] < 0;
    const int64_t token = hidden ? 0 : p.rows[sample * p.n_rows + r.begin + i];
    pack_vector(p.q, sample, head, token, hidden, p.dim, s.queries + i * width);
  }
}

// ---- one tile -------------------------------------------------------------------------------------------------------

inline IntVec visible(const Scratch& s, int64_t row, int64_t col) {
  return load_as<IntVec>(s.key_position + col) <= s.row_limit[row];
}

// q.k into s.tile. Where a whole register tile is hidden it is left as it was: whoever reads s.tile applies `visible`.
void compute_scores(const Problem& p, const Rows& r, const Columns& c, Scratch& s) {
  const int64_t width = round_up(p.dim, kLanes);
  for (int64_t panel = 0; panel < c.n_panels; ++panel)
    for (int64_t i = 0; i < r.padded; i += kRegisterRows) {
      if (c.panel_first[panel] > r.group_last[i / kRegisterRows]) continue;
      Vec acc[kRegisterRows][kRegisterVectors];
      multiply(acc, s.queries + i * width, width, 1, s.panels + panel * kPanel * width, kPanel, p.dim);
      float* out = s.tile + i * kColTile + panel * kPanel;
#pragma GCC unroll 8
      for (int u = 0; u < kRegisterRows; ++u)
#pragma GCC unroll 8
        for (int j = 0; j < kRegisterVectors; ++j) store(out + u * kColTile + j * kLanes, acc[u][j]);
    }
}

void add_probabilities(const Problem& p, const Rows& r, const Columns& c, const float* lse, float* sum,
                       const Scratch& s) {
  for (int64_t i = 0; i < r.n; ++i)
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const Vec probability = exp(load(s.tile + i * kColTile + j) * p.scale - lse[i]);
      float* to = sum + i * kColTile + j;
      store(to, load(to) + (visible(s, i, j) ? probability : Vec{}));
    }
}

// dS = P * weight * factor in place of the scores, and `dlse` minus the row sums of P * weight * weight_factor, if it
// is not null.
template <bool kRowWeight>
void scores_to_gradient(const Problem& p, const Gradient& g, const Rows& r, const Columns& c, const float* lse,
                        const float* weight, float* dlse, Scratch& s) {
  const float factor = p.scale * g.weight_factor;
  for (int64_t i = 0; i < r.n; ++i) {
    float* row = s.tile + i * kColTile;
    const float* row_weight = kRowWeight ? weight + i : weight + i * p.n_cols;
    Vec sum = {};
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const Vec w = kRowWeight ? Vec{} + *row_weight : load_first(row_weight + j, c.n - j);
      const Vec product = exp(load(row + j) * p.scale - lse[i]) * w;
      const Vec shown = visible(s, i, j) ? product : Vec{};
      sum += shown;
      store(row + j, shown * factor);
    }
    if (dlse) dlse[i] -= g.weight_factor * lane_sum(sum);
  }
}

// Online softmax, one running maximum and sum per lane.
void update_lse(const Problem& p, const Rows& r, const Columns& c, float* running_max, float* running_sum, Scratch& s) {
  for (int64_t i = 0; i < r.n; ++i) {
    float* row = s.tile + i * kColTile;
    const Vec old_max = load(running_max + i * kLanes);
    Vec max = old_max;
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const Vec scaled = load(row + j) * p.scale;
      const Vec shown = visible(s, i, j) ? scaled : Vec{} + kLowest;
      store(row + j, shown);
      max = shown > max ? shown : max;
    }
    Vec sum = load(running_sum + i * kLanes) * exp(old_max - max);
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const Vec term = exp(load(row + j) - max);
      sum += visible(s, i, j) ? term : Vec{};
    }
    store(running_max + i * kLanes, max);
    store(running_sum + i * kLanes, sum);
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

void store_sum(const Problem& p, const Part& part, int64_t matrix, const Columns& c, float factor, float* out,
               const Scratch& s) {
  for (int64_t i = part.row_begin; i < part.row_end; ++i) {
    const float* sum = s.sum + (i - part.row_begin) * kColTile;
    float* to = out + (matrix * p.n_rows + i) * p.n_cols + c.begin;
    for (int64_t j = 0; j < c.n; ++j) to[j] = sum[j] * factor;
  }
}

void slice_forward_part(const Problem& p, const Part& part, const float* lse, float* out, bool each, Scratch& s) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t sum_bytes = (part.row_end - part.row_begin) * kColTile * sizeof(float);
  for (int64_t col = part.col_begin; col < part.col_end; col += kColTile) {
    const Columns c = locate_columns(p, part.sample, col, part.col_end, s);
    memset(s.sum, 0, sum_bytes);
    for (int64_t head = 0; head < p.heads; ++head) {
      if (head % group == 0 && c.first_position != kNever) pack_keys(p, part.sample, head / group, c, s);
      for (int64_t row = part.row_begin; row < part.row_end; row += kRowTile) {
        const Rows r = locate_rows(p, part.sample, row, part.row_end, s);
        if (c.first_position > r.last_limit) continue;
        pack_queries(p, part.sample, head, r, s);
        compute_scores(p, r, c, s);
        add_probabilities(p, r, c, lse + (part.sample * p.heads + head) * p.n_rows + row,
                          s.sum + (row - part.row_begin) * kColTile, s);
      }
      if (each) {
        store_sum(p, part, part.sample * p.heads + head, c, 1.f, out, s);
        memset(s.sum, 0, sum_bytes);
      }
    }
    if (!each) store_sum(p, part, part.sample, c, 1.f / static_cast<float>(p.heads), out, s);
  }
}

// ---- gradient -------------------------------------------------------------------------------------------------------

// target[i] += sum_k a[i * a_row + k * a_step] * b[k, :] in the dimensions from d on, for the i < n whose target is not
// null.
template <int N>
void accumulate_dims(float* const* target, int64_t n, const float* a, int64_t a_row, int64_t a_step, const float* b,
                     int64_t depth, int64_t dim, int64_t d) {
  for (int64_t i = 0; i < n; i += kRegisterRows) {
    Vec acc[kRegisterRows][N];
    multiply(acc, a + i * a_row, a_row, a_step, b + d, round_up(dim, kLanes), depth);
    float sums[kRegisterRows][N * kLanes];
#pragma GCC unroll 8
    for (int u = 0; u < kRegisterRows; ++u)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) store(sums[u] + j * kLanes, acc[u][j]);
    const int64_t used = smaller(N * kLanes, dim - d);
    for (int64_t u = 0; u < smaller(kRegisterRows, n - i); ++u) {
      float* to = target[i + u];
      if (to)
        for (int64_t j = 0; j < used; ++j) to[d + j] += sums[u][j];
    }
  }
}

void accumulate(float* const* target, int64_t n, const float* a, int64_t a_row, int64_t a_step, const float* b,
                int64_t depth, int64_t dim) {
  int64_t d = 0;
  for (; d + kPanel <= dim; d += kPanel)
    accumulate_dims<kRegisterVectors>(target, n, a, a_row, a_step, b, depth, dim, d);
  for (; d < dim; d += kLanes) accumulate_dims<1>(target, n, a, a_row, a_step, b, depth, dim, d);
}

void tile_gradient(const Problem& p, const Part& part, const Gradient& g, int64_t head, const Rows& r,
                   const Columns& c, bool want_dq, bool want_dk, Scratch& s) {
  pack_queries(p, part.sample, head, r, s);
  compute_scores(p, r, c, s);
  const int64_t first_row = (part.sample * p.heads + head) * p.n_rows + r.begin;
  const float* weight = g.weight + part.sample * g.weight_stride_batch + head * g.weight_stride_head;
  float* dlse = want_dq && g.dlse ? g.dlse + first_row : nullptr;
  if (g.row_weight) scores_to_gradient<true>(p, g, r, c, g.lse + first_row, weight + r.begin, dlse, s);
  else scores_to_gradient<false>(p, g, r, c, g.lse + first_row, weight + r.begin * p.n_cols + c.begin, dlse, s);

  if (want_dq) {
    float* dq = g.dq + (part.sample * p.heads + head) * p.tokens * p.dim;
    for (int64_t i = 0; i < r.n; ++i)
      s.row_target[i] = s.row_limit[i] < 0 ? nullptr : dq + p.rows[part.sample * p.n_rows + r.begin + i] * p.dim;
    accumulate(s.row_target, r.n, s.tile, kColTile, 1, s.keys, c.n, p.dim);
  }
  if (want_dk) accumulate(s.col_target, c.n, s.tile, 1, kColTile, s.queries, r.n, p.dim);
}

void gradient_part(const Problem& p, const Part& part, const Gradient& g, bool want_dq, bool want_dk, Scratch& s) {
  const int64_t group = p.heads / p.kv_heads;
  float* dk = g.dk + (part.sample * p.kv_heads + part.kv_head) * p.tokens * p.dim;
  for (int64_t col = part.col_begin; col < part.col_end; col += kColTile) {
    const Columns c = locate_columns(p, part.sample, col, part.col_end, s);
    if (c.first_position == kNever) continue;
    pack_keys(p, part.sample, part.kv_head, c, s);
    for (int64_t j = 0; j < c.n; ++j)
      s.col_target[j] = s.key_position[j] == kNever ? nullptr : dk + s.key_position[j] * p.dim;
    for (int64_t head = part.kv_head * group + part.group_begin; head < part.kv_head * group + part.group_end; ++head)
      for (int64_t row = part.row_begin; row < part.row_end; row += kRowTile) {
        const Rows r = locate_rows(p, part.sample, row, part.row_end, s);
        if (c.first_position <= r.last_limit) tile_gradient(p, part, g, head, r, c, want_dq, want_dk, s);
      }
  }
}

// ---- log-sum-exp ----------------------------------------------------------------------------------------------------

float join_lanes(const float* max, const float* sum) {
  float top = kLowest;
  for (int lane = 0; lane < kLanes; ++lane) top = max[lane] > top ? max[lane] : top;
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    if (sum[lane] != 0.f) total += sum[lane] * __builtin_exp(static_cast<double>(max[lane]) - static_cast<double>(top));
  if (total == 0) return kInfinity;
  return static_cast<float>(top + __builtin_log(total));
}

void row_lse_part(const Problem& p, const Part& part, float* lse, Scratch& s) {
  const int64_t head = part.kv_head * (p.heads / p.kv_heads) + part.group_begin;
  const int64_t n_rows = part.row_end - part.row_begin;
  for (int64_t i = 0; i < n_rows * kLanes; ++i) {
    s.running_max[i] = kLowest;
    s.running_sum[i] = 0.f;
  }
  for (int64_t col = part.col_begin; col < part.col_end; col += kColTile) {
    const Columns c = locate_columns(p, part.sample, col, part.col_end, s);
    bool packed = false;
    for (int64_t row = part.row_begin; row < part.row_end; row += kRowTile) {
      const Rows r = locate_rows(p, part.sample, row, part.row_end, s);
      if (c.first_position > r.last_limit) continue;
      if (!packed) pack_keys(p, part.sample, part.kv_head, c, s);
      packed = true;
      pack_queries(p, part.sample, head, r, s);
      compute_scores(p, r, c, s);
      const int64_t lane = (row - part.row_begin) * kLanes;
      update_lse(p, r, c, s.running_max + lane, s.running_sum + lane, s);
    }
  }
  lse += (part.sample * p.heads + head) * p.n_rows + part.row_begin;
  for (int64_t i = 0; i < n_rows; ++i) lse[i] = join_lanes(s.running_max + i * kLanes, s.running_sum + i * kLanes);
}

}  // namespace
}  // namespace cdistill
