// The operators on a GPU, as ONNX Runtime sees them.
#ifndef BIVLM_ORT_CUDA_OPERATORS_H_
#define BIVLM_ORT_CUDA_OPERATORS_H_

#include "ort/operators.h"

namespace bivlm::ort {

Operator MakeCudaBinaryMatMulOp(const Api* api);
Operator MakeCudaGatedSiluOp(const Api* api, ElementType type);
Operator MakeCudaTokenPruneOp(const Api* api, ElementType type, ElementType metric_type);

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_CUDA_OPERATORS_H_
