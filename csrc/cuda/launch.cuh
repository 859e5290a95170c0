// Starting a kernel, and the few words of device code that differ between nvcc and the tests' emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDACC__)

#define FT_SHARED(type, name, count) __shared__ type name[count]

namespace ft {

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
}

}  // namespace ft

#else
#include "emulator.h"  // in tests/kernels/cuda/emulator
#endif
