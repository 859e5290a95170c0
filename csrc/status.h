// The status of a call and its reason, shared by the CPU and the CUDA side of the library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fishertune.h"

namespace ft {

constexpr std::size_t kErrorSize = 512;

/* The calling thread's message for ft_last_error. */
extern thread_local char last_error[kErrorSize];

#if defined(__GNUC__)
#define FT_FORMATS(message, first) __attribute__((format(printf, message, first)))
#else
#define FT_FORMATS(message, first)
#endif

/* Writes the message and returns `status`. */
int32_t failed(int32_t status, const char* format, ...) FT_FORMATS(2, 3);

/* The same for FT_INVALID. */
int32_t invalid(const char* format, ...) FT_FORMATS(1, 2);

}  // namespace ft

#define FT_TRY(expression)                       \
  do {                                           \
    const int32_t status_ = (expression);        \
    if (status_ != FT_OK) return status_;        \
  } while (false)
