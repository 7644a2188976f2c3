// Cuts the attention problems into parts with one owner each and hands them to threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1  // clang
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "drivers.h"
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cdistill {
namespace {

// Most working memory per thread for what depends on the number of keys, in floats.
constexpr int64_t kMostSpill = (8 << 20) / 4;
constexpr int64_t kMostKeySums = (6 << 20) / 4;

int64_t blocks(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
int64_t round_up(int64_t n, int64_t unit) { return blocks(n, unit) * unit; }

// What a call needs beyond the tiles.
struct Needs {
  int64_t sum_rows = 0;    // rows of Scratch::sum
  int64_t chunk_rows = 0;  // rows of spill and dq
  int64_t lse_rows = 0;    // rows of running_max, running_sum and maxima
  int64_t spill_pitch = 0;
  bool dq = false;
  int64_t dk_keys = 0;
};

// Under AddressSanitizer the parts of the working memory lie apart, and the space between them is not to be touched.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGap = kMaxLanes;
void forbid(const float* begin, const float* end) { __asan_poison_memory_region(begin, (end - begin) * sizeof(float)); }
#else
constexpr int64_t kGap = 0;
void forbid(const float*, const float*) {}
#endif

// Working memory of the threads of one call. It is allocated before they start, so that running out of it throws here.
class Workspace {
 public:
  Workspace(const Problem& p, const Needs& needs, int team) : scratch_(team) {
    const int64_t pitch = round_up(p.dim, kMaxLanes), rows = round_up(needs.chunk_rows, kRowTile);
    const int64_t margin = kMaxLanes;  // register tiles read a little beyond the last key of a tile
    for (Scratch& s : scratch_) {
      s.spill_pitch = needs.spill_pitch;
      s.chunk_rows = needs.chunk_rows;
      const std::pair<float**, int64_t> areas[] = {
          {&s.zeros, pitch},
          {&s.queries, kRowTile * pitch},
          {&s.keys, kKeyTile * pitch},
          {&s.panels, kKeyTile * pitch},
          {&s.tile, kRowTile * kKeyTile + margin},
          {&s.tile_pairs, p.dot_pairs ? kRowTile * kKeyTile / 2 : 0},
          {&s.tile_columns, p.dot_pairs ? kRowTile / 2 * kKeyTile + margin : 0},
          {&s.sum, round_up(needs.sum_rows, kRowTile) * kKeyTile},
          {&s.running_max, needs.lse_rows * kMaxLanes},
          {&s.running_sum, needs.lse_rows * kMaxLanes},
          {&s.spill, rows * needs.spill_pitch},
          {&s.maxima, needs.lse_rows * (needs.spill_pitch / kKeyTile) * kMaxLanes},
          {&s.dq, needs.dq ? rows * pitch : 0},
          {&s.dk, needs.dk_keys * pitch},
      };
      int64_t floats = 0;
      for (const auto& [area, size] : areas) floats += round_up(size, kMaxLanes) + kGap;
      blocks_.emplace_back(static_cast<float*>(operator new(floats * sizeof(float), kAlignment)));
      float* next = blocks_.back().get();
      for (const auto& [area, size] : areas) {
        *area = size ? next : nullptr;
        forbid(next + size, next + round_up(size, kMaxLanes) + kGap);
        next += round_up(size, kMaxLanes) + kGap;
      }
      std::fill_n(s.zeros, pitch, 0.f);
    }
  }

  Scratch& operator[](int thread) { return scratch_[thread]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { operator delete(p, kAlignment); }
  };
  std::vector<std::unique_ptr<float, Free>> blocks_;
  std::vector<Scratch> scratch_;
};

// Calls work(index, scratch) for every index.
template <class Work>
void for_each_part(const Problem& p, const Needs& needs, int64_t n, int threads, Work work) {
  Workspace scratch(p, needs, team_size(n, threads));
  parallel_for(n, threads, [&](int64_t index, int thread) { work(index, scratch[thread]); });
}

// Asks for pages of 2 MB within [data, data + bytes): faulting in a gradient by pages of 4 KB takes longer than filling it.
void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // it may refuse
#else
  (void)data, (void)bytes;
#endif
}

// Decides which samples are multiplied as pairs: those of bf16 without subnormal numbers, which that would take for zero. A
// sample alone and in a batch go the same way. Returns what p.dot_pairs points to.
std::vector<uint8_t> choose_pairs(const Kernels& kernels, Problem& p, int threads) {
  p.dot_pairs = nullptr;
  if (!kernels.dot_pairs || p.q.dtype != DType::kBFloat16) return {};
  std::vector<std::atomic<bool>> subnormal(p.batch);
  const auto search = [&](const Operand& x, int64_t sample, int64_t head, int64_t token) {
    const auto* from = static_cast<const uint16_t*>(x.data) + sample * x.stride_batch + head * x.stride_head;
    if (kernels.has_subnormal(from + token * x.stride_token, p.dim)) subnormal[sample] = true;
  };
  parallel_for(p.batch * p.heads, threads, [&](int64_t index, int) {
    for (int64_t i = 0; i < p.n_rows; ++i) {
      const int64_t sample = index / p.heads, token = p.rows[sample * p.n_rows + i];
      if (token >= 0) search(p.q, sample, index % p.heads, token);
    }
  });
  parallel_for(p.batch * p.kv_heads, threads, [&](int64_t index, int) {
    for (int64_t j = 0; j < p.n_keys; ++j) {
      const int64_t sample = index / p.kv_heads, token = p.keys ? p.keys[sample * p.n_keys + j] : j;
      const bool hidden = token < 0 || (p.key_mask && !p.key_mask[sample * p.tokens + token]);
      if (!hidden) search(p.k, sample, index % p.kv_heads, token);
    }
  });
  std::vector<uint8_t> exact(p.batch);
  for (int64_t b = 0; b < p.batch; ++b) exact[b] = !subnormal[b];
  p.dot_pairs = exact.data();
  return exact;
}

// The keys of every sample with those of the slice first, filling whole tiles with padding; (B, n_keys).
std::vector<int32_t> slice_first(const Problem& p, int64_t* n_keys) {
  const int64_t slice_keys = round_up(p.n_cols, kKeyTile);
  *n_keys = slice_keys + p.tokens;
  std::vector<int32_t> keys(p.batch * *n_keys, -1);
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<bool> in_slice(p.tokens);
    int32_t* to = keys.data() + b * *n_keys;
    for (int64_t j = 0; j < p.n_cols; ++j) {
      to[j] = p.keys[b * p.n_cols + j];
      if (to[j] >= 0) in_slice[to[j]] = true;
    }
    to += slice_keys;
    for (int64_t token = 0; token < p.tokens; ++token)
      if (!in_slice[token]) *to++ = static_cast<int32_t>(token);
  }
  return keys;
}

void use_all_keys(Problem& p) {
  p.keys = nullptr;
  p.n_keys = p.tokens;
  p.n_cols = 0;
}

// Rows of one head whose scores fit into the working memory, in whole tiles; 0 if not even one tile does.
int64_t rows_to_spill(int64_t spill_pitch) {
  return std::min(kMostSpill / spill_pitch / kRowTile * kRowTile, kRowChunk);
}

// The part of one query head and `n` rows.
Part head_part(const Problem& p, int64_t index, int64_t chunk_rows) {
  const int64_t group = p.heads / p.kv_heads, chunks = blocks(p.n_rows, chunk_rows);
  const int64_t head = index / chunks % p.heads, row = index % chunks * chunk_rows;
  return {index / chunks / p.heads, head / group, head % group, head % group + 1,
          row, std::min(row + chunk_rows, p.n_rows), 0, p.n_keys};
}

}  // namespace

