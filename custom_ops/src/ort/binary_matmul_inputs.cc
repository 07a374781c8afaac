#include "binary_matmul_inputs.h"

#include <cstring>

#include "product.h"

namespace bivlm::ort {
namespace {

constexpr std::size_t kCodes = 1;
constexpr std::size_t kCoefficients = 2;
constexpr std::size_t kSigns = 3;
constexpr std::size_t kOrder = 4;
constexpr std::size_t kInputs = 5;

ElementType InputType(const CustomOp*, std::size_t index) {
  constexpr ElementType kTypes[kInputs] = {ElementType::kUndefined, ElementType::kUint8,
                                           ElementType::kFloat16, ElementType::kUint8,
                                           ElementType::kUint16};
  return kTypes[index];
}

}  // namespace

void CheckOrder(const uint8_t* bytes, std::size_t count) {
  std::vector<bool> seen(count);
  for (std::size_t i = 0; i < seen.size(); ++i) {
    uint16_t from = 0;
    std::memcpy(&from, bytes + 2 * i, sizeof(from));
    if (from >= seen.size() || seen[from]) {
      throw InvalidArgument("order is not a permutation: element " + std::to_string(i) + " is " +
                            std::to_string(from) + " of " + std::to_string(seen.size()) +
                            (from >= seen.size() ? "" : ", a second time"));
    }
    seen[from] = true;
  }
}

BinaryMatMulWeight ReadBinaryMatMulWeight(const Api* api, const KernelInfo* info) {
  BinaryMatMulWeight weight;
  const std::vector<int64_t> plane_columns = IntsAttribute(api, info, "plane_columns");
  BinaryMatMulShape shape;
  shape.k = RequiredInt(api, info, "K");
  shape.n = RequiredInt(api, info, "N");
  shape.plane_columns = plane_columns.data();
  shape.plane_count = plane_columns.size();
  shape.hadamard_block = IntAttribute(api, info, "hadamard_block", 0);
  shape.format = IntAttribute(api, info, "format", 1);
  Require(MakeBinaryMatMulWeight(shape, &weight));
  return weight;
}

WeightTensors ConstantWeightTensors(const Api* api, const KernelInfo* info) {
  WeightTensors tensors;
  tensors.codes = ConstantInput(api, info, kCodes);
  tensors.coefficients = ConstantInput(api, info, kCoefficients);
  tensors.signs = ConstantInput(api, info, kSigns);
  tensors.order = ConstantInput(api, info, kOrder);
  return tensors;
}

WeightTensors WeightTensorsOfCall(const Api* api, const KernelContext* context,
                                  const WeightPointers& checked) {
  const auto unchecked = [&](std::size_t index, const uint8_t* pointer) {
    const Tensor tensor = Input(api, context, index);
    return tensor.data == pointer ? Tensor() : tensor;
  };
  WeightTensors tensors;
  tensors.codes = unchecked(kCodes, checked.codes);
  tensors.coefficients = unchecked(kCoefficients, checked.coefficients);
  tensors.signs = unchecked(kSigns, checked.signs);
  tensors.order = unchecked(kOrder, checked.order);
  return tensors;
}

void SetWeightTensors(const WeightTensors& tensors, BinaryMatMulWeight* weight) {
  const int64_t panels = Signed(weight->panels);
  const int64_t k_padded = Signed(weight->k_padded);
  if (tensors.codes) {
    Require(Mismatch("codes", tensors.codes, ElementType::kUint8,
                     {panels, Signed(weight->panel_code_bytes)}));
    weight->codes = static_cast<const uint8_t*>(tensors.codes.data);
  }
  if (tensors.coefficients) {
    Require(Mismatch("coefficients", tensors.coefficients, ElementType::kFloat16,
                     {panels, Signed(weight->coefficient_slots), Signed(kPanelRows)}));
    weight->coefficients = static_cast<const uint8_t*>(tensors.coefficients.data);
  }
  if (tensors.signs) {
    if (weight->hadamard_block == 0) {
      throw InvalidArgument("signs are given but hadamard_block is 0");
    }
    Require(Mismatch("signs", tensors.signs, ElementType::kUint8, {k_padded / 8}));
    weight->signs = static_cast<const uint8_t*>(tensors.signs.data);
  }
  if (tensors.order) {
    const int64_t chunks = Signed(weight->chunks());
    weight->order_has_chunks = tensors.order.dims == Dims{chunks};
    if (!weight->order_has_chunks || tensors.order.type != ElementType::kUint16) {
      const std::string problem =
          Mismatch("order", tensors.order, ElementType::kUint16, {k_padded});
      if (!problem.empty()) {
        throw InvalidArgument(problem + " or " + Text(Dims{chunks}));
      }
    }
    weight->order = static_cast<const uint8_t*>(tensors.order.data);
  }
}

BinaryMatMulArgs ReadBinaryMatMulArgs(const Api* api, KernelContext* context,
                                      const BinaryMatMulWeight& weight) {
  const Product product = ReadProduct(api, context, weight.k, weight.n);
  BinaryMatMulArgs args;
  args.weight = &weight;
  args.type = product.type;
  args.m = product.m;
  args.x = product.x;
  args.y = product.y;
  return args;
}

Operator BinaryMatMulSchema(const Api* api) {
  Operator op = NewOperator(api);
  op.GetName = [](const CustomOp*) { return "BinaryMatMul"; };
  op.GetInputType = InputType;
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetOutputType = [](const CustomOp*, std::size_t) { return ElementType::kUndefined; };
  op.GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  op.GetInputCharacteristic = [](const CustomOp*, std::size_t index) {
    return index >= kSigns ? Characteristic::kOptional : Characteristic::kRequired;
  };
  op.InferOutputShapeFn = InferProductShape;
  return op;
}

}  // namespace bivlm::ort
