// Threshold -> sorted indices, in one read of the scores.
//
// mark leaves a bit per score that is at least the threshold (1/32 of the bytes of fp32 scores) and two counts per tile;
// locate turns the counts of each tensor into running totals; write turns the bits into indices. No block waits for
// another, so nothing depends on the order in which they run. Where a tile must give up some of its ties, write reads the
// tile's scores again.
#pragma once

#include "device.cuh"

namespace ft {

constexpr int kLocateThreads = 1024;
constexpr int kLocateItems = 4;
constexpr int kTileWords = kTile / 32;
constexpr int kWriteThreads = kTileWords;  // a word of marks each

struct TilePlan {
  int64_t place;      // mark: scores above the threshold; locate: indices of this tensor that precede the tile's
  int32_t ties;       // scores equal to the threshold
  int32_t ties_kept;  // by locate
};

constexpr int64_t kTileWorkspace = sizeof(TilePlan) + kTile / 8;

// Nothing is written at or beyond a tensor's end, but its last tile's marks are whole, with zeros there.
__global__ void __launch_bounds__(kThreads)
    compact_mark_kernel(const ft_cuda_row* rows, int64_t n_rows, int64_t n_tiles, float value, TilePlan* plan, uint8_t* marks) {
  FT_SHARED(uint32_t, warp_counts, 2 * kWarps);
  int turn = 0;
  for_tiles(rows, n_rows, n_tiles, [&](int64_t, const ft_cuda_row& row, int64_t tile, int64_t start) {
    unsigned bits = 0, ties = 0;  // bit i: item i is at least the threshold
    for_scores(row, start, [&](int item, int, float score, bool valid) {
      bits |= static_cast<unsigned>(valid && score >= value) << item;
      ties += valid && score == value;
    });

    uint8_t* const out = marks + tile * (kTile / 8);
    const int lane = lane_id();
    if (row.dtype == FT_FP32) {
      // Four items are neighbours and fill half a byte; a pair of lanes shares its four bytes, each storing two.
      const unsigned other = __shfl_xor_sync(kFullWarp, bits, 1);
      const unsigned even = lane % 2 == 0 ? bits : other, odd = lane % 2 == 0 ? other : bits;
      for (int i = 0; i < 2; ++i) {
        const int v = 2 * (lane % 2) + i;
        out[v * (kThreads / 2) + threadIdx.x / 2] = static_cast<uint8_t>((even >> (4 * v) & 15) | (odd >> (4 * v) & 15) << 4);
      }
    } else {
      for (int v = 0; v < 2; ++v) out[v * kThreads + threadIdx.x] = static_cast<uint8_t>(bits >> (8 * v));
    }

    // Both counts of a warp are at most 32 * kItems = 512.
    const unsigned counts = __reduce_add_sync(kFullWarp, static_cast<unsigned>(__popc(bits)) | ties << 16);
    uint32_t* const mine = warp_counts + turn * kWarps;
    if (lane == 0) mine[warp_id()] = counts;
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t at_least = 0, equal = 0;
      for (int w = 0; w < kWarps; ++w) {
        at_least += static_cast<int32_t>(mine[w] & 0xffff);
        equal += static_cast<int32_t>(mine[w] >> 16);
      }
      plan[tile] = TilePlan{at_least - equal, equal, 0};
    }
    turn ^= 1;  // the next tile uses the other half, so one barrier a tile is enough
  });
}

