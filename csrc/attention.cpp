// Cuts the attention problems into parts with one owner each and hands them to threads.
#include <algorithm>
#include <memory>

#include "drivers.h"
#include "parallel.h"

namespace cdistill {
namespace {

int64_t blocks(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Calls work(index, scratch) for every index. The scratch memory is allocated before the threads start, so that running
// out of it throws here.
template <class Work>
void for_each_part(int64_t n, int threads, Work work) {
  std::unique_ptr<Scratch[]> scratch(new Scratch[team_size(n, threads)]());
  parallel_for(n, threads, [&](int64_t index, int thread) { work(index, scratch[thread]); });
}

}  // namespace

void slice_forward(const Kernels& kernels, const Problem& p, const float* lse, float* out, bool each, int threads) {
  const int64_t col_parts = blocks(p.n_cols, kColTile), row_parts = blocks(p.n_rows, kRowChunk);
  for_each_part(p.batch * col_parts * row_parts, threads, [&](int64_t index, Scratch& scratch) {
    const int64_t row = index % row_parts * kRowChunk, col = index / row_parts % col_parts * kColTile;
    const Part part{index / row_parts / col_parts, 0, 0, 0, row, std::min(row + kRowChunk, p.n_rows),
                    col, std::min(col + kColTile, p.n_cols)};
    kernels.slice_forward(p, part, lse, out, each, scratch);
  });
}

void gradient(const Kernels& kernels, const Problem& p, const Gradient& g, int threads) {
  const int64_t owners = p.batch * p.kv_heads, group = p.heads / p.kv_heads;
  if (p.n_rows == 0 || p.n_cols == 0 || owners == 0) return;
  threads = std::max(threads, 1);
  // One pass costs 3 GEMMs but has only `owners` parts; two passes cost 4 and cut finer. Both add in the same order.
  if (3 * blocks(owners, threads) * threads <= 4 * owners) {
    for_each_part(owners, threads, [&](int64_t index, Scratch& scratch) {
      const Part part{index / p.kv_heads, index % p.kv_heads, 0, group, 0, p.n_rows, 0, p.n_cols};
      kernels.gradient(p, part, g, true, true, scratch);
    });
    return;
  }
  const int64_t col_parts = blocks(p.n_cols, kColTile), row_parts = blocks(p.n_rows, kRowChunk);
  for_each_part(owners * col_parts, threads, [&](int64_t index, Scratch& scratch) {
    const int64_t owner = index / col_parts, col = index % col_parts * kColTile;
    const Part part{owner / p.kv_heads, owner % p.kv_heads, 0, group, 0, p.n_rows,
                    col, std::min(col + kColTile, p.n_cols)};
    kernels.gradient(p, part, g, false, true, scratch);
  });
  for_each_part(p.batch * p.heads * row_parts, threads, [&](int64_t index, Scratch& scratch) {
    const int64_t head = index / row_parts % p.heads, row = index % row_parts * kRowChunk;
    const Part part{index / row_parts / p.heads, head / group, head % group, head % group + 1, row,
                    std::min(row + kRowChunk, p.n_rows), 0, p.n_cols};
    kernels.gradient(p, part, g, true, false, scratch);
  });
}

void row_lse(const Kernels& kernels, const Problem& p, float* lse, int threads) {
  const int64_t group = p.heads / p.kv_heads, row_parts = blocks(p.n_rows, kRowChunk);
  for_each_part(p.batch * p.heads * row_parts, threads, [&](int64_t index, Scratch& scratch) {
    const int64_t head = index / row_parts % p.heads, row = index % row_parts * kRowChunk;
    const Part part{index / row_parts / p.heads, head / group, head % group, head % group + 1, row,
                    std::min(row + kRowChunk, p.n_rows), 0, p.n_cols};
    kernels.row_lse(p, part, lse, scratch);
  });
}

}  // namespace cdistill
