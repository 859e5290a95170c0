// One read of the scores: how many lie above a bracket of keys, how many inside and how many are NaN, tensor by tensor, and
// the keys inside.
#pragma once

#include "device.cuh"

namespace ft {

// A warp's candidates wait in shared memory until they may not have room for another tile's: one global atomic for many.
constexpr int kWarpCandidates = 768;
static_assert(kWarpCandidates >= 32 * kItems, "the buffer must hold a warp's whole tile");

// Adds to counts (n_rows, 3) and to *n_candidates, which goes on counting past the capacity.
__global__ void __launch_bounds__(kThreads)
    collect_bracket_kernel(const ft_cuda_row* rows, int64_t n_rows, int64_t n_tiles, uint32_t low, uint32_t high,
                           unsigned long long* counts, int64_t* candidates, int64_t capacity,
                           unsigned long long* n_candidates) {
  FT_SHARED(uint32_t, keys, kWarps * kWarpCandidates);
  uint32_t* const waiting_keys = keys + warp_id() * kWarpCandidates;
  const int lane = lane_id();
  int waiting = 0;  // the same in all lanes, as `inside`; the other counts are of this thread
  unsigned above = 0, inside = 0, nans = 0;
  int64_t current = -1;

  const auto hand_in_candidates = [&] {
    unsigned long long first = 0;
    if (lane == 0) first = atomicAdd(n_candidates, static_cast<unsigned long long>(waiting));
    first = __shfl_sync(kFullWarp, first, 0);
    __syncwarp();  // what the other lanes put there is seen
    for (int i = lane; i < waiting; i += 32) {
      const int64_t place = static_cast<int64_t>(first) + i;
      if (place < capacity) candidates[place] = current << 32 | waiting_keys[i];
    }
    __syncwarp();  // and is read before it is overwritten
    waiting = 0;
  };
  const auto hand_in_counts = [&] {
    const unsigned found[3] = {__reduce_add_sync(kFullWarp, above), inside, __reduce_add_sync(kFullWarp, nans)};
    if (lane == 0) {
      for (int i = 0; i < 3; ++i) {
        if (found[i] != 0) atomicAdd(&counts[3 * current + i], static_cast<unsigned long long>(found[i]));
      }
    }
    above = inside = nans = 0;
  };

  for_tiles(rows, n_rows, n_tiles, [&](int64_t r, const ft_cuda_row& row, int64_t, int64_t start) {
    const bool new_tensor = r != current;
    if (waiting != 0 && (new_tensor || waiting + 32 * kItems > kWarpCandidates)) hand_in_candidates();
    if (new_tensor && current >= 0) hand_in_counts();
    current = r;
    for_scores(row, start, [&](int, int, float score, bool valid) {
      const bool number = valid && score == score;
      const uint32_t key = ordered_key(score);
      above += number && key > high;
      nans += valid && !number;
      const bool candidate = number && key >= low && key <= high;
      const unsigned found = __ballot_sync(kFullWarp, candidate);
      if (candidate) waiting_keys[waiting + __popc(found & ((1u << lane) - 1))] = key;
      waiting += __popc(found);
      inside += __popc(found);
    });
  });
  if (waiting != 0) hand_in_candidates();
  if (current >= 0) hand_in_counts();
}

}  // namespace ft
