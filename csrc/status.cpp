#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace ft {

thread_local char last_error[kErrorSize] = "";

namespace {
void keep_message(const char* format, va_list arguments) { std::vsnprintf(last_error, sizeof last_error, format, arguments); }
}  // namespace

int32_t failed(int32_t status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep_message(format, arguments);
  va_end(arguments);
  return status;
}

int32_t invalid(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep_message(format, arguments);
  va_end(arguments);
  return FT_INVALID;
}

}  // namespace ft

int32_t ft_abi_version(void) { return FT_ABI_VERSION; }

const char* ft_last_error(void) { return ft::last_error; }