void slice_forward(const Kernels& kernels, Problem p, const float* lse, float* out, bool each, int threads) {
  const std::vector<uint8_t> pairs = choose_pairs(kernels, p, threads);
  const int64_t key_parts = blocks(p.n_keys, kKeyTile), row_parts = blocks(p.n_rows, kRowChunk);
  Needs needs;
  needs.sum_rows = std::min(p.n_rows, kRowChunk);
  for_each_part(p, needs, p.batch * key_parts * row_parts, threads, [&](int64_t index, Scratch& scratch) {
    const int64_t row = index % row_parts * kRowChunk, key = index / row_parts % key_parts * kKeyTile;
    const Part part{index / row_parts / key_parts, 0, 0, 0, row, std::min(row + kRowChunk, p.n_rows),
                    key, std::min(key + kKeyTile, p.n_keys)};
    kernels.slice_forward(p, part, lse, out, each, scratch);
  });
}

void row_lse(const Kernels& kernels, Problem p, float* lse, int threads) {
  use_all_keys(p);
  const std::vector<uint8_t> pairs = choose_pairs(kernels, p, threads);
  Needs needs;
  needs.lse_rows = std::min(p.n_rows, kRowChunk);
  const int64_t parts = p.batch * p.heads * blocks(p.n_rows, kRowChunk);
  for_each_part(p, needs, parts, threads, [&](int64_t index, Scratch& scratch) {
    kernels.row_lse(p, head_part(p, index, kRowChunk), lse, scratch);
  });
}

