// What the kernels share: lists of tensors cut into tiles, 16-byte loads, keys, scans.
//
// A tile is kTile consecutive elements of one tensor, the last one of a tensor shorter; tiles are numbered through all
// tensors. A block takes a contiguous run of tiles, so it looks its first tensor up once and then walks on.
//
// The same source is compiled as ordinary C++ by tests/kernels/cuda/emulator, which runs every thread as a fiber in random
// order. So: shared memory is declared by FT_SHARED at the top of a kernel, warps are whole, masks are full.
#pragma once

#include <cstdint>

#include "fishertune.h"
#include "launch.cuh"

namespace ft {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 16;  // elements of a tile that belong to one thread
constexpr int kTile = kThreads * kItems;
constexpr int64_t kMaxBlockElements = int64_t{1} << 31;  // a block's 32-bit counters hold this many

constexpr unsigned kFullWarp = 0xffffffffu;

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(Fp16 x) { return half_bits_to_float(x.bits); }

// The scores' order as unsigned integers; adding zero turns -0 into +0 and changes nothing else.
__device__ __forceinline__ uint32_t ordered_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

template <class T>
__device__ __forceinline__ float element(const uint4& raw, int i) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else {
    return widen(T{static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))});
  }
}

// use(item, offset, score, valid) for the kItems elements of a tile that are this thread's: offset counts from the tile's
// first element and rises with item; every sizeof(uint4) / sizeof(T) items are neighbours. All threads make all calls, so
// that `use` may vote; beyond the tensor's end `valid` is false.
template <class T, class Use>
__device__ __forceinline__ void for_scores(const T* tile, int64_t remaining, Use use) {
  constexpr int kWidth = sizeof(uint4) / sizeof(T), kVectors = kItems / kWidth, kStride = kThreads * kWidth;
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  if (remaining >= kTile && reinterpret_cast<uintptr_t>(tile) % sizeof(uint4) == 0) {
    uint4 raw[kVectors];  // all loads are under way before the first is used
#pragma unroll
    for (int v = 0; v < kVectors; ++v) raw[v] = __ldg(reinterpret_cast<const uint4*>(tile + v * kStride + first));
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int offset = item / kWidth * kStride + first + item % kWidth;
      use(item, offset, element<T>(raw[item / kWidth], item % kWidth), true);
    }
  } else {
#pragma unroll 1
    for (int item = 0; item < kItems; ++item) {
      const int offset = item / kWidth * kStride + first + item % kWidth;
      const bool valid = offset < remaining;
      use(item, offset, valid ? widen(tile[offset]) : 0.0f, valid);
    }
  }
}

template <class Use>
__device__ __forceinline__ void for_scores(const ft_cuda_row& row, int64_t start, Use use) {
  const int64_t remaining = row.numel - start;
  if (row.dtype == FT_FP32) {
    for_scores(static_cast<const float*>(row.score) + start, remaining, use);
  } else if (row.dtype == FT_BF16) {
    for_scores(static_cast<const Bf16*>(row.score) + start, remaining, use);
  } else {
    for_scores(static_cast<const Fp16*>(row.score) + start, remaining, use);
  }
}

__device__ __forceinline__ float score_at(const ft_cuda_row& row, int64_t i) {
  if (row.dtype == FT_FP32) return static_cast<const float*>(row.score)[i];
  if (row.dtype == FT_BF16) return widen(static_cast<const Bf16*>(row.score)[i]);
  return widen(static_cast<const Fp16*>(row.score)[i]);
}

// The last row that begins at or before `position`: empty tensors begin where the next one does.
template <class Begin>
__device__ __forceinline__ int64_t row_of(int64_t position, int64_t n_rows, Begin begin) {
  int64_t r = 0, after = n_rows;
  while (after - r > 1) {
    const int64_t middle = r + (after - r) / 2;
    if (begin(middle) <= position) {
      r = middle;
    } else {
      after = middle;
    }
  }
  return r;
}

// use(row number, row, tile, offset of the tile in its tensor) for each of this block's tiles, in order.
template <class Use>
__device__ __forceinline__ void for_tiles(const ft_cuda_row* rows, int64_t n_rows, int64_t n_tiles, Use use) {
  int64_t tile = n_tiles * blockIdx.x / gridDim.x;
  const int64_t end = n_tiles * (int64_t{blockIdx.x} + 1) / gridDim.x;
  if (tile == end) return;
  int64_t r = row_of(tile, n_rows, [=](int64_t row) { return rows[row].first_tile; });
  for (; tile < end; ++tile) {
    while (r + 1 < n_rows && rows[r + 1].first_tile <= tile) ++r;
    const ft_cuda_row row = rows[r];
    use(r, row, tile, (tile - row.first_tile) * kTile);
  }
}

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// Sum of the values of the lower threads of the block, and of all in `total`; warp_totals is shared, one per warp.
template <int kBlockWarps, class T>
__device__ __forceinline__ T exclusive_scan(T value, T* warp_totals, T& total) {
  T inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T lower = __shfl_up_sync(kFullWarp, inclusive, distance);
    if (lane_id() >= distance) inclusive += lower;
  }
  if (lane_id() == 31) warp_totals[warp_id()] = inclusive;
  __syncthreads();
  T before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kBlockWarps; ++w) {
    if (w < warp_id()) before += warp_totals[w];
    total += warp_totals[w];
  }
  __syncthreads();  // the next scan writes warp_totals again
  return before + inclusive - value;
}

}  // namespace ft
