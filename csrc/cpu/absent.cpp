// Instruction sets this build has no code for.
#include "kernels.h"

namespace ft {
#if !defined(FT_HAVE_AVX2)
const Kernels* const kAvx2 = nullptr;
#endif
#if !defined(FT_HAVE_AVX512)
const Kernels* const kAvx512 = nullptr;
#endif
}  // namespace ft
