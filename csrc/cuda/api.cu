// The CUDA part of the C ABI: checks, grids, the device guard.

#include <algorithm>
#include <cmath>

#include "collect_bracket.cuh"
#include "compact.cuh"
#include "key_histogram.cuh"
#include "sample_scores.cuh"
#include "status.h"

namespace ft {
namespace {

int32_t cuda_failed(const char* what, cudaError_t error) {
  return failed(FT_CUDA_ERROR, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

#define FT_TRY_CUDA(expression)                                                   \
  do {                                                                            \
    const cudaError_t error_ = (expression);                                      \
    if (error_ != cudaSuccess) return cuda_failed(#expression, error_);           \
  } while (false)

// Runs `body` with `device` current, and makes the caller's device current again.
template <class Body>
int32_t on_device(int32_t device, Body body) {
  int before = 0;
  FT_TRY_CUDA(cudaGetDevice(&before));
  if (device != before) FT_TRY_CUDA(cudaSetDevice(device));
  const int32_t status = body();
  if (device != before) {
    const cudaError_t error = cudaSetDevice(before);
    if (status == FT_OK && error != cudaSuccess) return cuda_failed("cudaSetDevice", error);
  }
  return status;
}

int32_t check_launch(const ft_cuda_row* table, int64_t n_rows, int64_t n_tiles) {
  const long long rows = n_rows, tiles = n_tiles;
  if (n_rows < 0 || n_rows > INT32_MAX) return invalid("n_rows is %lld; expected 0 to 2^31 - 1", rows);
  if (n_tiles < 0 || (n_tiles > 0 && n_rows == 0)) return invalid("the work is %lld for %lld tensors; expected the n_tiles of ft_cuda_table", tiles, rows);
  if (n_rows > 0 && table == nullptr) return invalid("table is NULL with n_rows %lld", rows);
  return FT_OK;
}

// As many blocks as run at once, each with a contiguous share of the tiles, but none with more than its counters can hold.
template <class Kernel>
cudaError_t choose_blocks(Kernel kernel, int threads, int64_t n_tiles, int32_t device, int64_t* blocks) {
  int multiprocessors = 0, resident = 0;
  cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0);
  const int64_t share = kMaxBlockElements / kTile;
  *blocks = std::max(std::min<int64_t>(n_tiles, int64_t{multiprocessors} * resident), (n_tiles + share - 1) / share);
  return error;
}

// A kernel over the tiles: queued, or nothing where there are none.
template <class... Parameters, class... Rest>
int32_t run_over_tiles(const char* what, void (*kernel)(const ft_cuda_row*, int64_t, int64_t, Parameters...), int threads,
                       int32_t device, void* stream, const ft_cuda_row* table, int64_t n_rows, int64_t n_tiles, Rest... rest) {
  if (n_tiles == 0) return FT_OK;
  int64_t blocks = 0;
  cudaError_t error = choose_blocks(kernel, threads, n_tiles, device, &blocks);
  if (error == cudaSuccess) {
    launch(kernel, blocks, threads, static_cast<cudaStream_t>(stream), table, n_rows, n_tiles, rest...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? static_cast<int32_t>(FT_OK) : cuda_failed(what, error);
}

}  // namespace
}  // namespace ft

using namespace ft;

extern "C" {

int32_t ft_cuda_available(void) {
  int devices = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaDriverGetVersion(&driver);
    cudaGetLastError();  // forgotten, or torch's next call would report it
    if (driver == 0) return failed(FT_UNAVAILABLE, "this machine has no CUDA driver");
    if (driver < CUDART_VERSION) {
      return failed(FT_UNAVAILABLE, "it was built with CUDA %d.%d but the driver knows %d.%d at most; update the driver or build with an older nvcc",
                    CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, driver / 1000, driver % 1000 / 10);
    }
    return failed(FT_UNAVAILABLE, "no usable CUDA device: %s", cudaGetErrorString(error));
  }
  for (int device = 0; device < devices; ++device) {
    int major = 0;
    FT_TRY_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major >= 8) return FT_OK;
  }
  return failed(FT_UNAVAILABLE, "none of the %d CUDA devices has compute capability 8.0 or newer", devices);
}

int32_t ft_cuda_table(const ft_scores* rows, int64_t n_rows, ft_cuda_row* table, int64_t* n_tiles) {
  if (n_rows < 0) return invalid("n_rows is %lld; expected 0 or more", static_cast<long long>(n_rows));
  if (n_rows > 0 && (rows == nullptr || table == nullptr)) return invalid("rows or table is NULL with n_rows %lld", static_cast<long long>(n_rows));
  if (n_tiles == nullptr) return invalid("n_tiles is NULL");
  int64_t tiles = 0;
  for (int64_t r = 0; r < n_rows; ++r) {
    const ft_scores& row = rows[r];
    const long long number = r, numel = row.numel, dtype = row.dtype;
    if (numel < 0) return invalid("row %lld: numel is %lld; expected 0 or more", number, numel);
    if (dtype != FT_FP32 && dtype != FT_BF16 && dtype != FT_FP16) {
      return invalid("row %lld: dtype code %lld; expected 0 (fp32), 1 (bf16) or 2 (fp16)", number, dtype);
    }
    if (numel > 0 && row.score == nullptr) return invalid("row %lld: a tensor of %lld elements is NULL", number, numel);
    table[r] = ft_cuda_row{row.score, row.numel, row.dtype, tiles};
    tiles += (row.numel + kTile - 1) / kTile;
  }
  *n_tiles = tiles;
  return FT_OK;
}

int32_t ft_cuda_key_histogram(const ft_cuda_row* table, int64_t n_rows, int64_t n_tiles, int32_t shift, int32_t bits,
                              uint32_t prefix_mask, uint32_t prefix, int64_t* histogram, int32_t device, void* stream) {
  FT_TRY(check_launch(table, n_rows, n_tiles));
  if (bits < 1 || bits > 16 || shift < 0 || shift > 31) {
    return invalid("shift %d, bits %d; expected 0 <= shift < 32 and 1 <= bits <= 16", static_cast<int>(shift), static_cast<int>(bits));
  }
  if (histogram == nullptr) return invalid("histogram is NULL");
  return on_device(device, [&] {
    return run_over_tiles("key_histogram", bits <= kSharedBits ? key_histogram_kernel<true> : key_histogram_kernel<false>, kThreads,
                          device, stream, table, n_rows, n_tiles, shift, bits, prefix_mask, prefix,
                          reinterpret_cast<unsigned long long*>(histogram));
  });
}

int32_t ft_cuda_collect_bracket(const ft_cuda_row* table, int64_t n_rows, int64_t n_tiles, uint32_t low, uint32_t high,
                                int64_t* counts, int64_t* candidates, int64_t capacity, int64_t* n_candidates,
                                int32_t device, void* stream) {
  FT_TRY(check_launch(table, n_rows, n_tiles));
  if (capacity < 0) return invalid("capacity is %lld; expected 0 or more", static_cast<long long>(capacity));
  if (capacity > 0 && candidates == nullptr) return invalid("candidates is NULL with capacity %lld", static_cast<long long>(capacity));
  if (n_rows > 0 && (counts == nullptr || n_candidates == nullptr)) return invalid("counts or n_candidates is NULL");
  return on_device(device, [&] {
    return run_over_tiles("collect_bracket", collect_bracket_kernel, kThreads, device, stream, table, n_rows, n_tiles, low, high,
                          reinterpret_cast<unsigned long long*>(counts), candidates, capacity,
                          reinterpret_cast<unsigned long long*>(n_candidates));
  });
}

int32_t ft_cuda_sample_scores(const ft_cuda_row* table, int64_t n_rows, int64_t n_samples, const int64_t* first_samples,
                              int64_t stride, float* sample, int32_t device, void* stream) {
  FT_TRY(check_launch(table, n_rows, n_samples));
  if (stride < 1 || stride > UINT32_MAX) return invalid("stride is %lld; expected 1 to 2^32 - 1", static_cast<long long>(stride));
  if (n_samples > 0 && (first_samples == nullptr || sample == nullptr)) return invalid("first_samples or sample is NULL");
  return on_device(device, [&] {
    return run_over_tiles("sample_scores", sample_scores_kernel, kThreads, device, stream, table, n_rows, n_samples, first_samples,
                          stride, sample);
  });
}

int64_t ft_cuda_compact_workspace(int64_t n_tiles) { return n_tiles * kTileWorkspace; }

int32_t ft_cuda_compact(const ft_cuda_row* table, int64_t n_rows, int64_t n_tiles, float value, const ft_cuda_output* outputs,
                        void* workspace, int64_t* selected, int32_t device, void* stream) {
  FT_TRY(check_launch(table, n_rows, n_tiles));
  if (std::isnan(value)) return invalid("the threshold is NaN");
  if (n_rows > 0 && (outputs == nullptr || selected == nullptr)) return invalid("outputs or selected is NULL");
  if (n_tiles > 0 && workspace == nullptr) return invalid("workspace is NULL");
  if (n_rows == 0) return FT_OK;
  return on_device(device, [&]() -> int32_t {
    TilePlan* const plan = static_cast<TilePlan*>(workspace);
    void* const marks = plan + n_tiles;
    FT_TRY(run_over_tiles("compact_mark", compact_mark_kernel, kThreads, device, stream, table, n_rows, n_tiles, value, plan,
                          static_cast<uint8_t*>(marks)));
    launch(compact_locate_kernel, n_rows, kLocateThreads, static_cast<cudaStream_t>(stream), table, outputs, plan, selected);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return cuda_failed("compact_locate", error);
    return run_over_tiles("compact_write", compact_write_kernel, kWriteThreads, device, stream, table, n_rows, n_tiles, value, plan,
                          static_cast<const uint32_t*>(marks), outputs);
  });
}

}  // extern "C"
