// Order-preserving keys: their histogram, a sample, what lies in a bracket of them, compaction of what lies above one.

constexpr int64_t kBlock = 1024;  // 16-bit scores are widened by blocks of this many, which stay in the first-level cache
// Elements between a load and its prefetch, a page: the hardware's own prefetch ends at each page.
constexpr int64_t kAhead = 1024;

static inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

template <class F>
static inline void with_fp32_blocks(const void* score, int64_t dtype, int64_t n, F f) {
  if (dtype == FT_FP32) return f(static_cast<const float*>(score), int64_t{0}, n);
  float block[kBlock];
  with_dtype(score, dtype, [&](const auto* s) {
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t m = n - i < kBlock ? n - i : kBlock;
      for (int64_t j = 0; j < m; j += 32) prefetch(s + i + kBlock + j);
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

// out[j] = an element of the stratum first + j of the whole list, which begins at element `j * stride` of these n, or NaN
// where the last, shorter stratum has none. Multiples of the golden ratio place it: spread evenly, in step with no period.
static void sample_scores(const void* score, int64_t dtype, int64_t n, int64_t stride, int64_t first, int64_t strata,
                          float* out) {
  with_dtype(score, dtype, [=](const auto* s) {
    for (int64_t j = 0; j < strata; ++j) {
      const uint64_t turn = static_cast<uint32_t>(static_cast<uint64_t>(first + j) * kGoldenRatio);
      const int64_t i = j * stride + static_cast<int64_t>((turn * static_cast<uint64_t>(stride)) >> 32);
      out[j] = i < n ? widen(s[i]) : from_bits(0x7fc00000u);
    }
  });
}

// Adds to counts[0..2] the keys above `high`, those in [low, high] and the NaN; with Store, writes the keys inside.
template <bool Store>
static int64_t collect_keys(const void* score, int64_t dtype, int64_t n, uint32_t low, uint32_t high, uint32_t* keys,
                            int64_t* counts) {
  int64_t above = 0, inside = 0, nans = 0;
  with_fp32_blocks(score, dtype, n, [&](const float* x, int64_t, int64_t m) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i vlow = _mm512_set1_epi32(static_cast<int>(low)), vhigh = _mm512_set1_epi32(static_cast<int>(high));
    for (; i + 64 <= m; i += 64) {
      uint64_t over = 0, in = 0, unordered = 0;
      for (int part = 0; part < 4; ++part) {
        prefetch(x + i + 16 * part + kAhead);
        const __m512 v = _mm512_loadu_ps(x + i + 16 * part);
        const __m512i key = key_of(_mm512_castps_si512(v));
        const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
        const __mmask16 reached = _mm512_mask_cmpge_epu32_mask(number, key, vlow);
        const __mmask16 passed = _mm512_mask_cmpgt_epu32_mask(number, key, vhigh);
        const __mmask16 between = static_cast<__mmask16>(reached & ~passed);
        if (Store) {
          _mm512_storeu_si512(keys + inside, _mm512_maskz_compress_epi32(between, key));
          inside += __builtin_popcount(between);
        }
        over |= static_cast<uint64_t>(passed) << (16 * part);
        in |= static_cast<uint64_t>(between) << (16 * part);
        unordered |= static_cast<uint64_t>(static_cast<__mmask16>(~number)) << (16 * part);
      }
      above += __builtin_popcountll(over);
      if (!Store) inside += __builtin_popcountll(in);
      nans += __builtin_popcountll(unordered);
    }
#elif defined(__AVX2__)
    // AVX2 compares signed integers only: both sides lose the top bit that makes keys unsigned.
    const __m256i top = _mm256_set1_epi32(INT32_MIN);
    const __m256i vlow = _mm256_set1_epi32(static_cast<int>(low ^ 0x80000000u)), vhigh = _mm256_set1_epi32(static_cast<int>(high ^ 0x80000000u));
    for (; i + 64 <= m; i += 64) {
      uint64_t over = 0, under = 0, unordered = 0;
      for (int part = 0; part < 8; ++part) {
        if (part % 2 == 0) prefetch(x + i + 8 * part + kAhead);
        const __m256 v = _mm256_loadu_ps(x + i + 8 * part);
        const __m256i key = _mm256_xor_si256(key_of(_mm256_castps_si256(v)), top);
        const auto bits = [part](__m256 mask) { return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(mask))) << (8 * part); };
        over |= bits(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, vhigh)));
        under |= bits(_mm256_castsi256_ps(_mm256_cmpgt_epi32(vlow, key)));
        unordered |= bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      }
      above += __builtin_popcountll(over & ~unordered);
      nans += __builtin_popcountll(unordered);
      uint64_t in = ~(over | under | unordered);
      if (!Store) inside += __builtin_popcountll(in);
      if (Store) {
        for (; in != 0; in &= in - 1) keys[inside++] = key_of(bits_of(x[i + __builtin_ctzll(in)]));
      }
    }
#endif
    for (; i < m; ++i) {
      const uint32_t u = bits_of(x[i]), key = key_of(u);
      const bool number = !is_nan(u), between = number && key >= low && key <= high;
      if (Store) keys[inside] = key;
      inside += between;
      above += number && key > high;
      nans += !number;
    }
  });
  counts[0] += above;
  counts[1] += inside;
  counts[2] += nans;
  return inside;
}

