// What BinaryMatMul and GroupMatMul have in common: X of K features becomes Y of N.
#ifndef BIVLM_ORT_PRODUCT_H_
#define BIVLM_ORT_PRODUCT_H_

#include "adaptor.h"
#include "bivlm/float16.h"
#include "operators.h"

namespace bivlm::ort {

// X of a call, checked, and its output.
struct Product {
  bivlm::ElementType type;
  std::size_t m;
  const void* x;
  void* y;
};
Product ReadProduct(const Api* api, KernelContext* context, std::size_t k, std::size_t n);

Status* InferProductShape(const CustomOp* op, ShapeInferContext* context) noexcept;

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_PRODUCT_H_