// One block per tensor. selected[r]: the number of its indices.
__global__ void __launch_bounds__(kLocateThreads)
    compact_locate_kernel(const ft_cuda_row* rows, const ft_cuda_output* outputs, TilePlan* plan, int64_t* selected) {
  FT_SHARED(unsigned long long, warp_totals, kLocateThreads / 32);
  const ft_cuda_row row = rows[blockIdx.x];
  const int64_t n = (row.numel + kTile - 1) / kTile, quota = outputs[blockIdx.x].ties;
  TilePlan* const tiles = plan + row.first_tile;
  int64_t above = 0, ties = 0;
  for (int64_t first = 0; first < n; first += kLocateThreads * kLocateItems) {
    const int64_t mine = first + int64_t{threadIdx.x} * kLocateItems;
    unsigned long long found = 0;  // ties in the high word: a step covers 2^24 elements, so neither half overflows
    for (int64_t t = mine; t < mine + kLocateItems && t < n; ++t) {
      found += static_cast<unsigned long long>(tiles[t].place) + (static_cast<unsigned long long>(tiles[t].ties) << 32);
    }
    unsigned long long total;
    const unsigned long long before = exclusive_scan<kLocateThreads / 32>(found, warp_totals, total);
    int64_t above_before = above + static_cast<int64_t>(before & 0xffffffffu);
    int64_t ties_before = ties + static_cast<int64_t>(before >> 32);
    for (int64_t t = mine; t < mine + kLocateItems && t < n; ++t) {
      const TilePlan tile = tiles[t];
      const int64_t kept_before = min(ties_before, quota);
      const int64_t kept = min(ties_before + tile.ties, quota) - kept_before;
      tiles[t] = TilePlan{above_before + kept_before, tile.ties, static_cast<int32_t>(kept)};
      above_before += tile.place;
      ties_before += tile.ties;
    }
    above += static_cast<int64_t>(total & 0xffffffffu);
    ties += static_cast<int64_t>(total >> 32);
  }
  if (threadIdx.x == 0) selected[blockIdx.x] = above + min(ties, quota);
}

// Where a tensor turns out to have more indices than its output has room for, the rest of them is left out.
__global__ void __launch_bounds__(kWriteThreads)
    compact_write_kernel(const ft_cuda_row* rows, int64_t n_rows, int64_t n_tiles, float value, const TilePlan* plan,
                         const uint32_t* marks, const ft_cuda_output* outputs) {
  FT_SHARED(int, warp_totals, kWriteThreads / 32);
  FT_SHARED(uint16_t, found, kTile);
  for_tiles(rows, n_rows, n_tiles, [&](int64_t r, const ft_cuda_row& row, int64_t tile, int64_t start) {
    const TilePlan at = plan[tile];
    const int lane = lane_id(), word_number = static_cast<int>(threadIdx.x);
    uint32_t word = marks[tile * kTileWords + word_number];

    if (at.ties_kept < at.ties) {
      uint32_t ties = 0;
      for (int i = 0; i < 32; ++i) {  // a warp looks through its words together, one lane an element
        const uint32_t marked = __shfl_sync(kFullWarp, word, i);
        const int64_t offset = start + (warp_id() * 32 + i) * 32 + lane;
        const uint32_t equal = __ballot_sync(kFullWarp, (marked >> lane & 1) != 0 && score_at(row, offset) == value);
        if (lane == i) ties = equal;
      }
      int all;
      int kept = at.ties_kept - exclusive_scan<kWriteThreads / 32>(__popc(ties), warp_totals, all);
      for (; kept > 0 && ties != 0; --kept) ties &= ties - 1;
      word &= ~ties;
    }

    int total;
    int place = exclusive_scan<kWriteThreads / 32>(__popc(word), warp_totals, total);
    // The scan's barriers also keep these writes behind the previous tile's reads.
    for (; word != 0; word &= word - 1) found[place++] = static_cast<uint16_t>(word_number * 32 + __ffs(word) - 1);
    __syncthreads();
    const ft_cuda_output output = outputs[r];
    const int64_t room = min(static_cast<int64_t>(total), output.count - at.place);
    if (row.numel <= int64_t{1} << 31) {
      int32_t* const out = static_cast<int32_t*>(output.index) + at.place;
      for (int i = word_number; i < room; i += kWriteThreads) out[i] = static_cast<int32_t>(start + found[i]);
    } else {
      int64_t* const out = static_cast<int64_t*>(output.index) + at.place;
      for (int i = word_number; i < room; i += kWriteThreads) out[i] = start + found[i];
    }
  });
}

}  // namespace ft
