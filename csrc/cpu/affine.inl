// Squared per-sample gradients of what multiplies or shifts channels: sums over tokens, one range of channels at a time.

constexpr int64_t kTokens = 64;  // of a partial sum

template <class X, class Grad>
static inline void affine_sums(const X* __restrict x, const Grad* __restrict dy, int64_t count, float mean, float rstd,
                               float* __restrict sums) {
  for (int64_t c = 0; c < count; ++c) sums[c] += widen(dy[c]) * ((widen(x[c]) - mean) * rstd);
}

template <class Grad>
static inline void token_sums(const Grad* __restrict dy, int64_t count, float* __restrict sums) {
  for (int64_t c = 0; c < count; ++c) sums[c] += widen(dy[c]);
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

static void per_sample_affine(const ft_affine_row& row, int64_t first, int64_t count, float weight) {
  // Of the weight and of the bias: a block's sums, a sample's sums, and the squares of all samples.
  float part_w[kAffineChannels] = {}, grad_w[kAffineChannels] = {}, squares_w[kAffineChannels] = {};
  float part_b[kAffineChannels] = {}, grad_b[kAffineChannels] = {}, squares_b[kAffineChannels] = {};
  const bool scaled = row.weight_accumulator != nullptr, shifted = row.bias_accumulator != nullptr;
  with_dtype(row.dy, row.dy_dtype, [&](const auto* dy) {
    with_dtype(row.x, row.x_dtype, [&](const auto* x) {
      for (int64_t n = 0; n < row.samples; ++n) {
        for (int64_t begin = 0; begin < row.tokens; begin += kTokens) {
          const int64_t end = row.tokens - begin < kTokens ? row.tokens : begin + kTokens;
          for (int64_t t = begin; t < end; ++t) {
            const int64_t token = n * row.tokens + t, at = token * row.channels + first;
            if (scaled) {
              const float mean = row.mean != nullptr ? row.mean[token] : 0.0f;
              const float rstd = row.rstd != nullptr ? row.rstd[token] : 1.0f;
              affine_sums(x + at, dy + at, count, mean, rstd, part_w);
            }
            if (shifted) token_sums(dy + at, count, part_b);
          }
          if (scaled) add_to(grad_w, part_w, count);
          if (shifted) add_to(grad_b, part_b, count);
        }
        if (scaled) add_squares(squares_w, grad_w, count);
        if (shifted) add_squares(squares_b, grad_b, count);
      }
    });
  });
  if (scaled) add_scaled(row.weight_accumulator + first, squares_w, weight, count);
  if (shifted) add_scaled(row.bias_accumulator + first, squares_b, weight, count);
}
