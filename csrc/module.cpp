// Python module cdistill._C. Tensors arrive as addresses with shapes and strides, checked by cdistill/ops/_cpp.py;
// nothing of torch is linked. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "drivers.h"

namespace py = pybind11;

namespace cdistill {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Strides = std::array<int64_t, 3>;

Operand operand(uintptr_t address, int64_t dtype, const Strides& strides) {
  return {pointer<const void>(address), static_cast<DType>(dtype), strides[0], strides[1], strides[2]};
}

Problem make_problem(uintptr_t q, const Strides& q_strides, uintptr_t k, const Strides& k_strides, int64_t dtype,
                     int64_t batch, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim, uintptr_t rows,
                     int64_t n_rows, uintptr_t cols, int64_t n_cols, uintptr_t key_mask, bool causal, float scale) {
  Problem p{};
  p.q = operand(q, dtype, q_strides);
  p.k = operand(k, dtype, k_strides);
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.tokens = tokens;
  p.dim = dim;
  p.n_rows = n_rows;
  p.n_cols = p.n_keys = n_cols;
  p.rows = pointer<const int32_t>(rows);
  p.keys = pointer<const int32_t>(cols);
  p.key_mask = pointer<const uint8_t>(key_mask);
  p.causal = causal;
  p.scale = scale;
  return p;
}

Result make_result(uintptr_t address, int64_t dtype, const Strides& strides) {
  return {pointer<void>(address), static_cast<DType>(dtype), strides[0], strides[1], strides[2]};
}

// The kernels, chosen while the GIL protects the environment, which is released until the object dies.
class Unlocked {
 public:
  const Kernels& kernels = select_kernels();

 private:
  py::gil_scoped_release released_;
};

void slice_backward(const Problem& p, uintptr_t lse, uintptr_t grad, bool each, const Result& dq, const Result& dk,
                    uintptr_t dlse, bool denominator, int threads) {
  Gradient g{};
  g.lse = pointer<const float>(lse);
  g.weight = pointer<const float>(grad);
  g.weight_stride_head = each ? p.n_rows * p.n_cols : 0;
  g.weight_stride_batch = (each ? p.heads : 1) * p.n_rows * p.n_cols;
  g.factor = each ? 1.f : 1.f / static_cast<float>(p.heads);
  g.denominator = denominator ? Denominator::kOwn : Denominator::kApart;
  g.dq = dq;
  g.dk = dk;
  g.dlse = pointer<float>(dlse);
  gradient(Unlocked().kernels, p, g, threads);
}

void row_lse_backward(Problem p, uintptr_t lse, uintptr_t dlse, const Result& dq, const Result& dk, int threads) {
  Gradient g{};
  g.lse = pointer<const float>(lse);
  g.denominator = Denominator::kGiven;
  g.dlse = pointer<float>(dlse);
  g.dq = dq;
  g.dk = dk;
  gradient(Unlocked().kernels, p, g, threads);
}

Alignment make_alignment(uintptr_t a, uintptr_t target, uintptr_t row_valid, uintptr_t col_valid, int64_t samples,
                         int64_t n_rows, int64_t n_cols, const std::string& loss, const std::string& reduction,
                         bool sink_filter) {
  return {pointer<const float>(a),
          pointer<const float>(target),
          pointer<const uint8_t>(row_valid),
          pointer<const uint8_t>(col_valid),
          samples,
          n_rows,
          n_cols,
          loss_named(loss),
          reduction_named(reduction),
          sink_filter};
}

VocabularyRows make_vocabulary_rows(uintptr_t student, int64_t student_stride, uintptr_t teacher, int64_t teacher_stride,
                                    int64_t dtype, int64_t n_rows, int64_t vocab, uintptr_t labels,
                                    int64_t n_top, uintptr_t top_values, uintptr_t top_indices, uintptr_t top_tail,
                                    uintptr_t top_logits, int64_t divergence, float temperature, float beta,
                                    float ce_weight, float kd_weight, bool gradient, uintptr_t ce, uintptr_t kd) {
  VocabularyRows x{};
  x.student = pointer<void>(student);
  x.teacher = pointer<const void>(teacher);
  x.dtype = static_cast<DType>(dtype);
  x.student_stride = student_stride;
  x.teacher_stride = teacher_stride;
  x.n_rows = n_rows;
  x.vocab = vocab;
  x.labels = pointer<const int64_t>(labels);
  x.n_top = n_top;
  x.top_values = pointer<const float>(top_values);
  x.top_indices = pointer<const int64_t>(top_indices);
  x.top_tail = pointer<const float>(top_tail);
  x.top_logits = pointer<float>(top_logits);
  x.divergence = static_cast<Divergence>(divergence);
  x.temperature = temperature;
  x.beta = beta;
  x.ce_weight = ce_weight;
  x.kd_weight = kd_weight;
  x.gradient = gradient;
  x.ce = pointer<float>(ce);
  x.kd = pointer<float>(kd);
  return x;
}

}  // namespace
}  // namespace cdistill

