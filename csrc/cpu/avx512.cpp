#define FT_ISA avx512
#define FT_ISA_NAME "avx512"
#define FT_ISA_TABLE kAvx512
#include "kernels.inl"
