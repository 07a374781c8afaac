// GatedSiLU with NEON.
#include "gated_silu_rows.h"
#include "neon/vectors_neon.h"

namespace bivlm {

const GatedSiluFunctions GatedSiluNeon = {GatedSilu<Vectors>::Rows};

}  // namespace bivlm