PYBIND11_MODULE(_C, m) {
  using namespace cdistill;
  using namespace py::literals;
  using Released = py::call_guard<py::gil_scoped_release>;

  m.doc() = "CPU kernels of cdistill; addresses, shapes and strides in elements come in.";
  m.def("isa", [] { return select_kernels().name; },
        "Name of the instruction set in use: avx512_bf16, avx512, avx2 or portable.");

  m.def(
      "fill_with_zeros",
      [](uintptr_t address, int64_t bytes, int threads) { fill_with_zeros(pointer<void>(address), bytes, threads); },
      "address"_a, "bytes"_a, "threads"_a, Released());

  py::class_<Problem>(m, "Problem", "Queries, keys and positions that a call works on.")
      .def(py::init(&make_problem), py::kw_only(), "q"_a, "q_strides"_a, "k"_a, "k_strides"_a, "dtype"_a, "batch"_a,
           "heads"_a, "kv_heads"_a, "tokens"_a, "dim"_a, "rows"_a, "n_rows"_a, "cols"_a, "n_cols"_a, "key_mask"_a,
           "causal"_a, "scale"_a);
  py::class_<Result>(m, "Result", "A gradient that is added to; without a tensor, one that is not wanted.")
      .def(py::init<>())
      .def(py::init(&make_result), py::kw_only(), "address"_a, "dtype"_a, "strides"_a);
  m.def("row_lse_backward", &row_lse_backward, "problem"_a, "lse"_a, "dlse"_a, "dq"_a, "dk"_a, "threads"_a);
  m.def(
      "slice_forward",
      [](const Problem& p, uintptr_t lse, uintptr_t out, bool each, int threads) {
        slice_forward(Unlocked().kernels, p, pointer<const float>(lse), pointer<float>(out), each, threads);
      },
      "problem"_a, "lse"_a, "out"_a, "each"_a, "threads"_a);
  m.def(
      "slice_forward_with_lse",
      [](const Problem& p, uintptr_t lse, uintptr_t out, bool each, int threads) {
        slice_forward_with_lse(Unlocked().kernels, p, pointer<float>(lse), pointer<float>(out), each, threads);
      },
      "problem"_a, "lse"_a, "out"_a, "each"_a, "threads"_a);
  m.def("slice_backward", &slice_backward, "problem"_a, "lse"_a, "grad"_a, "each"_a, "dq"_a, "dk"_a, "dlse"_a,
        "denominator"_a, "threads"_a);

  py::class_<Alignment>(m, "Alignment", "Slices whose distance a call computes.")
      .def(py::init(&make_alignment), py::kw_only(), "a"_a, "target"_a, "row_valid"_a, "col_valid"_a, "samples"_a,
           "n_rows"_a, "n_cols"_a, "loss"_a, "reduction"_a, "sink_filter"_a);
  m.def(
      "alignment_loss",
      [](const Alignment& x, uintptr_t losses, int threads) { alignment_loss(x, pointer<float>(losses), threads); },
      "alignment"_a, "losses"_a, "threads"_a, Released());
  m.def(
      "alignment_grad",
      [](const Alignment& x, uintptr_t grad_out, uintptr_t grad, int threads) {
        alignment_grad(x, pointer<const float>(grad_out), pointer<float>(grad), threads);
      },
      "alignment"_a, "grad_out"_a, "grad"_a, "threads"_a, Released());

  py::class_<VocabularyRows>(m, "VocabularyRows", "Rows of logits whose cross-entropy and divergence a call computes.")
      .def(py::init(&make_vocabulary_rows), py::kw_only(), "student"_a, "student_stride"_a, "teacher"_a,
           "teacher_stride"_a, "dtype"_a, "n_rows"_a, "vocab"_a, "labels"_a, "n_top"_a, "top_values"_a,
           "top_indices"_a, "top_tail"_a, "top_logits"_a, "divergence"_a, "temperature"_a, "beta"_a, "ce_weight"_a,
           "kd_weight"_a, "gradient"_a, "ce"_a, "kd"_a);
  m.def(
      "vocabulary_rows", [](const VocabularyRows& x, int threads) { vocabulary_rows(Unlocked().kernels, x, threads); },
      "rows"_a, "threads"_a);
}
