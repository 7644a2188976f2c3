// The gradients of the attention kernels; simd_attention.h says how tiles are walked, and has the forward passes. Include it
// only from isa_*.cpp.
//
// One tile of scores becomes probabilities, then dS. These are functions of their own, not inlined: compilers contract
// multiply-adds as the surroundings suggest, and dk must have the same bits however the work is cut.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd_attention.h"

namespace cdistill {
namespace {

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
