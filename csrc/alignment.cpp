// Alignment losses of attention slices and their gradients, in double.
//
// Every loss compares pairs of vectors x (student) and y (teacher): each row, the flattened slice, or the (weighted)
// column means. A pair is read in segments: rows of valid columns, copied to double. Three passes go over the segments,
// each reduced in a fixed order:
//   totals    cosine <x,x>, <y,y>; kl, jsd and reverse_kl sum x, sum y
//   distance  the loss, and what the gradient needs of the whole pair
//   gradient  elementwise
#if defined(__aarch64__) && !defined(__clang__)
// Products are rounded before they are subtracted, or equal vectors have a distance (2e-33) where processors fuse the two.
// x86-64 fuses nothing here, and clang heeds no pragma beside -ffp-contract=fast.
#pragma GCC optimize("fp-contract=off")
#endif

#include <cmath>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "drivers.h"
#include "parallel.h"

namespace cdistill {

enum class Loss : int { kCosine, kMse, kKl, kJsd, kReverseKl };

namespace {

// The smallest normal fp32 number: a smaller share counts as this one, and nothing pulls it up.
constexpr double kLeastShare = 0x1p-126;
constexpr int64_t kColBlock = 64;

struct Totals {
  double x = 0, y = 0;
  void add(const Totals& other) {
    x += other.x;
    y += other.y;
  }
};

// A pair of vectors after its totals are known; `length` counts its entries.
struct Pair {
  Loss loss;
  double x_factor, y_factor;  // what normalises x and y, 0 for a vector that cannot be normalised
  double length;
  bool degenerate() const { return loss != Loss::kMse && (x_factor == 0 || y_factor == 0); }
};

Totals totals_of(Loss loss, const double* x, const double* y, int64_t n) {
  double sum_x = 0, sum_y = 0;
  if (loss == Loss::kCosine) {
#pragma omp simd reduction(+ : sum_x, sum_y)
    for (int64_t j = 0; j < n; ++j) {
      sum_x += x[j] * x[j];
      sum_y += y[j] * y[j];
    }
  } else if (loss != Loss::kMse) {
#pragma omp simd reduction(+ : sum_x, sum_y)
    for (int64_t j = 0; j < n; ++j) {
      sum_x += x[j];
      sum_y += y[j];
    }
  }
  return {sum_x, sum_y};
}

Pair normalised(Loss loss, const Totals& totals, double length) {
  const auto factor = [&](double total) {
    if (loss == Loss::kMse) return 1.0;
    if (total == 0) return 0.0;
    return loss == Loss::kCosine ? 1 / std::sqrt(total) : 1 / total;
  };
  return {loss, factor(totals.x), factor(totals.y), length};
}

double at_least_share(double x) { return x < kLeastShare ? kLeastShare : x; }

// Half the log of a share's ratio to the mean of both: d JSD / d share.
double jsd_slope(double share, double other) {
  return 0.5 * std::log(2 * at_least_share(share) / (at_least_share(share) + at_least_share(other)));
}

double log_ratio(double share, double other) { return std::log(at_least_share(share) / at_least_share(other)); }

// d reverse KL / d share, less the 1 of every share that is not faint.
double reverse_kl_slope(double share, double other) {
  return log_ratio(share, other) - (share < kLeastShare ? 1 : 0);
}

// The loss of a segment. For cosine half the squared distance of the normalised vectors, which is exact as cos
// approaches 1.
double distance(const Pair& pair, const double* x, const double* y, int64_t n) {
  double sum = 0;
  switch (pair.loss) {
    case Loss::kCosine:
    case Loss::kMse:
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) {
        const double difference = x[j] * pair.x_factor - y[j] * pair.y_factor;
        sum += difference * difference;
      }
      return sum * (pair.loss == Loss::kCosine ? 0.5 : 1 / pair.length);
    case Loss::kKl:
      for (int64_t j = 0; j < n; ++j) {
        const double student = x[j] * pair.x_factor, teacher = y[j] * pair.y_factor;
        if (teacher != 0) sum += teacher * (std::log(teacher) - std::log(student < kLeastShare ? kLeastShare : student));
      }
      return sum;
    case Loss::kJsd:
      for (int64_t j = 0; j < n; ++j) {
        const double student = x[j] * pair.x_factor, teacher = y[j] * pair.y_factor;
        sum += student * jsd_slope(student, teacher) + teacher * jsd_slope(teacher, student);
      }
      return sum;
    case Loss::kReverseKl:
      for (int64_t j = 0; j < n; ++j) {
        const double student = x[j] * pair.x_factor;
        sum += student * log_ratio(student, y[j] * pair.y_factor);
      }
      return sum;
  }
  return sum;
}

// What the gradient of every entry subtracts: the part of a segment.
double common_part(const Pair& pair, const double* x, const double* y, int64_t n) {
  if (pair.loss == Loss::kCosine) return distance(pair, x, y, n);
  double sum = 0;
  if (pair.loss == Loss::kKl)
    for (int64_t j = 0; j < n; ++j) {
      if (!(x[j] * pair.x_factor < kLeastShare)) sum -= y[j] * pair.y_factor;
    }
  if (pair.loss == Loss::kJsd)
    for (int64_t j = 0; j < n; ++j) {
      const double student = x[j] * pair.x_factor;
      sum += student * jsd_slope(student, y[j] * pair.y_factor);
    }
  if (pair.loss == Loss::kReverseKl)
    for (int64_t j = 0; j < n; ++j) {
      const double student = x[j] * pair.x_factor;
      sum += student * reverse_kl_slope(student, y[j] * pair.y_factor);
    }
  return sum;
}

double entry_gradient(const Pair& pair, double common, double x, double y) {
  const double student = x * pair.x_factor, teacher = y * pair.y_factor;
  switch (pair.loss) {
    case Loss::kCosine: return (student - teacher - common * student) * pair.x_factor;
    case Loss::kMse: return 2 * (student - teacher) / pair.length;
    case Loss::kKl: return ((student < kLeastShare ? 0 : -teacher / student) - common) * pair.x_factor;
    case Loss::kJsd: return (jsd_slope(student, teacher) - common) * pair.x_factor;
    case Loss::kReverseKl: return (reverse_kl_slope(student, teacher) - common) * pair.x_factor;
  }
  return 0;
}

double value_of_degenerate(Loss loss) { return loss == Loss::kCosine ? 1 : 0; }

// A whole pair in one segment.
double pair_loss(Loss loss, const double* x, const double* y, int64_t n) {
  const Pair pair = normalised(loss, totals_of(loss, x, y, n), static_cast<double>(n));
  return pair.degenerate() ? value_of_degenerate(loss) : distance(pair, x, y, n);
}

// x becomes the gradient.
void pair_gradient(Loss loss, double factor, double* x, const double* y, int64_t n) {
  const Pair pair = normalised(loss, totals_of(loss, x, y, n), static_cast<double>(n));
  const double common = pair.degenerate() ? 0 : common_part(pair, x, y, n);
  for (int64_t j = 0; j < n; ++j) x[j] = pair.degenerate() ? 0 : factor * entry_gradient(pair, common, x[j], y[j]);
}

// The valid rows and columns of one sample.
class Sample {
 public:
  Sample(const Alignment& all, int64_t index) : all_(all), index_(index) {
    for (int64_t r = 0; r < all.n_rows; ++r)
      if (all.row_valid[index * all.n_rows + r]) rows.push_back(r);
    for (int64_t c = 0; c < all.n_cols; ++c)
      if (all.col_valid[index * all.n_cols + c]) cols.push_back(c);
  }

