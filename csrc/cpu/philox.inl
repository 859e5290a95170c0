// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and normals by Box-Muller.

// Compilers turn a product of two 32-bit numbers that keeps 64 bits into full 64-bit multiplications, three times the work
// where they have them at all, so the rounding bits name the instruction. Upper halves of its operands may hold anything.
#if defined(__AVX512F__)
constexpr int kWide = 8;
#elif defined(__AVX2__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif
typedef uint64_t Wide __attribute__((vector_size(8 * kWide)));

static inline Wide product(Wide a, uint32_t factor) {
  const Wide b = Wide{} + factor;
#if defined(__AVX512F__)
  // The unmasked form makes gcc 12 warn about its own header.
  return reinterpret_cast<Wide>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

constexpr int kRounding = 128;

// 16 random bits for each of n <= kRounding global elements first + index[j]. The counter's top bit, which no normal has, makes
// it a stream of its own.
template <class Index>
static void rounding_bits(uint64_t seed, uint64_t step, uint64_t first, const Index* index, int64_t n, uint32_t* __restrict out) {
  uint64_t element[kRounding] = {};
  for (int64_t j = 0; j < n; ++j) element[j] = first + static_cast<uint64_t>(index[j]);
  for (int j = 0; j < kRounding; j += kWide) {
    Wide g;
    __builtin_memcpy(&g, element + j, sizeof g);
    Wide c0 = g >> 2, c1 = (g >> 34) | 0x80000000u, c2 = Wide{} + static_cast<uint32_t>(step), c3 = Wide{} + (step >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Wide p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Wide even = (g & 2) != 0 ? c2 : c0, odd = (g & 2) != 0 ? c3 : c1;
    const Wide word = (((g & 1) != 0 ? odd : even) & 0xffffffffu) >> 16;
    for (int lane = 0; lane < kWide; ++lane) out[j + lane] = static_cast<uint32_t>(word[lane]);
  }
}

constexpr int kNoiseCounters = 64;
constexpr int kNoise = 4 * kNoiseCounters;

static inline float unit_interval(uint32_t r) { return (static_cast<float>(static_cast<int32_t>(r >> 8)) + 0.5f) * 0x1p-24f; }

// kNoise normals for the global elements 4 * counter, 4 * counter + 1, ...
static void normals(uint64_t seed, uint64_t step, uint64_t counter, float* out) {
  uint32_t r[4][kNoiseCounters];
  for (int j = 0; j < kNoiseCounters; ++j) {
    uint32_t c0 = static_cast<uint32_t>(counter + j), c1 = static_cast<uint32_t>((counter + j) >> 32);
    uint32_t c2 = static_cast<uint32_t>(step), c3 = static_cast<uint32_t>(step >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      const uint32_t hi0 = static_cast<uint32_t>(p0 >> 32), hi1 = static_cast<uint32_t>(p1 >> 32);
      c0 = hi1 ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = hi0 ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    r[0][j] = c0;
    r[1][j] = c1;
    r[2][j] = c2;
    r[3][j] = c3;
  }
  for (int j = 0; j < kNoiseCounters; ++j) {
    for (int pair = 0; pair < 2; ++pair) {
      float c, s;
      cos_sin_turns(unit_interval(r[2 * pair + 1][j]), &c, &s);
      const float radius = __builtin_sqrtf(-2.0f * log_positive(unit_interval(r[2 * pair][j])));
      out[4 * j + 2 * pair] = radius * c;
      out[4 * j + 2 * pair + 1] = radius * s;
    }
  }
}

// Calls body(i, m, noise) for pieces [i, i + m) of n elements, noise[j] being the draw of global element first + i + j.
template <class Body>
static inline void with_noise(uint64_t seed, uint64_t step, uint64_t first, int64_t n, Body body) {
  float noise[kNoise];
  for (int64_t i = 0; i < n;) {
    const uint64_t g = first + static_cast<uint64_t>(i);
    const int64_t skip = static_cast<int64_t>(g & 3u);
    const int64_t m = n - i < kNoise - skip ? n - i : kNoise - skip;
    normals(seed, step, g >> 2, noise);
    body(i, m, noise + skip);
    i += m;
  }
}
