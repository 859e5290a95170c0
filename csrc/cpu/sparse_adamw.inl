// AdamW on compact state. A block of elements is gathered into the first-level cache, stepped there by vector code and
// scattered back; the lines of the blocks ahead are requested meanwhile, since scattered accesses defeat the hardware prefetcher.

constexpr int64_t kGather = kRounding;
constexpr int64_t kPrefetch = 256;  // elements ahead

// Rising indices without a gap: neighbours in memory, as where whole rows are selected. Vectors and the hardware's own
// prefetcher then serve them.
template <class Index>
static inline bool is_run(const Index* at, int64_t n) {
  return n > 0 && static_cast<int64_t>(at[n - 1]) - static_cast<int64_t>(at[0]) == n - 1;
}

// Asks for the cache lines of elements to come; Write says what for.
template <int Write, class T, class Index>
static inline void request(const T* from, const Index* at, int64_t n) {
  if (is_run(at, n)) {
    for (int64_t j = 0; j < n; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + at[j], Write, 3);
  } else {
    for (int64_t j = 0; j < n; ++j) __builtin_prefetch(from + at[j], Write, 3);
  }
}

template <class T, class Index>
static inline void gather(const T* from, const Index* at, int64_t n, float* __restrict out) {
  if (is_run(at, n)) {
    const T* const __restrict run = from + at[0];
    for (int64_t j = 0; j < n; ++j) out[j] = widen(run[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = widen(from[at[j]]);
  }
}

template <class Param, class Grad, class Index>
static void adamw_range(const ft_adamw_row& row, int64_t begin, int64_t end, const AdamWConstants& constants) {
  const AdamWConstants k = constants;
  Param* const param = static_cast<Param*>(row.param);
  const Grad* const grad = static_cast<const Grad*>(row.grad);
  const Index* const index = static_cast<const Index*>(row.index);
  const bool from_grad = k.take1 > 0.5f;
  const bool stochastic = std::is_same_v<Param, bf16> && k.stochastic && row.master == nullptr;
  float p[kGather], g[kGather];
  Param rounded[kGather];
  uint32_t random[kGather];
  for (int64_t i = begin; i < end; i += kGather) {
    const int64_t n = end - i < kGather ? end - i : kGather;
    const Index* const at = index + i;
    const int64_t ahead = row.count - i - kPrefetch < kGather ? row.count - i - kPrefetch : kGather;
    request<1>(param, at + kPrefetch, ahead);
    if (k.compact_grads) {
      for (int64_t j = 0; j < n; ++j) g[j] = widen(grad[i + j]);
    } else {
      request<0>(grad, at + kPrefetch, ahead);
      gather(grad, at, n, g);
    }
    if (row.master == nullptr) {
      gather(param, at, n, p);
    } else {
      for (int64_t j = 0; j < n; ++j) p[j] = row.master[i + j];
    }
    float* const __restrict first = row.exp_avg + i;
    float* const __restrict second = row.exp_avg_sq + i;
    for (int64_t j = 0; j < n; ++j) {
      const float slope = g[j] * k.grad_scale;
      // As torch's lerp: from the end that weighs more, since a small share of a difference rounds less than a large one.
      const float m1 = from_grad ? slope - k.keep1 * (slope - first[j]) : first[j] + k.take1 * (slope - first[j]);
      const float m2 = k.keep2 * second[j] + k.take2 * (slope * slope);
      first[j] = m1;
      second[j] = m2;
      p[j] = p[j] * k.decay - k.step_size * m1 / (__builtin_sqrtf(m2) * k.inv_sqrt_bias2 + k.eps);
    }
    // Rounded in vectors first; the scatter itself only moves.
    if constexpr (std::is_same_v<Param, bf16>) {
      if (stochastic) {
        rounding_bits(k.seed, k.step, static_cast<uint64_t>(row.offset), at, n, random);
        for (int64_t j = 0; j < n; ++j) narrow_stochastic(p[j], random[j], rounded + j);
      }
    }
    if (!stochastic) {
      for (int64_t j = 0; j < n; ++j) narrow(p[j], rounded + j);
    }
    if (row.score == nullptr) {
      if (row.master != nullptr) __builtin_memcpy(row.master + i, p, static_cast<size_t>(n) * sizeof *p);
      if (is_run(at, n)) {
        __builtin_memcpy(param + at[0], rounded, static_cast<size_t>(n) * sizeof *rounded);
      } else {
        for (int64_t j = 0; j < n; ++j) param[at[j]] = rounded[j];
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        if (!(row.score[i + j] >= k.active_threshold)) continue;
        if (row.master != nullptr) row.master[i + j] = p[j];
        param[at[j]] = rounded[j];
      }
    }
  }
}

template <class Param, class Grad>
static void adamw_index(const ft_adamw_row& row, int64_t begin, int64_t end, const AdamWConstants& k) {
  if (row.index_dtype == FT_INT32) {
    adamw_range<Param, Grad, int32_t>(row, begin, end, k);
  } else {
    adamw_range<Param, Grad, int64_t>(row, begin, end, k);
  }
}

template <class Param>
static void adamw_grad(const ft_adamw_row& row, int64_t begin, int64_t end, const AdamWConstants& k) {
  switch (row.grad_dtype) {
    case FT_BF16: return adamw_index<Param, bf16>(row, begin, end, k);
    case FT_FP16: return adamw_index<Param, fp16>(row, begin, end, k);
    default: return adamw_index<Param, float>(row, begin, end, k);
  }
}

static void sparse_adamw(const ft_adamw_row& row, int64_t begin, int64_t end, const AdamWConstants& k) {
  switch (row.param_dtype) {
    case FT_BF16: return adamw_grad<bf16>(row, begin, end, k);
    case FT_FP16: return adamw_grad<fp16>(row, begin, end, k);
    default: return adamw_grad<float>(row, begin, end, k);
  }
}
