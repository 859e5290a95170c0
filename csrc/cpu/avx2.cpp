#define FT_ISA avx2
#define FT_ISA_NAME "avx2"
#define FT_ISA_TABLE kAvx2
#include "kernels.inl"
