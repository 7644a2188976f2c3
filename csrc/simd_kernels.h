// The attention kernels, written once over a vector type. Include it only from isa_*.cpp, after the target pragma: everything
// here must be compiled for that instruction set, and nothing here may call inline functions of other headers.
//
// A part of the work is walked in score tiles of kRowTile x kColTile. Per column tile the keys are packed twice, as rows (col, d)
// and as panels (d, PANEL); per tile the queries are packed as rows (row, d). Then
//   S = Q K^T          acc[row][cols]  = sum_d   q[row, d]  * panel[d, cols]
//   dq += dS K         acc[row][dims]  = sum_col dS[row, col] * keys[col, dims]
//   dk += dS^T Q       acc[col][dims]  = sum_row dS[row, col] * queries[row, dims]
// are one register microkernel, `multiply`: a broadcast operand with any strides times a row of vectors. Scores never leave the
// registers; dS exists for one tile. Every element of dq and dk is summed in the same order however the work is cut into parts.
//
// A key is visible to a row iff key_position <= row_limit, which covers causality, the key mask and both kinds of padding.
//
// V provides: kLanes; score tile kScoreRows x kScoreVectors; update tile kUpdateRows x kUpdateVectors; Mask; and the functions used below.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace cdistill {

template <class V>
struct SimdKernels {
  using Mask = typename V::Mask;
  static constexpr int W = V::kLanes;
  static constexpr int MR = V::kScoreRows, NV = V::kScoreVectors, PANEL = NV * W;
  static_assert(kRowTile % MR == 0 && kColTile % PANEL == 0, "score tiles must fill a tile");
  static_assert(kRowTile % V::kUpdateRows == 0 && kColTile % V::kUpdateRows == 0, "update tiles must fill a tile");
  static constexpr float kLowest = -3.402823466e38f;

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

  // e^x to about 1 ulp; 0 below the smallest normal number, inf on overflow, NaN for NaN.
  static V exp(V x) {
    const Mask keep = V::at_least(x, -87.33654f);
    x = V::min_or_nan(x, 89.f);
    const V n = V::round(V::mul(x, V::set(1.44269504f)));
    V f = V::fnma(n, V::set(0.693359375f), x);
    f = V::fnma(n, V::set(-2.12194440e-4f), f);
    V p = V::set(0.0013814539f);
    p = V::fma(p, f, V::set(0.008368745f));
    p = V::fma(p, f, V::set(0.04166839f));
    p = V::fma(p, f, V::set(0.16666521f));
    p = V::fma(p, f, V::set(0.49999994f));
    p = V::fma(p, f, V::set(1.f));
    p = V::fma(p, f, V::set(1.f));
    return V::select(keep, V::scale_pow2(p, n));
  }

