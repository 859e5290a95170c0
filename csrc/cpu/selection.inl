// Histogram of order-preserving keys, and compaction of what lies above a threshold.

constexpr int64_t kBlock = 1024;  // 16-bit scores are widened by blocks of this many, which stay in the first-level cache

template <class F>
static inline void with_fp32_blocks(const void* score, int64_t dtype, int64_t n, F f) {
  if (dtype == FT_FP32) return f(static_cast<const float*>(score), int64_t{0}, n);
  float block[kBlock];
  with_dtype(score, dtype, [&](const auto* s) {
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t m = n - i < kBlock ? n - i : kBlock;
      for (int64_t j = 0; j < m; ++j) block[j] = widen(s[i + j]);
      f(block, i, m);
    }
  });
}

static inline bool is_nan(uint32_t u) { return (u & 0x7fffffffu) > 0x7f800000u; }

static inline uint32_t key_of(uint32_t u) {
  u = u == 0x80000000u ? 0u : u;
  return u ^ (static_cast<uint32_t>(static_cast<int32_t>(u) >> 31) | 0x80000000u);
}

#if defined(__AVX512F__)
static inline __m512i key_of(__m512i u) {
  const __m512i high = _mm512_set1_epi32(INT32_MIN);
  u = _mm512_maskz_mov_epi32(_mm512_cmpneq_epi32_mask(u, high), u);
  return _mm512_xor_si512(u, _mm512_or_si512(_mm512_srai_epi32(u, 31), high));
}
#elif defined(__AVX2__)
static inline __m256i key_of(__m256i u) {
  const __m256i high = _mm256_set1_epi32(INT32_MIN);
  u = _mm256_andnot_si256(_mm256_cmpeq_epi32(u, high), u);
  return _mm256_xor_si256(u, _mm256_or_si256(_mm256_srai_epi32(u, 31), high));
}
#endif

static void histogram_all(const float* x, int64_t n, int shift, int bits, uint32_t* h, int64_t stride) {
  const uint32_t mask = (1u << bits) - 1u, nan_bin = 1u << bits;
  uint32_t *h0 = h, *h1 = h + stride, *h2 = h + 2 * stride, *h3 = h + 3 * stride;
  int64_t i = 0;
#if defined(__AVX2__)
  const __m128i by = _mm_cvtsi32_si128(shift);
  const __m256i vmask = _mm256_set1_epi32(static_cast<int>(mask)), vnan = _mm256_set1_epi32(static_cast<int>(nan_bin));
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    __m256i u = _mm256_castps_si256(v);
    const __m256i high = _mm256_set1_epi32(INT32_MIN);
    u = _mm256_andnot_si256(_mm256_cmpeq_epi32(u, high), u);
    const __m256i key = _mm256_xor_si256(u, _mm256_or_si256(_mm256_srai_epi32(u, 31), high));
    __m256i bin = _mm256_and_si256(_mm256_srl_epi32(key, by), vmask);
    bin = _mm256_blendv_epi8(bin, vnan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    const uint64_t a = static_cast<uint64_t>(_mm256_extract_epi64(bin, 0)), b = static_cast<uint64_t>(_mm256_extract_epi64(bin, 1));
    const uint64_t c = static_cast<uint64_t>(_mm256_extract_epi64(bin, 2)), d = static_cast<uint64_t>(_mm256_extract_epi64(bin, 3));
    ++h0[static_cast<uint32_t>(a)];
    ++h1[a >> 32];
    ++h2[static_cast<uint32_t>(b)];
    ++h3[b >> 32];
    ++h0[static_cast<uint32_t>(c)];
    ++h1[c >> 32];
    ++h2[static_cast<uint32_t>(d)];
    ++h3[d >> 32];
  }
#else
  for (; i + 4 <= n; i += 4) {
    const uint32_t a = bits_of(x[i]), b = bits_of(x[i + 1]), c = bits_of(x[i + 2]), d = bits_of(x[i + 3]);
    ++h0[is_nan(a) ? nan_bin : (key_of(a) >> shift) & mask];
    ++h1[is_nan(b) ? nan_bin : (key_of(b) >> shift) & mask];
    ++h2[is_nan(c) ? nan_bin : (key_of(c) >> shift) & mask];
    ++h3[is_nan(d) ? nan_bin : (key_of(d) >> shift) & mask];
  }
#endif
  for (; i < n; ++i) {
    const uint32_t u = bits_of(x[i]);
    ++h0[is_nan(u) ? nan_bin : (key_of(u) >> shift) & mask];
  }
}

