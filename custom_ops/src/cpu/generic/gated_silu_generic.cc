// GatedSiLU on any CPU, with vectors of four floats.

#include "gated_silu_rows.h"
#include "generic/vectors_generic.h"

namespace bivlm {

const GatedSiluFunctions GatedSiluGeneric = {GatedSilu<Vectors>::Rows};

}  // namespace bivlm
