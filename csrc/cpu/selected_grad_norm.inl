// Sums of squares of selected gradients. In fp64 the square of every fp32 value is exact and in range, so nothing is scaled.

constexpr int kLanes = 16;  // the order of summation, whatever the width of the vectors

template <class Grad, class Index>
static double selected_squares_range(const Grad* grad, const Index* index, int64_t count, int64_t begin, int64_t end) {
  float g[kGather];
  double sums[kLanes] = {};
  for (int64_t i = begin; i < end; i += kGather) {
    const int64_t n = end - i < kGather ? end - i : kGather;
    if (index == nullptr) {
      for (int64_t j = 0; j < n; ++j) g[j] = widen(grad[i + j]);
    } else {
      const Index* const at = index + i;
      const int64_t ahead = count - i - kPrefetch < kGather ? count - i - kPrefetch : kGather;
      request<0>(grad, at + kPrefetch, ahead);
      gather(grad, at, n, g);
    }
    for (int64_t j = n; j < kGather; ++j) g[j] = 0.0f;
    for (int64_t j = 0; j < kGather; j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const double x = static_cast<double>(g[j + lane]);
        sums[lane] += x * x;
      }
    }
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

static double selected_squares(const ft_norm_row& row, int64_t begin, int64_t end) {
  double sum = 0.0;
  with_dtype(row.grad, row.grad_dtype, [&](const auto* grad) {
    if (row.index_dtype == FT_INT32) {
      sum = selected_squares_range(grad, static_cast<const int32_t*>(row.index), row.count, begin, end);
    } else {
      sum = selected_squares_range(grad, static_cast<const int64_t*>(row.index), row.count, begin, end);
    }
  });
  return sum;
}
