// Body of portable.cpp, avx2.cpp and avx512.cpp: the same source under another set of compiler flags and another namespace.
// Only headers without out-of-line inline functions are included, for the reason given in numeric.inl.

#include <cstdint>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace ft {
namespace FT_ISA {

#include "numeric.inl"

#include "philox.inl"

#include "elementwise.inl"

#include "affine.inl"

#include "selection.inl"

#include "sparse_adamw.inl"

#include "selected_grad_norm.inl"

static constexpr Kernels table = {FT_ISA_NAME,
                                  squared_grad_accumulate,
                                  per_sample_affine,
                                  gaussian_perturb,
                                  precision_update_natural,
                                  precision_update_sgvb,
                                  dr_fim_score,
                                  key_histogram,
                                  sample_scores,
                                  collect_bracket,
                                  compact,
                                  drop_ties,
                                  sparse_adamw,
                                  selected_squares};

}  // namespace FT_ISA

const Kernels* const FT_ISA_TABLE = &FT_ISA::table;

}  // namespace ft
