// What GatedSiLU is on every device: checks of the input, and shapes.
#ifndef BIVLM_ORT_GATED_SILU_INPUTS_H_
#define BIVLM_ORT_GATED_SILU_INPUTS_H_

#include "adaptor.h"
#include "bivlm/gated_silu.h"
#include "operators.h"

namespace bivlm::ort {

// X of a call, checked, and its output.
GatedSiluArgs ReadGatedSiluArgs(const Api* api, KernelContext* context);

// The operator without its kernel.
Operator GatedSiluSchema(const Api* api, ElementType type);

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_GATED_SILU_INPUTS_H_