  std::vector<int64_t> rows, cols;

  bool empty() const { return rows.empty() || cols.empty(); }
  int64_t n_rows() const { return rows.size(); }
  int64_t n_cols() const { return cols.size(); }
  int64_t offset(int64_t row) const { return (index_ * all_.n_rows + rows[row]) * all_.n_cols; }

  // Valid columns [begin, end) of a valid row, as doubles.
  void read(int64_t row, int64_t begin, int64_t end, double* x, double* y) const {
    const float* a = all_.a + offset(row);
    const float* target = all_.target + offset(row);
    for (int64_t j = begin; j < end; ++j) {
      x[j - begin] = a[cols[j]];
      y[j - begin] = target[cols[j]];
    }
  }
  void read(int64_t row, double* x, double* y) const { read(row, 0, n_cols(), x, y); }

  void write(int64_t row, const double* gradient, float* grad) const {
    float* to = grad + offset(row);
    constexpr double kMost = 3.402823466e38;  // the gradient of a faint share may exceed it, and must not become inf
    for (int64_t j = 0; j < n_cols(); ++j)
      to[cols[j]] = static_cast<float>(gradient[j] > kMost ? kMost : gradient[j] < -kMost ? -kMost : gradient[j]);
  }

 private:
  const Alignment& all_;
  int64_t index_;
};

// Runs the passes over one sample; each thread owns one buffer for a pair of rows.
class Passes {
 public:
  Passes(const Alignment& all, int threads)
      : all_(all), threads_(threads), buffers_(2 * std::max(threads, 1) * all.n_cols) {}

