// The CUDA part of the C ABI in a build without CUDA: every function is there and says why it does nothing.

#include "status.h"

#if !defined(FT_CUDA_ABSENT)
#define FT_CUDA_ABSENT "the reason was not recorded"
#endif

static int32_t absent() { return ft::failed(FT_UNAVAILABLE, "not built with CUDA (%s)", FT_CUDA_ABSENT); }

int32_t ft_cuda_available(void) { return absent(); }

int32_t ft_cuda_table(const ft_scores*, int64_t, ft_cuda_row*, int64_t*) { return absent(); }

int32_t ft_cuda_key_histogram(const ft_cuda_row*, int64_t, int64_t, int32_t, int32_t, uint32_t, uint32_t, int64_t*, int32_t, void*) {
  return absent();
}

int32_t ft_cuda_collect_bracket(const ft_cuda_row*, int64_t, int64_t, uint32_t, uint32_t, int64_t*, int64_t*, int64_t, int64_t*,
                                int32_t, void*) {
  return absent();
}

int32_t ft_cuda_sample_scores(const ft_cuda_row*, int64_t, int64_t, const int64_t*, int64_t, float*, int32_t, void*) {
  return absent();
}

int64_t ft_cuda_compact_workspace(int64_t) { return 0; }

int32_t ft_cuda_compact(const ft_cuda_row*, int64_t, int64_t, float, const ft_cuda_output*, void*, int64_t*, int32_t, void*) {
  return absent();
}