// Few elements carry the prefix: find them by the vector, count them one by one.
static void histogram_prefix(const float* x, int64_t n, int shift, int bits, uint32_t prefix_mask, uint32_t prefix, uint32_t* h,
                             int64_t stride) {
  const uint32_t mask = (1u << bits) - 1u, nan_bin = 1u << bits;
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i vm = _mm512_set1_epi32(static_cast<int>(prefix_mask)), vp = _mm512_set1_epi32(static_cast<int>(prefix));
  int64_t nans = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t hits = 0, unordered = 0;
    for (int part = 0; part < 4; ++part) {
      const __m512 v = _mm512_loadu_ps(x + i + 16 * part);
      const __m512i key = key_of(_mm512_castps_si512(v));
      hits |= static_cast<uint64_t>(_mm512_cmpeq_epi32_mask(_mm512_and_si512(key, vm), vp)) << (16 * part);
      unordered |= static_cast<uint64_t>(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q)) << (16 * part);
    }
    nans += __builtin_popcountll(unordered);
    for (hits &= ~unordered; hits != 0; hits &= hits - 1) {
      const int j = __builtin_ctzll(hits);
      ++h[(j & 3) * stride + ((key_of(bits_of(x[i + j])) >> shift) & mask)];
    }
  }
  h[nan_bin] += static_cast<uint32_t>(nans);
#elif defined(__AVX2__)
  const __m256i vm = _mm256_set1_epi32(static_cast<int>(prefix_mask)), vp = _mm256_set1_epi32(static_cast<int>(prefix));
  int64_t nans = 0;
  for (; i + 32 <= n; i += 32) {
    uint32_t hits = 0, unordered = 0;
    for (int part = 0; part < 4; ++part) {
      const __m256 v = _mm256_loadu_ps(x + i + 8 * part);
      const __m256i match = _mm256_cmpeq_epi32(_mm256_and_si256(key_of(_mm256_castps_si256(v)), vm), vp);
      hits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(match))) << (8 * part);
      unordered |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q))) << (8 * part);
    }
    nans += __builtin_popcount(unordered);
    for (hits &= ~unordered; hits != 0; hits &= hits - 1) {
      const int j = __builtin_ctz(hits);
      ++h[(j & 3) * stride + ((key_of(bits_of(x[i + j])) >> shift) & mask)];
    }
  }
  h[nan_bin] += static_cast<uint32_t>(nans);
#endif
  for (; i < n; ++i) {
    const uint32_t u = bits_of(x[i]), key = key_of(u);
    if (is_nan(u)) {
      ++h[nan_bin];
    } else if ((key & prefix_mask) == prefix) {
      ++h[(i & 3) * stride + ((key >> shift) & mask)];
    }
  }
}

static void key_histogram(const void* score, int64_t dtype, int64_t n, int shift, int bits, uint32_t prefix_mask,
                          uint32_t prefix, uint32_t* counters, int64_t stride) {
  with_fp32_blocks(score, dtype, n, [=](const float* x, int64_t, int64_t m) {
    if (prefix_mask == 0) {
      histogram_all(x, m, shift, bits, counters, stride);
    } else {
      histogram_prefix(x, m, shift, bits, prefix_mask, prefix, counters, stride);
    }
  });
}

