// Squared per-sample gradients of what multiplies or shifts channels: sums over tokens, one range of channels at a time.

constexpr int64_t kTokens = 64;  // of a partial sum

// Adds `Count` tokens, whose rows are `stride` apart, to the sums; several at once, so that the sums are read once for them.
template <bool Scaled, bool Shifted, int Count, class X, class Grad>
static inline void add_tokens(const X* __restrict x, const Grad* __restrict dy, int64_t stride, int64_t channels,
                              const float* mean, const float* rstd, float* __restrict part_w, float* __restrict part_b) {
  float m[Count], r[Count];
  for (int k = 0; k < Count; ++k) {
    m[k] = mean != nullptr ? mean[k] : 0.0f;
    r[k] = rstd != nullptr ? rstd[k] : 1.0f;
  }
  for (int64_t c = 0; c < channels; ++c) {
    float w = Scaled ? part_w[c] : 0.0f, b = Shifted ? part_b[c] : 0.0f;
    for (int k = 0; k < Count; ++k) {
      const float d = widen(dy[k * stride + c]);
      if (Scaled) w += d * ((widen(x[k * stride + c]) - m[k]) * r[k]);
      if (Shifted) b += d;
    }
    if (Scaled) part_w[c] = w;
    if (Shifted) part_b[c] = b;
  }
}

static inline void add_to(float* __restrict total, float* __restrict part, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    total[c] += part[c];
    part[c] = 0.0f;
  }
}

static inline void add_squares(float* __restrict total, float* __restrict sums, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    total[c] += sums[c] * sums[c];
    sums[c] = 0.0f;
  }
}

static inline void add_scaled(float* __restrict accumulator, const float* __restrict squares, float weight, int64_t count) {
  for (int64_t c = 0; c < count; ++c) accumulator[c] += weight * squares[c];
}

template <bool Scaled, bool Shifted, class X, class Grad>
static void affine_range(const ft_affine_row& row, const X* x, const Grad* dy, int64_t first, int64_t count, float weight) {
  // Of the weight and of the bias: a block's sums, a sample's sums, and the squares of all samples.
  float part_w[kAffineChannels] = {}, grad_w[kAffineChannels] = {}, squares_w[kAffineChannels] = {};
  float part_b[kAffineChannels] = {}, grad_b[kAffineChannels] = {}, squares_b[kAffineChannels] = {};
  const auto add = [&](auto several, int64_t token) {
    const int64_t at = token * row.channels + first;
    const float* const mean = row.mean != nullptr ? row.mean + token : nullptr;
    const float* const rstd = row.rstd != nullptr ? row.rstd + token : nullptr;
    add_tokens<Scaled, Shifted, decltype(several)::value>(Scaled ? x + at : x, dy + at, row.channels, count, mean, rstd, part_w,
                                                          part_b);
  };
  for (int64_t n = 0; n < row.samples; ++n) {
    for (int64_t begin = 0; begin < row.tokens; begin += kTokens) {
      const int64_t end = row.tokens - begin < kTokens ? row.tokens : begin + kTokens;
      int64_t t = begin;
      for (; t + 4 <= end; t += 4) add(std::integral_constant<int, 4>(), n * row.tokens + t);
      for (; t < end; ++t) add(std::integral_constant<int, 1>(), n * row.tokens + t);
      if (Scaled) add_to(grad_w, part_w, count);
      if (Shifted) add_to(grad_b, part_b, count);
    }
    if (Scaled) add_squares(squares_w, grad_w, count);
    if (Shifted) add_squares(squares_b, grad_b, count);
  }
  if (Scaled) add_scaled(row.weight_accumulator + first, squares_w, weight, count);
  if (Shifted) add_scaled(row.bias_accumulator + first, squares_b, weight, count);
}

static void per_sample_affine(const ft_affine_row& row, int64_t first, int64_t count, float weight) {
  with_dtype(row.dy, row.dy_dtype, [&](const auto* dy) {
    if (row.weight_accumulator == nullptr) {
      if (row.bias_accumulator != nullptr) affine_range<false, true>(row, dy, dy, first, count, weight);
      return;
    }
    with_dtype(row.x, row.x_dtype, [&](const auto* x) {
      if (row.bias_accumulator != nullptr) {
        affine_range<true, true>(row, x, dy, first, count, weight);
      } else {
        affine_range<true, false>(row, x, dy, first, count, weight);
      }
    });
  });
}