  // Calls work(row, x, y) for the valid rows, in parallel.
  template <class Work>
  void for_each_row(const Sample& sample, Work work) {
    parallel_for(sample.n_rows(), threads_, [&](int64_t row, int thread) {
      double* x = buffers_.data() + 2 * thread * all_.n_cols;
      double* y = x + all_.n_cols;
      sample.read(row, x, y);
      work(row, x, y);
    });
  }

  // The sum over valid rows of work(row, x, y), added in the order of the rows.
  template <class Sum, class Work>
  Sum sum_rows(const Sample& sample, Work work) {
    std::vector<Sum> parts(sample.n_rows());
    for_each_row(sample, [&](int64_t row, double* x, double* y) { parts[row] = work(x, y); });
    Sum total{};
    for (const Sum& part : parts) add(total, part);
    return total;
  }

  // The means u, v over rows and, with the sink filter, the limits of student and teacher and how many rows each column
  // keeps.
  struct ColumnMeans {
    std::vector<double> u, v, count;
    Totals limit;
  };

  bool kept(const ColumnMeans& means, double x, double y) const {
    return !all_.sink_filter || (x <= means.limit.x && y <= means.limit.y && y != 0);
  }

  ColumnMeans column_means(const Sample& sample) {
    const int64_t n = sample.n_cols();
    ColumnMeans means{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n), {}};
    if (all_.sink_filter) means.limit = sink_limits(sample);
    parallel_for((n + kColBlock - 1) / kColBlock, threads_, [&](int64_t block, int) {
      const int64_t begin = block * kColBlock, end = std::min(begin + kColBlock, n);
      double x[kColBlock], y[kColBlock];
      for (int64_t row = 0; row < sample.n_rows(); ++row) {
        sample.read(row, begin, end, x, y);
        for (int64_t j = begin; j < end; ++j) {
          if (!kept(means, x[j - begin], y[j - begin])) continue;
          means.u[j] += x[j - begin];
          means.v[j] += y[j - begin];
          means.count[j] += 1;
        }
      }
      for (int64_t j = begin; j < end; ++j) {
        means.count[j] = std::max(means.count[j], 1.0);
        means.u[j] /= means.count[j];
        means.v[j] /= means.count[j];
      }
    });
    return means;
  }

 private:
  static void add(double& total, double part) { total += part; }
  static void add(Totals& total, const Totals& part) { total.add(part); }

  // Mean plus one unbiased standard deviation of the valid entries.
  Totals sink_limits(const Sample& sample) {
    const int64_t n = sample.n_cols();
    const double entries = static_cast<double>(sample.n_rows()) * static_cast<double>(n);
    const auto sums = [n](const double* x, const double* y) { return totals_of(Loss::kKl, x, y, n); };
    Totals mean = sum_rows<Totals>(sample, sums);
    mean = {mean.x / entries, mean.y / entries};
    const Totals squares = sum_rows<Totals>(sample, [&](double* x, double* y) {
      for (int64_t j = 0; j < n; ++j) {
        x[j] -= mean.x;
        y[j] -= mean.y;
      }
      return totals_of(Loss::kCosine, x, y, n);
    });
    const double degrees = std::max(entries - 1, 1.0);
    return {mean.x + std::sqrt(squares.x / degrees), mean.y + std::sqrt(squares.y / degrees)};
  }

  const Alignment& all_;
  int threads_;
  std::vector<double> buffers_;
};

Pair matrix_pair(const Alignment& all, const Sample& sample, Passes& passes) {
  const int64_t n = sample.n_cols();
  const auto segment = [&](double* x, double* y) { return totals_of(all.loss, x, y, n); };
  const Totals totals = passes.sum_rows<Totals>(sample, segment);
  return normalised(all.loss, totals, static_cast<double>(sample.n_rows()) * static_cast<double>(n));
}

