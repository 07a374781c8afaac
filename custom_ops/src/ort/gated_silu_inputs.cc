#include "gated_silu_inputs.h"

namespace bivlm::ort {
namespace {

void RequireHalves(const Dims& x) {
  if (x.empty() || x.back() % 2 != 0) {
    throw InvalidArgument("X is " + Text(x) +
                          ", expected at least one axis and an even last one: gate, then up");
  }
}

Status* InferShape(const CustomOp* op, ShapeInferContext* context) noexcept {
  const Api* api = static_cast<const Operator*>(op)->api;
  return Guard(api, "GatedSiLU", [&] {
    InferredShape shape = InferenceInput(api, context, 0);
    if (!shape.known || shape.dims.empty()) return;
    if (shape.dims.back() >= 0) {
      RequireHalves(shape.dims);
      shape.dims.back() /= 2;
    }
    shape.names.back().clear();
    SetInferenceOutput(api, context, 0, shape);
  });
}

}  // namespace

GatedSiluArgs ReadGatedSiluArgs(const Api* api, KernelContext* context) {
  const Tensor x = Input(api, context, 0);
  RequireHalves(x.dims);
  Dims dims = x.dims;
  dims.back() /= 2;
  GatedSiluArgs args;
  args.type =
      x.type == ElementType::kFloat32 ? bivlm::ElementType::kFloat32 : bivlm::ElementType::kFloat16;
  args.rows = 1;
  for (std::size_t axis = 0; axis + 1 < dims.size(); ++axis) {
    args.rows *= static_cast<std::size_t>(dims[axis]);
  }
  args.width = static_cast<std::size_t>(dims.back());
  args.x = x.data;
  args.y = Output(api, context, 0, dims);
  return args;
}

Operator GatedSiluSchema(const Api* api, ElementType type) {
  Operator op = NewOperator(api);
  op.type = type;
  op.GetName = [](const CustomOp*) { return "GatedSiLU"; };
  op.GetInputType = [](const CustomOp* self, std::size_t) {
    return static_cast<const Operator*>(self)->type;
  };
  op.GetInputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  op.GetOutputType = [](const CustomOp* self, std::size_t) {
    return static_cast<const Operator*>(self)->type;
  };
  op.GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  op.InferOutputShapeFn = InferShape;
  return op;
}

}  // namespace bivlm::ort
