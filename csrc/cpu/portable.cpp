#define FT_ISA portable
#define FT_ISA_NAME "portable"
#define FT_ISA_TABLE kPortable
#include "kernels.inl"
