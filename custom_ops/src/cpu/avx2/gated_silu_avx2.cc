// GatedSiLU with AVX2, FMA and F16C.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include "avx2/vectors_avx2.h"
#include "gated_silu_rows.h"

namespace bivlm {

const GatedSiluFunctions GatedSiluAvx2 = {GatedSilu<Vectors>::Rows};

}  // namespace bivlm
