// Counts of one digit of the keys: a block counts in shared memory, then adds to the result by integer atomics, which are
// exact in any order.
#pragma once

#include "device.cuh"

namespace ft {

constexpr int kSharedBits = 11;
constexpr int kReplicas = 4;  // by lane, in neighbouring banks: at most eight lanes meet at one address

// Adds to counts[0 ... 2^bits]. Up to kSharedBits wide digits are counted in shared memory, wider ones in the result itself.
template <bool kInShared>
__global__ void __launch_bounds__(kThreads)
    key_histogram_kernel(const ft_cuda_row* rows, int64_t n_rows, int64_t n_tiles, int shift, int bits, uint32_t prefix_mask,
                         uint32_t prefix, unsigned long long* counts) {
  FT_SHARED(uint32_t, counters, kInShared ? kReplicas * ((1 << kSharedBits) + 1) : 1);
  const uint32_t digit_mask = (1u << bits) - 1, nan_bin = 1u << bits;
  if constexpr (kInShared) {
    for (uint32_t i = threadIdx.x; i < kReplicas * (nan_bin + 1); i += kThreads) counters[i] = 0;
    __syncthreads();
  }
  const uint32_t replica = threadIdx.x % kReplicas;
  for_tiles(rows, n_rows, n_tiles, [&](int64_t, const ft_cuda_row& row, int64_t, int64_t start) {
    for_scores(row, start, [&](int, int, float score, bool valid) {
      const bool nan = score != score;
      const uint32_t key = ordered_key(score);
      const uint32_t bin = nan ? nan_bin : (key >> shift) & digit_mask;
      if (valid && (nan || (key & prefix_mask) == prefix)) {
        if constexpr (kInShared) {
          atomicAdd(&counters[bin * kReplicas + replica], 1u);
        } else {
          atomicAdd(&counts[bin], 1ull);
        }
      }
    });
  });
  if constexpr (kInShared) {
    __syncthreads();
    for (uint32_t bin = threadIdx.x; bin <= nan_bin; bin += kThreads) {
      unsigned long long found = 0;
      for (int r = 0; r < kReplicas; ++r) found += counters[bin * kReplicas + r];
      if (found != 0) atomicAdd(&counts[bin], found);
    }
  }
}

}  // namespace ft
