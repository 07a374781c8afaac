#include "product.h"

namespace bivlm::ort {

Product ReadProduct(const Api* api, KernelContext* context, std::size_t k, std::size_t n) {
  const Tensor x = Input(api, context, 0);
  if (x.type != ElementType::kFloat32 && x.type != ElementType::kFloat16) {
    throw InvalidArgument("X is " + Text(x.type) + ", expected float32 or float16");
  }
  if (x.dims.empty() || x.dims.back() != Signed(k)) {
    throw InvalidArgument("X is " + Text(x.dims) +
                          ", its last axis must be K = " + std::to_string(k));
  }
  Dims dims = x.dims;
  dims.back() = Signed(n);
  std::size_t m = 1;
  for (std::size_t i = 0; i + 1 < dims.size(); ++i) m *= static_cast<std::size_t>(dims[i]);
  const bool is_float32 = x.type == ElementType::kFloat32;
  return {is_float32 ? bivlm::ElementType::kFloat32 : bivlm::ElementType::kFloat16, m, x.data,
          Output(api, context, 0, dims)};
}

Status* InferProductShape(const CustomOp* op, ShapeInferContext* context) noexcept {
  const Api* api = static_cast<const Operator*>(op)->api;
  return Guard(api, op->GetName(op), [&] {
    InferredShape shape = InferenceInput(api, context, 0);
    if (!shape.known || shape.dims.empty()) return;
    const int64_t k = InferenceInt(api, context, "K");
    if (shape.dims.back() >= 0 && shape.dims.back() != k) {
      throw InvalidArgument("X is " + Text(shape.dims) +
                            ", its last axis must be K = " + std::to_string(k));
    }
    shape.dims.back() = InferenceInt(api, context, "N");
    shape.names.back().clear();
    SetInferenceOutput(api, context, 0, shape);
  });
}

}  // namespace bivlm::ort