// One bit per score: is it at least `value`? The scores are read once; indices come from the bits.
static void mark_selected(const void* score, int64_t dtype, int64_t n, float value, uint64_t* marks, int64_t* above,
                          int64_t* equal) {
  int64_t kept = 0, ties = 0;
  with_fp32_blocks(score, dtype, n, [&](const float* x, int64_t offset, int64_t m) {
    uint64_t* const out = marks + offset / 64;
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 v = _mm512_set1_ps(value);
    for (; i + 64 <= m; i += 64) {
      uint64_t bits = 0, tied = 0;
      for (int part = 0; part < 4; ++part) {
        const __m512 s = _mm512_loadu_ps(x + i + 16 * part);
        bits |= static_cast<uint64_t>(_mm512_cmp_ps_mask(s, v, _CMP_GE_OQ)) << (16 * part);
        tied |= static_cast<uint64_t>(_mm512_cmp_ps_mask(s, v, _CMP_EQ_OQ)) << (16 * part);
      }
      out[i / 64] = bits;
      kept += __builtin_popcountll(bits);
      ties += __builtin_popcountll(tied);
    }
#elif defined(__AVX2__)
    const __m256 v = _mm256_set1_ps(value);
    for (; i + 64 <= m; i += 64) {
      uint64_t bits = 0, tied = 0;
      for (int part = 0; part < 8; ++part) {
        const __m256 s = _mm256_loadu_ps(x + i + 8 * part);
        bits |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(s, v, _CMP_GE_OQ))) << (8 * part);
        tied |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(s, v, _CMP_EQ_OQ))) << (8 * part);
      }
      out[i / 64] = bits;
      kept += __builtin_popcountll(bits);
      ties += __builtin_popcountll(tied);
    }
#endif
    for (; i < m; i += 64) {
      const int64_t end = m - i < 64 ? m - i : 64;
      uint64_t bits = 0;
      for (int64_t j = 0; j < end; ++j) {
        bits |= static_cast<uint64_t>(x[i + j] >= value) << j;
        ties += x[i + j] == value;
      }
      out[i / 64] = bits;
      kept += __builtin_popcountll(bits);
    }
  });
  *above = kept - ties;
  *equal = ties;
}

// Unmarks every score equal to `value` after the first `ties` of them.
static void unmark_ties(const void* score, int64_t dtype, int64_t n, float value, int64_t ties, uint64_t* marks) {
  with_fp32_blocks(score, dtype, n, [&](const float* x, int64_t offset, int64_t m) {
    for (int64_t i = 0; i < m; i += 64) {
      for (uint64_t bits = marks[(offset + i) / 64]; bits != 0; bits &= bits - 1) {
        const int j = __builtin_ctzll(bits);
        if (x[i + j] == value && --ties < 0) marks[(offset + i) / 64] &= ~(uint64_t{1} << j);
      }
    }
  });
}

template <class Index>
static void expand(const uint64_t* marks, int64_t n_words, int64_t base, Index* out) {
  for (int64_t w = 0; w < n_words; ++w, base += 64) {
    uint64_t bits = marks[w];
#if defined(__AVX512F__)
    if constexpr (sizeof(Index) == 4) {
      const __m512i ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      for (int part = 0; bits != 0; ++part, bits >>= 16) {
        const __mmask16 keep = static_cast<__mmask16>(bits);
        const int kept = __builtin_popcount(keep);
        const __m512i index = _mm512_add_epi32(ramp, _mm512_set1_epi32(static_cast<int32_t>(base + 16 * part)));
        // Exactly `kept` lanes: another thread may own the memory behind them.
        _mm512_mask_storeu_epi32(out, static_cast<__mmask16>((1u << kept) - 1u), _mm512_maskz_compress_epi32(keep, index));
        out += kept;
      }
    }
#endif
    for (; bits != 0; bits &= bits - 1) *out++ = static_cast<Index>(base + __builtin_ctzll(bits));
  }
}

static void write_marked(const uint64_t* marks, int64_t n, int64_t base, void* index, int64_t index_dtype) {
  if (index_dtype == FT_INT32) {
    expand(marks, (n + 63) / 64, base, static_cast<int32_t*>(index));
  } else {
    expand(marks, (n + 63) / 64, base, static_cast<int64_t*>(index));
  }
}