static int64_t collect_bracket(const void* score, int64_t dtype, int64_t n, uint32_t low, uint32_t high, uint32_t* keys,
                               int64_t* counts) {
  return keys == nullptr ? collect_keys<false>(score, dtype, n, low, high, keys, counts)
                         : collect_keys<true>(score, dtype, n, low, high, keys, counts);
}

// Offsets of the scores that are at least `value`, and how many of them equal it.
static int64_t compact(const void* score, int64_t dtype, int64_t n, float value, uint32_t* offsets, int64_t* equal) {
  int64_t kept = 0, ties = 0;
  with_fp32_blocks(score, dtype, n, [&](const float* x, int64_t begin, int64_t m) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 least = _mm512_set1_ps(value);
    const __m512i sixteen = _mm512_set1_epi32(16);
    __m512i offset = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                      _mm512_set1_epi32(static_cast<int>(begin)));
    for (; i + 64 <= m; i += 64) {
      uint64_t tied = 0;
      for (int part = 0; part < 4; ++part) {
        prefetch(x + i + 16 * part + kAhead);
        const __m512 v = _mm512_loadu_ps(x + i + 16 * part);
        const __mmask16 reached = _mm512_cmp_ps_mask(v, least, _CMP_GE_OQ);
        tied |= static_cast<uint64_t>(_mm512_cmp_ps_mask(v, least, _CMP_EQ_OQ)) << (16 * part);
        _mm512_storeu_si512(offsets + kept, _mm512_maskz_compress_epi32(reached, offset));
        kept += __builtin_popcount(reached);
        offset = _mm512_add_epi32(offset, sixteen);
      }
      ties += __builtin_popcountll(tied);
    }
#elif defined(__AVX2__)
    const __m256 least = _mm256_set1_ps(value);
    for (; i + 64 <= m; i += 64) {
      uint64_t reached = 0, tied = 0;
      for (int part = 0; part < 8; ++part) {
        if (part % 2 == 0) prefetch(x + i + 8 * part + kAhead);
        const __m256 v = _mm256_loadu_ps(x + i + 8 * part);
        reached |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, least, _CMP_GE_OQ))) << (8 * part);
        tied |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, least, _CMP_EQ_OQ))) << (8 * part);
      }
      ties += __builtin_popcountll(tied);
      const int found = __builtin_popcountll(reached);
      // Four at once, wanted or not: how many there are is a branch that cannot be foretold.
      for (int64_t j = kept; reached != 0; j += 4) {
        for (int lane = 0; lane < 4; ++lane) {
          offsets[j + lane] = static_cast<uint32_t>(begin + i) + static_cast<uint32_t>(_tzcnt_u64(reached));
          reached &= reached - 1;
        }
      }
      kept += found;
    }
#endif
    for (; i < m; ++i) {
      offsets[kept] = static_cast<uint32_t>(begin + i);
      kept += x[i] >= value;
      ties += x[i] == value;
    }
  });
  *equal = ties;
  return kept;
}

// Takes out of `n` offsets those of scores equal to `value`, except the first `ties`.
static int64_t drop_ties(const void* score, int64_t dtype, float value, int64_t ties, int64_t n, uint32_t* offsets) {
  int64_t kept = 0;
  with_dtype(score, dtype, [&](const auto* s) {
    for (int64_t i = 0; i < n; ++i) {
      const bool tied = widen(s[offsets[i]]) == value;
      offsets[kept] = offsets[i];
      kept += !tied || ties > 0;
      ties -= tied;
    }
  });
  return kept;
}
