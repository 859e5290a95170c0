// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and normals by Box-Muller.

struct Words {
  uint32_t w0, w1, w2, w3;
};

static inline Words philox(uint64_t seed, uint64_t step, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
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
  return Words{c0, c1, c2, c3};
}

// 16 random bits for each of n global elements. The counter's top bit, which no normal has, makes it a stream of its own.
static void rounding_bits(uint64_t seed, uint64_t step, const uint64_t* __restrict element, int64_t n, uint32_t* __restrict out) {
  for (int64_t j = 0; j < n; ++j) {
    const uint64_t g = element[j];
    const Words w = philox(seed, step, (g >> 2) | (uint64_t{1} << 63));
    const uint32_t even = (g & 2u) != 0 ? w.w2 : w.w0, odd = (g & 2u) != 0 ? w.w3 : w.w1;
    out[j] = ((g & 1u) != 0 ? odd : even) >> 16;
  }
}

constexpr int kNoiseCounters = 64;
constexpr int kNoise = 4 * kNoiseCounters;

static inline float unit_interval(uint32_t r) { return (static_cast<float>(static_cast<int32_t>(r >> 8)) + 0.5f) * 0x1p-24f; }

// kNoise normals for the global elements 4 * counter, 4 * counter + 1, ...
static void normals(uint64_t seed, uint64_t step, uint64_t counter, float* out) {
  uint32_t r[4][kNoiseCounters];
  for (int j = 0; j < kNoiseCounters; ++j) {
    const Words w = philox(seed, step, counter + static_cast<uint64_t>(j));
    r[0][j] = w.w0;
    r[1][j] = w.w1;
    r[2][j] = w.w2;
    r[3][j] = w.w3;
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
