// One score from each run of `stride` elements: few and far apart, so one thread a score.
#pragma once

#include "device.cuh"

namespace ft {

// Runs are numbered through all tensors; first_samples[r] is the number of tensor r's first one.
__global__ void __launch_bounds__(kThreads)
    sample_scores_kernel(const ft_cuda_row* rows, int64_t n_rows, int64_t n_samples, const int64_t* first_samples, int64_t stride,
                         float* sample) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_samples; i += int64_t{gridDim.x} * kThreads) {
    const int64_t r = row_of(i, n_rows, [=](int64_t row) { return first_samples[row]; });
    const uint32_t turn = static_cast<uint32_t>(i) * 2654435769u;  // 2^32 divided by the golden ratio
    const int64_t within = static_cast<int64_t>(uint64_t{turn} * static_cast<uint64_t>(stride) >> 32);
    const int64_t place = (i - first_samples[r]) * stride + within;
    const ft_cuda_row row = rows[r];
    sample[i] = place < row.numel ? score_at(row, place) : __uint_as_float(0x7fc00000u);
  }
}

}  // namespace ft