  // acc[i][j] += sum_k a[i * a_row + k * a_step] * b[k * b_step + j * W ..]
  template <int M, int N>
  static inline __attribute__((always_inline)) void multiply(V (&acc)[M][N], const float* a, int64_t a_row, int64_t a_step,
                                                             const float* b, int64_t b_step, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
      V row[N];
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) row[j] = V::load(b + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const V factor = V::set(a[i * a_row]);
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) acc[i][j] = V::fma(factor, row[j], acc[i][j]);
      }
    }
  }

  template <int M, int N>
  static inline __attribute__((always_inline)) void clear(V (&acc)[M][N]) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) acc[i][j] = V::zero();
  }

  // ---- packing ------------------------------------------------------------------------------------------------------------

  template <class Element>
  static void widen(const Element* in, int64_t dim, float* out) {
    int64_t d = 0;
    for (; d + W <= dim; d += W) V::store(out + d, V::widen(in + d));
    if (d < dim) {
      Element rest[W] = {};
      memcpy(rest, in + d, (dim - d) * sizeof(Element));
      V::store(out + d, V::widen(rest));
    }
  }

  // One token's vector as fp32, padded with zeros to whole vectors.
  static void pack_vector(const Operand& x, int64_t sample, int64_t head, int64_t token, int64_t dim, float* out) {
    const int64_t offset = sample * x.stride_batch + head * x.stride_head + token * x.stride_token;
    switch (x.dtype) {
      case DType::kFloat32: widen(static_cast<const float*>(x.data) + offset, dim, out); break;
      case DType::kFloat16: widen(static_cast<const typename V::Half*>(x.data) + offset, dim, out); break;
      case DType::kBFloat16: widen(static_cast<const typename V::BFloat16*>(x.data) + offset, dim, out); break;
    }
  }

  // Columns [begin, begin + n) of a column tile.
  struct Columns {
    int64_t begin, n, n_panels;
    int32_t first_position;  // smallest visible key position, INT32_MAX if none
    int32_t panel_first[kColTile / W], panel_last[kColTile / W];
  };

  static Columns locate_columns(const Problem& p, int64_t sample, int64_t begin, int64_t end, Scratch& s) {
    Columns c{};
    c.begin = begin;
    c.n = smaller(kColTile, end - begin);
    c.n_panels = round_up(c.n, PANEL) / PANEL;
    c.first_position = INT32_MAX;
    for (int64_t panel = 0; panel < c.n_panels; ++panel) {
      int32_t first = INT32_MAX, last = -1;
      for (int64_t j = panel * PANEL; j < (panel + 1) * PANEL; ++j) {
        int32_t position = -1;
        if (j < c.n) position = p.cols ? p.cols[sample * p.n_cols + begin + j] : static_cast<int32_t>(begin + j);
        if (position < 0 || (p.key_mask && !p.key_mask[sample * p.tokens + position])) position = INT32_MAX;
        s.key_position[j] = position;
        first = position < first ? position : first;
        last = position > last ? position : last;
      }
      c.panel_first[panel] = first;
      c.panel_last[panel] = last;
      c.first_position = first < c.first_position ? first : c.first_position;
    }
    return c;
  }

  static void pack_keys(const Problem& p, int64_t sample, int64_t kv_head, const Columns& c, Scratch& s) {
    const int64_t width = round_up(p.dim, W);
    for (int64_t j = 0; j < c.n_panels * PANEL; ++j) {
      float* key = s.keys + j * width;
      if (s.key_position[j] == INT32_MAX) memset(key, 0, width * sizeof(float));
      else pack_vector(p.k, sample, kv_head, s.key_position[j], p.dim, key);
    }
    for (int64_t panel = 0; panel < c.n_panels; ++panel)
      for (int64_t j = 0; j < PANEL; j += 4)
        for (int64_t d = 0; d < width; d += W) {
          const float* key = s.keys + (panel * PANEL + j) * width + d;
          V::store_transposed(V::load(key), V::load(key + width), V::load(key + 2 * width), V::load(key + 3 * width),
                              s.keys_panel + panel * PANEL * width + d * PANEL + j, PANEL);
        }
  }

  // Rows [begin, begin + n) of a row tile, `padded` up to whole score tiles.
  struct Rows {
    int64_t begin, n, padded;
    int32_t last_limit;
    int32_t first_of[kRowTile / MR], last_of[kRowTile / MR];
  };

  static Rows locate_rows(const Problem& p, int64_t sample, int64_t begin, int64_t end, Scratch& s) {
    Rows r{};
    r.begin = begin;
    r.n = smaller(kRowTile, end - begin);
    r.padded = round_up(r.n, MR);
    r.last_limit = -1;
    for (int64_t i = 0; i < r.padded; i += MR) {
      int32_t first = INT32_MAX, last = -1;
      for (int64_t u = i; u < i + MR; ++u) {
        int32_t limit = u < r.n ? p.rows[sample * p.n_rows + begin + u] : -1;
        if (limit >= 0 && !p.causal) limit = INT32_MAX - 1;
        s.row_limit[u] = limit;
        first = limit < first ? limit : first;
        last = limit > last ? limit : last;
      }
      r.first_of[i / MR] = first;
      r.last_of[i / MR] = last;
      r.last_limit = last > r.last_limit ? last : r.last_limit;
    }
    return r;
  }

  // `lse` may be null.
  static void pack_queries(const Problem& p, int64_t sample, int64_t head, const Rows& r, const float* lse, Scratch& s) {
    const int64_t width = round_up(p.dim, W);
    for (int64_t i = 0; i < r.padded; ++i) {
      float* query = s.queries + i * width;
      s.lse[i] = 0.f;
      if (s.row_limit[i] < 0) {
        memset(query, 0, width * sizeof(float));
        continue;
      }
      pack_vector(p.q, sample, head, p.rows[sample * p.n_rows + r.begin + i], p.dim, query);
      if (lse) s.lse[i] = lse[(sample * p.heads + head) * p.n_rows + r.begin + i];
    }
  }

  // ---- one score tile -------------------------------------------------------------------------------------------------------

  // The part of a tile that one set of accumulators covers: rows [row, row + MR), columns [col, col + PANEL).
  struct Cell {
    int64_t row, col;
  };
  enum class Sight { kNone, kSome, kAll };

  static Sight sight(const Rows& r, const Columns& c, int64_t row_group, int64_t panel) {
    if (c.panel_first[panel] > r.last_of[row_group]) return Sight::kNone;
    return c.panel_last[panel] <= r.first_of[row_group] ? Sight::kAll : Sight::kSome;
  }

  static inline __attribute__((always_inline)) void scores(V (&acc)[MR][NV], const Problem& p, Cell cell, const Scratch& s) {
    const int64_t width = round_up(p.dim, W);
    clear(acc);
    multiply(acc, s.queries + cell.row * width, width, 1, s.keys_panel + cell.col * width, PANEL, p.dim);
  }

  template <bool kMasked>
  static inline __attribute__((always_inline)) V hide(V x, const Scratch& s, Cell cell, int i, int j) {
    if (!kMasked) return x;
    return V::select(V::visible(s.key_position + cell.col + j * W, s.row_limit[cell.row + i]), x);
  }

  template <bool kMasked>
  static void add_probabilities(const Problem& p, Cell cell, float* sum, Scratch& s) {
    V acc[MR][NV];
    scores(acc, p, cell, s);
    const V scale = V::set(p.scale);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const V lse = V::set(s.lse[cell.row + i]);
      float* out = sum + (cell.row + i) * kColTile + cell.col;
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        const V probability = hide<kMasked>(exp(V::fms(acc[i][j], scale, lse)), s, cell, i, j);
        V::store(out + j * W, V::add(V::load(out + j * W), probability));
      }
    }
  }

  // dS of the cell into s.tile, and the row sums of P * weight into s.row_sum. weight: first element of the tile's row 0 at column 0.
  template <bool kMasked, bool kRowWeight>
  static void score_gradient(const Problem& p, const Gradient& g, Cell cell, const float* weight, int64_t n_rows, int64_t n_cols,
                             Scratch& s) {
    V acc[MR][NV];
    scores(acc, p, cell, s);
    const V scale = V::set(p.scale), factor = V::set(p.scale * g.weight_factor);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const int64_t row = cell.row + i;
      const V lse = V::set(s.lse[row]);
      const float* weight_row = weight + smaller(row, n_rows - 1) * p.n_cols + cell.col;
      float* out = s.tile + row * kColTile + cell.col;
      V sum = V::load(s.row_sum + row * W);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        V w;
        if (kRowWeight) w = V::set(s.weight[row]);
        else w = V::load_first(weight_row + j * W, n_cols - cell.col - j * W);
        const V product = hide<kMasked>(V::mul(exp(V::fms(acc[i][j], scale, lse)), w), s, cell, i, j);
        sum = V::add(sum, product);
        V::store(out + j * W, V::mul(product, factor));
      }
      V::store(s.row_sum + row * W, sum);
    }
  }

  // Online softmax, one running maximum and sum per lane.
  template <bool kMasked>
  static void update_lse(const Problem& p, Cell cell, float* running_max, float* running_sum, Scratch& s) {
    V acc[MR][NV];
    scores(acc, p, cell, s);
    const V scale = V::set(p.scale);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      float* max_at = running_max + (cell.row + i) * W;
      float* sum_at = running_sum + (cell.row + i) * W;
      const V old_max = V::load(max_at);
      V max = old_max;
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        acc[i][j] = V::mul(acc[i][j], scale);
        V shown = acc[i][j];
        if (kMasked)
          shown = V::blend(V::visible(s.key_position + cell.col + j * W, s.row_limit[cell.row + i]), shown, V::set(kLowest));
        max = V::max_or_second(max, shown);
      }
      V sum = V::mul(V::load(sum_at), exp(V::sub(old_max, max)));
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) sum = V::add(sum, hide<kMasked>(exp(V::sub(acc[i][j], max)), s, cell, i, j));
      V::store(max_at, max);
      V::store(sum_at, sum);
    }
  }

  // ---- forward --------------------------------------------------------------------------------------------------------------

  static void store_chunk(const Problem& p, const Part& part, int64_t matrix, const Columns& c, float factor, float* out, const Scratch& s) {
    for (int64_t i = part.row_begin; i < part.row_end; ++i) {
      const float* sum = s.chunk + (i - part.row_begin) * kColTile;
      float* to = out + (matrix * p.n_rows + i) * p.n_cols + c.begin;
      int64_t j = 0;
      for (; j + W <= c.n; j += W) V::store(to + j, V::mul(V::load(sum + j), V::set(factor)));
      for (; j < c.n; ++j) to[j] = sum[j] * factor;
    }
  }

  static void slice_forward(const Problem& p, const Part& part, const float* lse, float* out, bool each, Scratch& s) {
    const int64_t group = p.heads / p.kv_heads;
    const int64_t chunk_bytes = round_up(part.row_end - part.row_begin, MR) * kColTile * sizeof(float);
    for (int64_t col = part.col_begin; col < part.col_end; col += kColTile) {
      const Columns c = locate_columns(p, part.sample, col, part.col_end, s);
      if (!each) memset(s.chunk, 0, chunk_bytes);
      for (int64_t head = 0; head < p.heads; ++head) {
        if (head % group == 0 && c.first_position != INT32_MAX) pack_keys(p, part.sample, head / group, c, s);
        if (each) memset(s.chunk, 0, chunk_bytes);
        for (int64_t row = part.row_begin; row < part.row_end; row += kRowTile) {
          const Rows r = locate_rows(p, part.sample, row, part.row_end, s);
          if (c.first_position > r.last_limit) continue;
          pack_queries(p, part.sample, head, r, lse, s);
          float* sum = s.chunk + (row - part.row_begin) * kColTile;
          for (int64_t panel = 0; panel < c.n_panels; ++panel)
            for (int64_t i = 0; i < r.padded; i += MR) {
              const Cell cell{i, panel * PANEL};
              switch (sight(r, c, i / MR, panel)) {
                case Sight::kNone: break;
                case Sight::kSome: add_probabilities<true>(p, cell, sum, s); break;
                case Sight::kAll: add_probabilities<false>(p, cell, sum, s); break;
              }
            }
        }
        if (each) store_chunk(p, part, part.sample * p.heads + head, c, 1.f, out, s);
      }
      if (!each) store_chunk(p, part, part.sample, c, 1.f / static_cast<float>(p.heads), out, s);
    }
  }

  // ---- gradient -------------------------------------------------------------------------------------------------------------

  // target[i] += sum_k a[i * a_row + k * a_step] * b[k, :] for the rows i < n whose target is not null.
  template <int N>
  static void accumulate_dims(float* const* target, int64_t n, const float* a, int64_t a_row, int64_t a_step, const float* b,
                              int64_t depth, int64_t dim, int64_t d) {
    constexpr int M = V::kUpdateRows;
    const int64_t width = round_up(dim, W);
    for (int64_t i = 0; i < n; i += M) {
      V acc[M][N];
      clear(acc);
      multiply(acc, a + i * a_row, a_row, a_step, b + d, width, depth);
#pragma GCC unroll 16
      for (int u = 0; u < M; ++u) {
        if (i + u >= n || !target[i + u]) continue;
        float* to = target[i + u] + d;
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) {
          const int64_t left = dim - d - j * W;
          if (left >= W) V::store(to + j * W, V::add(V::load(to + j * W), acc[u][j]));
          else V::store_first(to + j * W, V::add(V::load_first(to + j * W, left), acc[u][j]), left);
        }
      }
    }
  }

  static void accumulate(float* const* target, int64_t n, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t depth,
                         int64_t dim) {
    constexpr int N = V::kUpdateVectors;
    static_assert(N == 2 || N == 4, "the tails below cover these");
    const int64_t width = round_up(dim, W);
    int64_t d = 0;
    for (; d + N * W <= width; d += N * W) accumulate_dims<N>(target, n, a, a_row, a_step, b, depth, dim, d);
    if (N > 2 && d + 2 * W <= width) {
      accumulate_dims<2>(target, n, a, a_row, a_step, b, depth, dim, d);
      d += 2 * W;
    }
    if (d < width) accumulate_dims<1>(target, n, a, a_row, a_step, b, depth, dim, d);
  }

  template <bool kRowWeight>
  static void tile_gradient(const Problem& p, const Part& part, const Gradient& g, int64_t head, const Rows& r, const Columns& c,
                            bool want_dq, bool want_dk, Scratch& s) {
    pack_queries(p, part.sample, head, r, g.lse, s);
    const float* weight = g.weight + part.sample * g.weight_stride_batch + head * g.weight_stride_head;
    if (kRowWeight) for (int64_t i = 0; i < r.padded; ++i) s.weight[i] = i < r.n ? weight[r.begin + i] : 0.f;
    else weight += r.begin * p.n_cols + c.begin;

    memset(s.row_sum, 0, r.padded * W * sizeof(float));
    for (int64_t panel = 0; panel < c.n_panels; ++panel)
      for (int64_t i = 0; i < r.padded; i += MR) {
        const Cell cell{i, panel * PANEL};
        switch (sight(r, c, i / MR, panel)) {
          case Sight::kNone:
            for (int64_t u = i; u < i + MR; ++u) memset(s.tile + u * kColTile + cell.col, 0, PANEL * sizeof(float));
            break;
          case Sight::kSome: score_gradient<true, kRowWeight>(p, g, cell, weight, r.n, c.n, s); break;
          case Sight::kAll: score_gradient<false, kRowWeight>(p, g, cell, weight, r.n, c.n, s); break;
        }
      }

    if (want_dq && g.dlse)
      for (int64_t i = 0; i < r.n; ++i)
        g.dlse[(part.sample * p.heads + head) * p.n_rows + r.begin + i] -= g.weight_factor * V::sum(V::load(s.row_sum + i * W));
    if (want_dq) {
      float* dq = g.dq + (part.sample * p.heads + head) * p.tokens * p.dim;
      for (int64_t i = 0; i < r.n; ++i)
        s.row_target[i] = s.row_limit[i] < 0 ? nullptr : dq + p.rows[part.sample * p.n_rows + r.begin + i] * p.dim;
      accumulate(s.row_target, r.n, s.tile, kColTile, 1, s.keys, c.n, p.dim);
    }
    if (want_dk) accumulate(s.col_target, c.n, s.tile, 1, kColTile, s.queries, r.n, p.dim);
  }

  static void gradient(const Problem& p, const Part& part, const Gradient& g, bool want_dq, bool want_dk, Scratch& s) {
    const int64_t group = p.heads / p.kv_heads;
    float* dk = g.dk + (part.sample * p.kv_heads + part.kv_head) * p.tokens * p.dim;
    for (int64_t col = part.col_begin; col < part.col_end; col += kColTile) {
      const Columns c = locate_columns(p, part.sample, col, part.col_end, s);
      bool packed = false;
      for (int64_t j = 0; j < c.n; ++j)
        s.col_target[j] = s.key_position[j] == INT32_MAX ? nullptr : dk + s.key_position[j] * p.dim;
      for (int64_t head = part.kv_head * group + part.group_begin; head < part.kv_head * group + part.group_end; ++head)
        for (int64_t row = part.row_begin; row < part.row_end; row += kRowTile) {
          const Rows r = locate_rows(p, part.sample, row, part.row_end, s);
          if (c.first_position > r.last_limit) continue;
          if (!packed) pack_keys(p, part.sample, part.kv_head, c, s);
          packed = true;
          if (g.row_weight) tile_gradient<true>(p, part, g, head, r, c, want_dq, want_dk, s);
          else tile_gradient<false>(p, part, g, head, r, c, want_dq, want_dk, s);
        }
    }
  }

  // ---- log-sum-exp ----------------------------------------------------------------------------------------------------------

  static float join_lanes(const float* max, const float* sum) {
    const float infinity = __builtin_inff();
    float top = kLowest;
    for (int lane = 0; lane < W; ++lane) top = max[lane] > top ? max[lane] : top;
    double total = 0;
    for (int lane = 0; lane < W; ++lane)
      if (sum[lane] != 0.f && max[lane] != infinity)
        total += sum[lane] * __builtin_exp(static_cast<double>(max[lane]) - static_cast<double>(top));
    if (total != total) return static_cast<float>(total);
    if (top == infinity || total == 0) return infinity;
    return static_cast<float>(top + __builtin_log(total));
  }

  static void row_lse(const Problem& p, const Part& part, float* lse, Scratch& s) {
    const int64_t head = part.kv_head * (p.heads / p.kv_heads) + part.group_begin;
    const int64_t n_rows = part.row_end - part.row_begin;
    for (int64_t i = 0; i < round_up(n_rows, MR) * W; ++i) {
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
        pack_queries(p, part.sample, head, r, nullptr, s);
        float* max = s.running_max + (row - part.row_begin) * W;
        float* sum = s.running_sum + (row - part.row_begin) * W;
        for (int64_t panel = 0; panel < c.n_panels; ++panel)
          for (int64_t i = 0; i < r.padded; i += MR) {
            const Cell cell{i, panel * PANEL};
            switch (sight(r, c, i / MR, panel)) {
              case Sight::kNone: break;
              case Sight::kSome: update_lse<true>(p, cell, max, sum, s); break;
              case Sight::kAll: update_lse<false>(p, cell, max, sum, s); break;
            }
          }
      }
    }
    for (int64_t i = 0; i < n_rows; ++i)
      lse[(part.sample * p.heads + head) * p.n_rows + part.row_begin + i] = join_lanes(s.running_max + i * W, s.running_sum + i * W);
  }
};

}  // namespace cdistill
