// What the attention kernels are made of: the register microkernel, and the tiles of queries and keys it reads. Include it
// only from isa_*.cpp, after the target pragma and the constants kLanes, kRegisterRows, kRegisterVectors, kDotPairs:
// everything here is compiled for that instruction set, so it has internal linkage and calls no inline function of another
// header.
//
// Tiles come in two kinds. As floats, every input is widened to fp32 when it is packed. As pairs (`kPairs`, bf16 inputs
// where the processor has dot products of pairs), neighbours along the summed dimension share four bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd_vectors.h"

namespace cdistill {
namespace {

constexpr int kPanel = kRegisterVectors * kLanes;
static_assert(kRowTile % kRegisterRows == 0 && kKeyTile % kPanel == 0, "register tiles must fill a tile");
static_assert(kRowTile % 2 == 0 && kRegisterRows % 2 == 0, "rows are paired");
static_assert(kLanes <= kMaxLanes, "scratch memory is laid out for kMaxLanes");
constexpr int32_t kNever = INT32_MAX;

// ---- the microkernel ------------------------------------------------------------------------------------------------

// sum + the dot products of pairs of bf16 numbers in a and b; defined where kDotPairs.
template <bool kPairs>
Vec dot_pairs(Vec sum, Vec a, Vec b);

// sum + a * b of floats, or of pairs; `a` is one unit for all lanes.
template <bool kPairs>
inline __attribute__((always_inline)) Vec multiply_add(Vec sum, const char* a, Vec b) {
  const float unit = load_as<float>(a);
  if constexpr (kPairs) return dot_pairs<kPairs>(sum, Vec{} + unit, b);
  else return sum + unit * b;
}

// acc[i][j] = sum_k a[i][k * a_step] * b[k * b_step + j * kLanes ..], in units
template <bool kPairs, int N>
inline __attribute__((always_inline)) void multiply(Vec (&acc)[kRegisterRows][N], const char* const (&a)[kRegisterRows],
                                                    int64_t a_step, const float* b, int64_t b_step, int64_t depth) {
#pragma GCC unroll 8
  for (int i = 0; i < kRegisterRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = Vec{};
  const int64_t end = depth * a_step * 4;
  for (int64_t k = 0; k != end; k += a_step * 4, b += b_step) {
    Vec row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRegisterRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] = multiply_add<kPairs>(acc[i][j], a[i] + k, row[j]);
  }
}

// ---- one vector of a token ------------------------------------------------------------------------------------------

inline int64_t pitch(const Problem& p) { return round_up(p.dim, kMaxLanes); }

// Of an Operand or a Result.
template <class T>
inline char* address(const T& x, int64_t sample, int64_t head, int64_t token) {
  const int64_t bytes = x.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t offset = sample * x.stride_batch + head * x.stride_head + token * x.stride_token;
  return static_cast<char*>(const_cast<void*>(x.data)) + offset * bytes;
}

inline Vec widen(BitVec bits, DType dtype) { return dtype == DType::kFloat16 ? widen_half(bits) : (Vec)(bits << 16); }

// The first n of a vector of 2-byte numbers, zero in the other lanes.
inline BitVec load_halves(const void* in, int64_t n) {
  HalfVec narrow = {};
  if (n >= kLanes) memcpy(&narrow, in, sizeof(narrow));
  else memcpy(&narrow, in, n * sizeof(uint16_t));
  return __builtin_convertvector(narrow, BitVec);
}

// x, with zero for inf and NaN: in products with dS, where what a row does not see must not reach it as 0 * NaN. What it
// sees reaches it through dS.
inline Vec finite_or_zero(Vec x) { return x - x == 0.f ? x : Vec{}; }
inline BitVec finite_or_zero(BitVec bfloat16) { return (bfloat16 & 0x7f80u) == 0x7f80u ? BitVec{} : bfloat16; }

// One token's vector as fp32, zeros up to the pitch; with kFinite zeros for inf and NaN.
template <bool kFinite>
void unpack(const Operand& x, const char* from, int64_t dim, float* out) {
  const int64_t width = round_up(dim, kMaxLanes);
  if (x.dtype == DType::kFloat32) {
    memcpy(out, from, dim * sizeof(float));
  } else {
    for (int64_t d = 0; d < dim; d += kLanes) store(out + d, widen(load_halves(from + 2 * d, dim - d), x.dtype));
  }
  for (int64_t d = dim; d < width; ++d) out[d] = 0.f;
  if constexpr (kFinite)
    for (int64_t d = 0; d < width; d += kLanes) store(out + d, finite_or_zero(load(out + d)));
}

// Two tokens' bf16 vectors as pairs (first[d], second[d]), zeros up to the pitch and for inf and NaN; null stands for a
// vector of zeros.
void interleave(const char* first, const char* second, int64_t dim, float* out) {
  for (int64_t d = 0; d < round_up(dim, kMaxLanes); d += kLanes) {
    const BitVec low = first && d < dim ? load_halves(first + 2 * d, dim - d) : BitVec{};
    const BitVec high = second && d < dim ? load_halves(second + 2 * d, dim - d) : BitVec{};
    store(out + d, (Vec)(finite_or_zero(low) | finite_or_zero(high) << 16));
  }
}

// target[d] += x[d], rounded to the target's dtype.
void add_rounded(const float* x, int64_t dim, DType dtype, char* target) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec sum = load(x + d) + widen(load_halves(target + 2 * d, dim - d), dtype);
    const BitVec bits = dtype == DType::kFloat16 ? narrow_half(sum) : narrow_bfloat16(sum);
    const HalfVec narrow = __builtin_convertvector(bits, HalfVec);
    memcpy(target + 2 * d, &narrow, smaller(kLanes, dim - d) * sizeof(uint16_t));
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Keys [begin, begin + n) of a tile; the first n_cols belong to the slice.
struct Keys {
  int64_t begin, n, n_cols, n_panels;
  int32_t first_position;  // smallest visible key position, kNever if none
  int32_t panel_first[kKeyTile / kPanel];
};

Keys locate_keys(const Problem& p, int64_t sample, int64_t begin, int64_t end, Scratch& s) {
  Keys c{};
  c.begin = begin;
  c.n = smaller(kKeyTile, end - begin);
  c.n_cols = begin < p.n_cols ? smaller(c.n, p.n_cols - begin) : 0;
  c.n_panels = round_up(c.n, kPanel) / kPanel;
  c.first_position = kNever;
  for (int64_t panel = 0; panel < c.n_panels; ++panel) {
    int32_t first = kNever;
    for (int64_t j = panel * kPanel; j < (panel + 1) * kPanel; ++j) {
      int32_t position = -1;
      if (j < c.n) position = p.keys ? p.keys[sample * p.n_keys + begin + j] : static_cast<int32_t>(begin + j);
      if (position < 0 || (p.key_mask && !p.key_mask[sample * p.tokens + position])) position = kNever;
      s.key_position[j] = position;
      first = position < first ? position : first;
    }
    c.panel_first[panel] = first;
    c.first_position = first < c.first_position ? first : c.first_position;
  }
  return c;
}

inline const char* key_address(const Problem& p, int64_t sample, int64_t kv_head, int64_t j, const Scratch& s) {
  return s.key_position[j] == kNever ? nullptr : address(p.k, sample, kv_head, s.key_position[j]);
}

// Keys as rows of fp32, zeros where hidden from all rows.
template <bool kFinite>
void pack_keys(const Problem& p, int64_t sample, int64_t kv_head, const Keys& c, Scratch& s) {
  for (int64_t j = 0; j < c.n_panels * kPanel; ++j) {
    const char* from = key_address(p, sample, kv_head, j, s);
    if (from) unpack<kFinite>(p.k, from, p.dim, s.keys + j * pitch(p));
    else memset(s.keys + j * pitch(p), 0, pitch(p) * sizeof(float));
  }
}

// Keys as the right operand of dS K: rows of fp32, or pairs of keys.
template <bool kPairs>
void pack_key_rows(const Problem& p, int64_t sample, int64_t kv_head, const Keys& c, Scratch& s) {
  if constexpr (!kPairs) return pack_keys<true>(p, sample, kv_head, c, s);
  for (int64_t j = 0; j < c.n; j += 2)
    interleave(key_address(p, sample, kv_head, j, s), key_address(p, sample, kv_head, j + 1, s), p.dim,
               s.keys + j / 2 * pitch(p));
}

// out[d * kPanel + u] = in[u][d] for 4 x 4 units.
inline void transpose(const char* const* in, int64_t d, float* out) {
  const Quad r0 = load_as<Quad>(in[0] + 4 * d), r1 = load_as<Quad>(in[1] + 4 * d);
  const Quad r2 = load_as<Quad>(in[2] + 4 * d), r3 = load_as<Quad>(in[3] + 4 * d);
  const Quad a = __builtin_shufflevector(r0, r1, 0, 4, 1, 5), b = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
  const Quad c = __builtin_shufflevector(r0, r1, 2, 6, 3, 7), e = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
  const Quad columns[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                           __builtin_shufflevector(c, e, 0, 1, 4, 5), __builtin_shufflevector(c, e, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) memcpy(out + i * kPanel, &columns[i], sizeof(Quad));
}

// Panels of keys, transposed straight from the input if its units are those of the tile, else from packed rows of fp32.
template <bool kPairs>
void pack_panels(const Problem& p, int64_t sample, int64_t kv_head, const Keys& c, Scratch& s) {
  constexpr int kTogether = 8;  // keys, so that a cache line is written at once
  static_assert(kPanel % kTogether == 0, "panels hold whole groups");
  const bool in_place = kPairs || p.k.dtype == DType::kFloat32;
  if (!in_place) pack_keys<false>(p, sample, kv_head, c, s);
  for (int64_t j = 0; j < c.n_panels * kPanel; j += kTogether) {
    const char* rows[kTogether];
    for (int u = 0; u < kTogether; ++u) {
      rows[u] = in_place ? key_address(p, sample, kv_head, j + u, s)
                         : reinterpret_cast<const char*>(s.keys + (j + u) * pitch(p));
      if (!rows[u]) rows[u] = reinterpret_cast<const char*>(s.zeros);
    }
    float* panel = s.panels + j / kPanel * kPanel * pitch(p) + j % kPanel;
    for (int64_t d = 0; d < (kPairs ? p.dim / 2 : p.dim); d += 4)
      for (int u = 0; u < kTogether; u += 4) transpose(rows + u, d, panel + d * kPanel + u);
  }
}

// Rows [begin, begin + n) of a tile, `padded` up to whole register tiles.
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

inline int64_t first_row(const Problem& p, int64_t sample, int64_t head, const Rows& r) {
  return (sample * p.heads + head) * p.n_rows + r.begin;
}

inline void read_lse(const Problem& p, int64_t sample, int64_t head, const Rows& r, const float* lse, Scratch& s) {
  lse += first_row(p, sample, head, r);
  for (int64_t i = 0; i < r.padded; ++i) s.row_lse[i] = i < r.n ? lse[i] : kInfinity;
}

inline const char* query_address(const Problem& p, int64_t sample, int64_t head, const Rows& r, int64_t i,
                                 const Scratch& s) {
  if (i >= r.padded || s.row_limit[i] < 0) return nullptr;
  return address(p.q, sample, head, p.rows[sample * p.n_rows + r.begin + i]);
}

// Queries as rows of fp32.
template <bool kFinite>
void pack_queries(const Problem& p, int64_t sample, int64_t head, const Rows& r, Scratch& s) {
  for (int64_t i = 0; i < r.padded; ++i) {
    const char* from = query_address(p, sample, head, r, i, s);
    if (from) unpack<kFinite>(p.q, from, p.dim, s.queries + i * pitch(p));
    else memset(s.queries + i * pitch(p), 0, pitch(p) * sizeof(float));
  }
}

void pack_query_pairs(const Problem& p, int64_t sample, int64_t head, const Rows& r, Scratch& s) {
  for (int64_t i = 0; i < r.padded; i += 2)
    interleave(query_address(p, sample, head, r, i, s), query_address(p, sample, head, r, i + 1, s), p.dim,
               s.queries + i / 2 * pitch(p));
}

// Where `compute_scores` finds the queries: in place if their units are those of the tile, else packed.
template <bool kPairs>
void find_queries(const Problem& p, int64_t sample, int64_t head, const Rows& r, Scratch& s) {
  const bool in_place = kPairs || p.q.dtype == DType::kFloat32;
  if (!in_place) pack_queries<false>(p, sample, head, r, s);
  for (int64_t i = 0; i < r.padded; ++i) {
    const char* from = query_address(p, sample, head, r, i, s);
    s.query[i] = in_place ? (from ? from : reinterpret_cast<const char*>(s.zeros))
                          : reinterpret_cast<const char*>(s.queries + i * pitch(p));
  }
}

inline IntVec visible(const Scratch& s, int64_t row, int64_t key) {
  return load_as<IntVec>(s.key_position + key) <= s.row_limit[row];
}

// Calls use(row, key, scale * q.k as a vector of keys), except where a whole register tile is hidden.
template <bool kPairs, class Use>
inline __attribute__((always_inline)) void for_scores(const Problem& p, const Rows& r, const Keys& c, const Scratch& s,
                                                      Use use) {
  for (int64_t panel = 0; panel < c.n_panels; ++panel)
    for (int64_t i = 0; i < r.padded; i += kRegisterRows) {
      if (c.panel_first[panel] > r.group_last[i / kRegisterRows]) continue;
      Vec acc[kRegisterRows][kRegisterVectors];
      const char* queries[kRegisterRows];
#pragma GCC unroll 8
      for (int u = 0; u < kRegisterRows; ++u) queries[u] = s.query[i + u];
      multiply<kPairs>(acc, queries, 1, s.panels + panel * kPanel * pitch(p), kPanel, kPairs ? p.dim / 2 : p.dim);
#pragma GCC unroll 8
      for (int u = 0; u < kRegisterRows; ++u)
#pragma GCC unroll 8
        for (int j = 0; j < kRegisterVectors; ++j) use(i + u, panel * kPanel + j * kLanes, rounded(acc[u][j] * p.scale));
    }
}

// scale * q.k into out (row, key); where a whole register tile is hidden, `out` stays as it was.
template <bool kPairs>
void compute_scores(const Problem& p, const Rows& r, const Keys& c, float* out, int64_t out_pitch, const Scratch& s) {
  for_scores<kPairs>(p, r, c, s, [&](int64_t row, int64_t key, Vec score) __attribute__((always_inline)) {
    store(out + row * out_pitch + key, score);
  });
}

// target[i] += sum_k a[i * a_row + k * a_step] * b[k, :] in the dimensions from d on, for the i < n whose target is not
// null; a in units.
template <bool kPairs, int N>
void accumulate_dims(float* const* target, int64_t n, const float* a, int64_t a_row, int64_t a_step, const float* b,
                     int64_t b_step, int64_t depth, int64_t dim, int64_t d) {
  for (int64_t i = 0; i < n; i += kRegisterRows) {
    Vec acc[kRegisterRows][N];
    const char* rows[kRegisterRows];
#pragma GCC unroll 8
    for (int u = 0; u < kRegisterRows; ++u) rows[u] = reinterpret_cast<const char*>(a + (i + u) * a_row);
    multiply<kPairs>(acc, rows, a_step, b + d, b_step, depth);
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

template <bool kPairs>
void accumulate(float* const* target, int64_t n, const float* a, int64_t a_row, int64_t a_step, const float* b,
                int64_t b_step, int64_t depth, int64_t dim) {
  int64_t d = 0;
  for (; d + kPanel <= dim; d += kPanel)
    accumulate_dims<kPairs, kRegisterVectors>(target, n, a, a_row, a_step, b, b_step, depth, dim, d);
  for (; d < dim; d += kLanes) accumulate_dims<kPairs, 1>(target, n, a, a_row, a_step, b, b_step, depth, dim, d);
}

}  // namespace
}  // namespace cdistill