void slice_forward_with_lse(const Kernels& kernels, Problem p, float* lse, float* out, bool each, int threads) {
  if (p.n_rows == 0 || p.n_cols == 0) return row_lse(kernels, p, lse, threads);
  const int64_t spill_pitch = round_up(p.n_cols, kKeyTile);
  const int64_t most_rows = rows_to_spill(spill_pitch);
  if (most_rows == 0) {
    row_lse(kernels, p, lse, threads);
    return slice_forward(kernels, p, lse, out, each, threads);
  }
  const std::vector<int32_t> keys = slice_first(p, &p.n_keys);
  p.keys = keys.data();
  const std::vector<uint8_t> pairs = choose_pairs(kernels, p, threads);
  // Equal chunks, one for every thread; where they begin changes no bit, because rows do not depend on each other.
  const int64_t wanted = std::max(blocks(p.n_rows, most_rows), blocks(threads, std::max<int64_t>(p.batch, 1)));
  Needs needs;
  needs.chunk_rows = std::min(round_up(blocks(p.n_rows, wanted), kRowUnit), most_rows);
  needs.lse_rows = needs.chunk_rows;
  needs.spill_pitch = spill_pitch;
  const int64_t chunks = blocks(p.n_rows, needs.chunk_rows);
  for_each_part(p, needs, p.batch * chunks, threads, [&](int64_t index, Scratch& scratch) {
    const int64_t row = index % chunks * needs.chunk_rows;
    const Part part{index / chunks, 0, 0, 0, row, std::min(row + needs.chunk_rows, p.n_rows), 0, p.n_keys};
    kernels.slice_forward_with_lse(p, part, lse, out, each, scratch);
  });
}

void fill_with_zeros(void* data, int64_t bytes, int threads) {
  constexpr int64_t kBlock = 1 << 20;
  advise_large_pages(data, bytes);
  parallel_for(blocks(bytes, kBlock), threads, [&](int64_t block, int) {
    std::memset(static_cast<char*>(data) + block * kBlock, 0, std::min(kBlock, bytes - block * kBlock));
  });
}

void gradient(const Kernels& kernels, Problem p, Gradient g, int threads) {
  if (!g.weight) use_all_keys(p);
  const int64_t owners = p.batch * p.kv_heads, group = p.heads / p.kv_heads;
  if (p.n_rows == 0 || owners == 0) return;
  threads = std::max(threads, 1);
  std::vector<int32_t> keys;
  std::vector<float> share;
  Needs needs;
  needs.chunk_rows = std::min(round_up(p.n_rows, kRowTile), kRowChunk);
  if (g.denominator == Denominator::kOwn) {
    const int64_t spill_pitch = round_up(p.n_cols, kKeyTile) + round_up(p.tokens, kKeyTile);
    const int64_t spill_rows = rows_to_spill(spill_pitch);
    if (spill_rows == 0) {
      Gradient apart = g;
      apart.denominator = Denominator::kApart;
      apart.dq.data = apart.dk.data = nullptr;
      gradient(kernels, p, apart, threads);
      g.denominator = Denominator::kGiven;
    } else {
      needs.chunk_rows = std::min(needs.chunk_rows, spill_rows);
      share.resize(p.batch * p.heads * p.n_rows);
      g.share = share.data();
    }
    keys = slice_first(p, &p.n_keys);
    p.keys = keys.data();
    needs.spill_pitch = spill_rows ? spill_pitch : 0;
  }
  const std::vector<uint8_t> pairs = choose_pairs(kernels, p, threads);
  const bool wanted = g.dq.data;  // or only dlse
  needs.dq = wanted && g.dq.dtype != DType::kFloat32;
  const bool sum_keys = wanted && g.dk.dtype != DType::kFloat32;
  const int64_t key_sums = sum_keys ? p.n_keys * round_up(p.dim, kMaxLanes) : 0;

  // One pass costs 3 products but has only `owners` parts; two passes cost 4 and cut finer. Both add in the same order.
  if (wanted && key_sums <= kMostKeySums && 3 * blocks(owners, threads) * threads <= 4 * owners) {
    needs.dk_keys = sum_keys ? p.n_keys : 0;
    for_each_part(p, needs, owners, threads, [&](int64_t index, Scratch& scratch) {
      const Part part{index / p.kv_heads, index % p.kv_heads, 0, group, 0, p.n_rows, 0, p.n_keys};
      kernels.gradient(p, part, g, true, true, scratch);
    });
    return;
  }
  const int64_t parts = p.batch * p.heads * blocks(p.n_rows, needs.chunk_rows);
  for_each_part(p, needs, parts, threads, [&](int64_t index, Scratch& scratch) {
    kernels.gradient(p, head_part(p, index, needs.chunk_rows), g, wanted, false, scratch);
  });
  if (!wanted) return;
  Needs by_keys;
  by_keys.dk_keys = sum_keys ? kKeyTile : 0;
  if (g.denominator == Denominator::kOwn) g.denominator = Denominator::kGiven;
  const int64_t key_parts = blocks(p.n_keys, kKeyTile);
  for_each_part(p, by_keys, owners * key_parts, threads, [&](int64_t index, Scratch& scratch) {
    const int64_t owner = index / key_parts, key = index % key_parts * kKeyTile;
    const Part part{owner / p.kv_heads, owner % p.kv_heads, 0, group, 0, p.n_rows,
                    key, std::min(key + kKeyTile, p.n_keys)};
    kernels.gradient(p, part, g, false, true, scratch);
  });
}

}  // namespace cdistill
