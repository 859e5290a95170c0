// Operators that read every element once.

template <class F>
static inline void with_dtype(const void* p, int64_t dtype, F f) {
  switch (dtype) {
    case FT_BF16: return f(static_cast<const bf16*>(p));
    case FT_FP16: return f(static_cast<const fp16*>(p));
    default: return f(static_cast<const float*>(p));
  }
}

static void squared_grad_accumulate(float* __restrict accumulator, const void* grad, int64_t dtype, int64_t n, float weight) {
  with_dtype(grad, dtype, [=](const auto* __restrict g) {
    for (int64_t i = 0; i < n; ++i) {
      const float x = widen(g[i]);
      accumulator[i] += weight * (x * x);
    }
  });
}

static void gaussian_perturb(const void* param, const float* excess, void* out, int64_t dtype, int64_t n,
                             float prior_precision, float sign, uint64_t seed, uint64_t step, uint64_t first_index) {
  with_dtype(param, dtype, [=](const auto* theta) {
    auto* result = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(theta)>>*>(out);
    with_noise(seed, step, first_index, n, [=](int64_t i, int64_t m, const float* noise) {
      const auto* t = theta + i;
      const float* e = excess + i;
      auto* o = result + i;
      for (int64_t j = 0; j < m; ++j) {
        narrow(widen(t[j]) + sign * noise[j] / __builtin_sqrtf(e[j] + prior_precision), o + j);
      }
    });
  });
}

static void precision_update_natural(float* __restrict excess, const void* squared_grad, int64_t dtype, int64_t n, float keep,
                                     float take) {
  with_dtype(squared_grad, dtype, [=](const auto* __restrict f) {
    for (int64_t i = 0; i < n; ++i) excess[i] = keep * excess[i] + take * widen(f[i]);
  });
}

static void precision_update_sgvb(float* excess, const void* grad, float* exp_avg, float* exp_avg_sq, int64_t dtype, int64_t n,
                                  const SgvbConstants& constants, uint64_t first_index) {
  const SgvbConstants k = constants;
  with_dtype(grad, dtype, [=](const auto* grads) {
    with_noise(k.seed, k.noise_step, first_index, n, [=](int64_t i, int64_t m, const float* __restrict noise) {
      const auto* __restrict g = grads + i;
      float* __restrict e = excess + i;
      float* __restrict first = exp_avg + i;
      float* __restrict second = exp_avg_sq + i;
      for (int64_t j = 0; j < m; ++j) {
        const float precision = e[j] + k.prior_precision;
        const float slope =
            k.half_gamma * (e[j] / precision) - k.half_sign * noise[j] * widen(g[j]) / __builtin_sqrtf(precision);
        const float m1 = k.keep1 * first[j] + k.take1 * slope;
        const float m2 = k.keep2 * second[j] + k.take2 * (slope * slope);
        first[j] = m1;
        second[j] = m2;
        const float delta = -k.step_size * m1 / (__builtin_sqrtf(m2) * k.inv_sqrt_bias2 + k.eps);
        const float moved = e[j] + precision * exp_minus_1(delta);
        e[j] = select(moved < k.floor, k.floor, moved);
      }
    });
  });
}

static void dr_fim_score(float* __restrict score, const void* fisher, const void* shifted, int64_t dtype, int64_t n,
                         const ScoreConstants& constants) {
  const ScoreConstants k = constants;
  with_dtype(fisher, dtype, [=](const auto* __restrict f) {
    const auto* __restrict s = static_cast<decltype(f)>(shifted);
    for (int64_t i = 0; i < n; ++i) {
      const float a = widen(f[i]), b = widen(s[i]);
      const float ratio = __builtin_fabsf(a - b) / (select(a < b, a, b) + k.damping);
      // A scale of 0 drops its term even where that term is infinite.
      const float task = select(k.fisher_scale == 0.0f, 0.0f, k.fisher_scale * a);
      const float domain = select(k.ratio_scale == 0.0f, 0.0f, k.ratio_scale * ratio);
      const float now = task + domain;
      score[i] = k.first ? now : score[i] + (now - score[i]) * k.inv_count;
    }
  });
}