double sample_loss(const Alignment& all, const Sample& sample, Passes& passes) {
  const int64_t n = sample.n_cols();
  switch (all.reduction) {
    case Reduction::kRow:
      return passes.sum_rows<double>(sample, [&](double* x, double* y) { return pair_loss(all.loss, x, y, n); }) /
             static_cast<double>(sample.n_rows());
    case Reduction::kMatrix: {
      const Pair pair = matrix_pair(all, sample, passes);
      if (pair.degenerate()) return value_of_degenerate(all.loss);
      return passes.sum_rows<double>(sample, [&](double* x, double* y) { return distance(pair, x, y, n); });
    }
    case Reduction::kColumn: {
      const Passes::ColumnMeans means = passes.column_means(sample);
      return pair_loss(all.loss, means.u.data(), means.v.data(), n);
    }
  }
  return 0;
}

void sample_gradient(const Alignment& all, const Sample& sample, Passes& passes, double factor, float* grad) {
  const int64_t n = sample.n_cols();
  switch (all.reduction) {
    case Reduction::kRow:
      passes.for_each_row(sample, [&](int64_t row, double* x, double* y) {
        pair_gradient(all.loss, factor / static_cast<double>(sample.n_rows()), x, y, n);
        sample.write(row, x, grad);
      });
      return;
    case Reduction::kMatrix: {
      const Pair pair = matrix_pair(all, sample, passes);
      if (pair.degenerate()) return;
      const auto segment = [&](double* x, double* y) { return common_part(pair, x, y, n); };
      const double common = passes.sum_rows<double>(sample, segment);
      passes.for_each_row(sample, [&](int64_t row, double* x, double* y) {
        for (int64_t j = 0; j < n; ++j) x[j] = factor * entry_gradient(pair, common, x[j], y[j]);
        sample.write(row, x, grad);
      });
      return;
    }
    case Reduction::kColumn: {
      Passes::ColumnMeans means = passes.column_means(sample);
      pair_gradient(all.loss, factor, means.u.data(), means.v.data(), n);
      passes.for_each_row(sample, [&](int64_t row, double* x, double* y) {
        for (int64_t j = 0; j < n; ++j) x[j] = passes.kept(means, x[j], y[j]) ? means.u[j] / means.count[j] : 0;
        sample.write(row, x, grad);
      });
      return;
    }
  }
}

template <class Value, size_t kCount>
Value named(const char* what, const std::string& name, const std::pair<const char*, Value> (&known)[kCount]) {
  for (const auto& [own, value] : known)
    if (name == own) return value;
  throw std::invalid_argument(std::string(what) + " '" + name + "' is not known to the C++ kernels");
}

}  // namespace

Loss loss_named(const std::string& name) {
  static constexpr std::pair<const char*, Loss> kLosses[] = {
      {"cosine", Loss::kCosine}, {"mse", Loss::kMse}, {"kl", Loss::kKl}, {"jsd", Loss::kJsd},
      {"reverse_kl", Loss::kReverseKl}};
  return named("loss", name, kLosses);
}

Reduction reduction_named(const std::string& name) {
  static constexpr std::pair<const char*, Reduction> kReductions[] = {
      {"row", Reduction::kRow}, {"matrix", Reduction::kMatrix}, {"column", Reduction::kColumn}};
  return named("reduction", name, kReductions);
}

void alignment_loss(const Alignment& all, float* losses, int threads) {
  Passes passes(all, threads);
  for (int64_t index = 0; index < all.samples; ++index) {
    const Sample sample(all, index);
    losses[index] = sample.empty() ? 0.f : static_cast<float>(sample_loss(all, sample, passes));
  }
}

void alignment_grad(const Alignment& all, const float* grad_out, float* grad, int threads) {
  Passes passes(all, threads);
  std::fill_n(grad, all.samples * all.n_rows * all.n_cols, 0.f);
  for (int64_t index = 0; index < all.samples; ++index) {
    const Sample sample(all, index);
    if (!sample.empty()) sample_gradient(all, sample, passes, grad_out[index], grad);
  }
}

}  // namespace cdistill
