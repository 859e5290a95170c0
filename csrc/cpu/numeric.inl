// Widening, rounding and the few elementary functions the kernels need, as branch-free code that compilers vectorise.
// Everything is in the including file's instruction-set namespace and static: a copy built for AVX-512 must never be linked
// into the portable path.

static inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

static inline float from_bits(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

static inline float widen(float x) { return x; }

static inline float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

static inline float widen(fp16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Rebias by 112; infinities and NaN by 224, so that their exponent ends at 255.
  uint32_t u = magnitude + (112u << 23);
  u = magnitude >= (0x7c00u << 13) ? u + (112u << 23) : u;
  // Subnormal halves: 2^-14 * (1 + mantissa) - 2^-14 is exact.
  const float subnormal = from_bits(magnitude + (113u << 23)) - from_bits(113u << 23);
  u = magnitude < (0x0400u << 13) ? bits_of(subnormal) : u;
  return from_bits(u | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

static inline void narrow(float x, float* out) { *out = x; }

static inline void narrow(float x, bf16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

// Up in magnitude if the 16 bits dropped plus 16 random ones carry. A finite value stays finite; NaN becomes the quiet one.
static inline void narrow_stochastic(float x, uint32_t random, bf16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t down = u >> 16, moved = (u + random) >> 16;
  uint32_t h = (moved & 0x7f80u) == 0x7f80u ? down : moved;
  h = (u & 0x7f800000u) == 0x7f800000u ? down : h;
  h = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : h;
  out->bits = static_cast<uint16_t>(h);
}

static inline void narrow(float x, fp16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the result's subnormal mantissa, rounded to nearest even, in the low bits.
  const uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t h = magnitude < (113u << 23) ? subnormal : normal;
  h = magnitude >= (143u << 23) ? 0x7c00u : h;  // 65536 and beyond; 65520 to 65536 carry into infinity by themselves
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  out->bits = static_cast<uint16_t>(h | sign);
}

static inline float select(bool condition, float yes, float no) { return condition ? yes : no; }

// ln(x) for normal positive x, to 1 ulp (polynomial of Cephes' logf).
static inline float log_positive(float x) {
  const uint32_t u = bits_of(x);
  const int32_t shifted = static_cast<int32_t>(u - 0x3f3504f3u) >> 23;  // mantissa ends in [sqrt(1/2), sqrt(2))
  const float e = static_cast<float>(shifted);
  const float f = from_bits(u - (static_cast<uint32_t>(shifted) << 23)) - 1.0f;
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float y = f * z * p;
  y = y - 2.12194440e-4f * e;
  y = y - 0.5f * z;
  return f + y + 0.693359375f * e;
}

// cos(2 pi u) and sin(2 pi u) for u in [0, 1]; the reduction to an eighth of a turn is exact.
static inline void cos_sin_turns(float u, float* cosine, float* sine) {
  const float quarters = u * 4.0f;
  const int32_t q = static_cast<int32_t>(quarters + 0.5f);
  const float r = (quarters - static_cast<float>(q)) * 1.57079632679f;
  const float z = r * r;
  const float s = r + r * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float c = 1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const bool swap = (q & 1) != 0;
  const uint32_t flip_cos = static_cast<uint32_t>((q + 1) & 2) << 30;
  const uint32_t flip_sin = static_cast<uint32_t>(q & 2) << 30;
  *cosine = from_bits(bits_of(select(swap, s, c)) ^ flip_cos);
  *sine = from_bits(bits_of(select(swap, c, s)) ^ flip_sin);
}

// exp(x) - 1 to about 2 ulp, without cancellation near 0; saturates outside [-87, 88].
static inline float exp_minus_1(float x) {
  x = select(x < -87.0f, -87.0f, x);
  x = select(x > 88.0f, 88.0f, x);
  const float t = x * 1.44269504089f;
  const int32_t n = static_cast<int32_t>(t + select(t < 0.0f, -0.5f, 0.5f));
  const float nf = static_cast<float>(n);
  const float r = (x - nf * 0.693359375f) + nf * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r;
  const float scale = from_bits(static_cast<uint32_t>(n + 127) << 23);
  return scale * p + (scale - 1.0f);
}
