// The single-threaded kernels over one range of one tensor, compiled once per instruction set and called through a table.
#pragma once

#include <cstdint>

#include "fishertune.h"

namespace ft {

struct SgvbConstants {
  float prior_precision, half_sign, half_gamma, keep1, take1, keep2, take2, step_size, inv_sqrt_bias2, eps, floor;
  uint64_t seed, noise_step;
};

struct AdamWConstants {
  float keep1, take1, keep2, take2, decay, step_size, inv_sqrt_bias2, eps, grad_scale, active_threshold;
  bool compact_grads, stochastic;
  uint64_t seed, step;
};

struct ScoreConstants {
  float fisher_scale, ratio_scale, damping, inv_count;
  bool first;
};

// Histogram counters are 32 bits wide and replicated, so that equal neighbours do not wait for each other's store.
constexpr int kReplicas = 4;

// Sums of this many channels fit the first-level cache.
constexpr int64_t kAffineChannels = 512;
// What collect_bracket and compact write is written by whole vectors: room for this many entries beyond what they return.
constexpr int64_t kSlack = 16;

constexpr uint32_t kGoldenRatio = 2654435769u;  // 2^32 / phi, odd

struct Kernels {
  const char* name;
  void (*squared_grad_accumulate)(float* accumulator, const void* grad, int64_t dtype, int64_t n, float weight);
  // Channels [first, first + count) of the row; count is at most kAffineChannels.
  void (*per_sample_affine)(const ft_affine_row& row, int64_t first, int64_t count, float weight);
  void (*gaussian_perturb)(const void* param, const float* excess, void* out, int64_t dtype, int64_t n, float prior_precision,
                           float sign, uint64_t seed, uint64_t step, uint64_t first_index);
  void (*precision_update_natural)(float* excess, const void* squared_grad, int64_t dtype, int64_t n, float keep, float take);
  void (*precision_update_sgvb)(float* excess, const void* grad, float* exp_avg, float* exp_avg_sq, int64_t dtype, int64_t n,
                                const SgvbConstants& k, uint64_t first_index);
  void (*dr_fim_score)(float* score, const void* fisher, const void* shifted, int64_t dtype, int64_t n,
                       const ScoreConstants& k);
  // `counters` holds kReplicas rows of `stride` counters; NaN goes to counter 2^bits of its row.
  void (*key_histogram)(const void* score, int64_t dtype, int64_t n, int shift, int bits, uint32_t prefix_mask,
                        uint32_t prefix, uint32_t* counters, int64_t stride);
  // One score from each stratum of `stride` elements; `first` is the stratum's number in the whole list.
  void (*sample_scores)(const void* score, int64_t dtype, int64_t n, int64_t stride, int64_t first, int64_t strata,
                        float* out);
  // Adds keys above, inside and NaN to counts[0..2]; the keys inside go to `keys` unless that is NULL. Returns their number.
  int64_t (*collect_bracket)(const void* score, int64_t dtype, int64_t n, uint32_t low, uint32_t high, uint32_t* keys,
                             int64_t* counts);
  // Writes the offsets of the scores >= value; returns their number, *equal of them being equal to it.
  int64_t (*compact)(const void* score, int64_t dtype, int64_t n, float value, uint32_t* offsets, int64_t* equal);
  // Of `n` such offsets, keeps those of larger scores and the first `ties` of the rest; returns their number.
  int64_t (*drop_ties)(const void* score, int64_t dtype, float value, int64_t ties, int64_t n, uint32_t* offsets);
  // Elements [begin, end) of the row's compact arrays.
  void (*sparse_adamw)(const ft_adamw_row& row, int64_t begin, int64_t end, const AdamWConstants& k);
  // Sum of the squares of the elements [begin, end) of the row's compact order.
  double (*selected_squares)(const ft_norm_row& row, int64_t begin, int64_t end);
};

// Null where the build has no such version.
extern const Kernels* const kPortable;
extern const Kernels* const kAvx2;
extern const Kernels* const kAvx512;

}  // namespace ft
