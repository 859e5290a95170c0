// CUDA device code as ordinary C++: every thread of a block is a fiber, and a seeded generator picks which fiber of which
// resident block goes on. A fiber runs until it waits (barrier, warp vote, shuffle) or is pre-empted (atomics), so that what
// is written before a missing barrier is read too early, or overwritten too early, under some seed.
//
// Checked as well: every thread of a block reaches a barrier, all lanes of a warp the same warp operation. Shared memory
// holds garbage at the start. Not modelled: weak memory order, caches, the compiler, the hardware's own order in a warp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define FT_SHARED(type, name, count) type* const name = static_cast<type*>(emulator::shared_memory(sizeof(type) * (count)))
#define threadIdx emulator::thread_index()
#define blockIdx emulator::block_index()
#define gridDim emulator::grid_size()

using std::max;
using std::min;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

struct Index {
  unsigned x;
};
enum class WarpOperation { kSync, kBallot, kAdd, kShuffle };

Index thread_index();
Index block_index();
Index grid_size();
void* shared_memory(std::size_t bytes);
void barrier();
void maybe_preempt();
void fail(const char* what);
// Gives every lane the 32 values of its warp.
const uint64_t* exchange(WarpOperation operation, uint64_t value, unsigned mask);
void run(int64_t blocks, int threads, const std::function<void()>& kernel);

template <class T>
T from_lane(T value, int lane, unsigned mask) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = exchange(WarpOperation::kShuffle, word, mask)[lane];
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline int lane() { return static_cast<int>(thread_index().x % 32); }

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() { emulator::exchange(emulator::WarpOperation::kSync, 0, 0xffffffffu); }

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* votes = emulator::exchange(emulator::WarpOperation::kBallot, vote, mask);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(votes[i]) << i;
  return result;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const uint64_t* values = emulator::exchange(emulator::WarpOperation::kAdd, value, mask);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result += static_cast<unsigned>(values[i]);
  return result;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::from_lane(value, source, mask);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int source = emulator::lane() - distance;
  return emulator::from_lane(value, source < 0 ? emulator::lane() : source, mask);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::from_lane(value, emulator::lane() ^ bits, mask);
}

template <class T>
T atomicAdd(T* address, T value) {
  emulator::maybe_preempt();
  const T before = *address;
  *address = before + value;
  return before;
}

// As the hardware, which refuses a misaligned vector.
template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) emulator::fail("misaligned load");
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

namespace ft {

float half_bits_to_float(uint16_t bits);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void*, Arguments... arguments) {
  emulator::run(blocks, threads, [=] { kernel(arguments...); });
}

}  // namespace ft
