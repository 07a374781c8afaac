// What TokenPrune is on every device: attributes, checks of the inputs, and shapes.
#ifndef BIVLM_ORT_TOKEN_PRUNE_INPUTS_H_
#define BIVLM_ORT_TOKEN_PRUNE_INPUTS_H_

#include "adaptor.h"
#include "bivlm/token_prune.h"
#include "operators.h"

namespace bivlm::ort {

// Inputs whose contents are read before a kernel runs.
inline constexpr std::size_t kTokenPruneSegments = 2;
inline constexpr std::size_t kTokenPruneKeep = 3;

// The attributes of a node, checked.
TokenPruneOptions ReadTokenPruneOptions(const Api* api, const KernelInfo* info);

// The inputs of a call, checked. The contents of `segments` and `keep` are read, so that these two
// must be on the host; others stay where they are.
TokenPruneArgs ReadTokenPruneArgs(const Api* api, const KernelContext* context,
                                  const TokenPruneOptions& options);

// The operator without its kernel.
Operator TokenPruneSchema(const Api* api, ElementType type, ElementType metric_type);

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_TOKEN_PRUNE_INPUTS_H_
