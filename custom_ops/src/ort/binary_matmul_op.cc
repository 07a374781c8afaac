// BinaryMatMul as an ONNX Runtime operator: attributes, checks and shapes.
#include <cstring>
#include <limits>
#include <memory>

#include "adaptor.h"
#include "bivlm/binary_matmul.h"
#include "huge_pages.h"
#include "operators.h"

namespace bivlm::ort {
namespace {

constexpr std::size_t kX = 0;
constexpr std::size_t kCodes = 1;
constexpr std::size_t kCoefficients = 2;
constexpr std::size_t kSigns = 3;
constexpr std::size_t kOrder = 4;
constexpr std::size_t kInputs = 5;

// The inputs that hold the weight.
struct WeightTensors {
  Tensor codes;
  Tensor coefficients;
  Tensor signs;
  Tensor order;
};

struct Kernel {
  const Api* api = nullptr;
  std::string label;
  const BinaryMatMulKernel* kernel = nullptr;
  BinaryMatMulWeight weight;  // with the pointers of the constant inputs, which are checked
  const uint8_t* constant_codes = nullptr;    // as ONNX Runtime has them
  std::shared_ptr<const uint8_t> huge_codes;  // weight.codes, if they were copied
};

int64_t Signed(std::size_t value) { return static_cast<int64_t>(value); }

void CheckOrder(const Tensor& order) {
  const uint8_t* bytes = static_cast<const uint8_t*>(order.data);
  std::vector<bool> seen(static_cast<std::size_t>(order.dims[0]));
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

void Require(const std::string& problem) {
  if (!problem.empty()) throw InvalidArgument(problem);
}

// Checks the tensors that are there and enters their pointers.
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
    CheckOrder(tensors.order);
    weight->order = static_cast<const uint8_t*>(tensors.order.data);
  }
}

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "BinaryMatMul";
  return Guard(api, label, [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->label = NodeLabel(api, info, "BinaryMatMul");
    label = kernel->label;

    const std::vector<int64_t> plane_columns = IntsAttribute(api, info, "plane_columns");
    BinaryMatMulShape shape;
    shape.k = RequiredInt(api, info, "K");
    shape.n = RequiredInt(api, info, "N");
    shape.plane_columns = plane_columns.data();
    shape.plane_count = plane_columns.size();
    shape.hadamard_block = IntAttribute(api, info, "hadamard_block", 0);
    shape.format = IntAttribute(api, info, "format", 1);
    Require(MakeBinaryMatMulWeight(shape, &kernel->weight));

    WeightTensors tensors;
    tensors.codes = ConstantInput(api, info, kCodes);
    tensors.coefficients = ConstantInput(api, info, kCoefficients);
    tensors.signs = ConstantInput(api, info, kSigns);
    tensors.order = ConstantInput(api, info, kOrder);
    SetWeightTensors(tensors, &kernel->weight);
    kernel->constant_codes = kernel->weight.codes;
    if (HugePagesWanted() && tensors.codes) {
      kernel->huge_codes = CopyToHugePages(kernel->weight.codes,
                                           kernel->weight.panels * kernel->weight.panel_code_bytes);
      kernel->weight.codes = kernel->huge_codes.get();
    }

    const std::string forced = ForcedKernel();
    kernel->kernel = SelectBinaryMatMul(SupportedIsa(), forced);
    if (kernel->kernel == nullptr) {
      throw InvalidArgument(
          ForcedKernelProblem(forced, AvailableBinaryMatMulNames(SupportedIsa())));
    }
    *out = kernel.release();
  });
}

// The weight of this call. Constant inputs were checked at creation; others are checked now.
BinaryMatMulWeight WeightOfCall(const Kernel& kernel, const KernelContext* context) {
  const auto unchecked = [&](std::size_t index, const uint8_t* checked) {
    Tensor tensor = Input(kernel.api, context, index);
    return tensor.data == checked ? Tensor() : tensor;
  };
  BinaryMatMulWeight weight = kernel.weight;
  WeightTensors tensors;
  tensors.codes = unchecked(kCodes, kernel.constant_codes);
  tensors.coefficients = unchecked(kCoefficients, weight.coefficients);
  tensors.signs = unchecked(kSigns, weight.signs);
  tensors.order = unchecked(kOrder, weight.order);
  SetWeightTensors(tensors, &weight);
  return weight;
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    const BinaryMatMulWeight weight = WeightOfCall(kernel, context);
    const Tensor x = Input(kernel.api, context, kX);
    if (x.type != ElementType::kFloat32 && x.type != ElementType::kFloat16) {
      throw InvalidArgument("X is " + Text(x.type) + ", expected float32 or float16");
    }
    if (x.dims.empty() || x.dims.back() != Signed(weight.k)) {
      throw InvalidArgument("X is " + Text(x.dims) +
                            ", its last axis must be K = " + std::to_string(weight.k));
    }
    Dims dims = x.dims;
    dims.back() = Signed(weight.n);
    BinaryMatMulArgs args;
    args.weight = &weight;
    args.type = x.type == ElementType::kFloat32 ? bivlm::ElementType::kFloat32
                                                : bivlm::ElementType::kFloat16;
    args.m = 1;
    for (std::size_t i = 0; i + 1 < dims.size(); ++i) args.m *= static_cast<std::size_t>(dims[i]);
    args.x = x.data;
    args.y = Output(kernel.api, context, 0, dims);
    SessionThreads threads(kernel.api, context);
    RunBinaryMatMul(*kernel.kernel, args, threads.executor());
  });
}

Status* InferShape(const CustomOp* op, ShapeInferContext* context) noexcept {
  const Api* api = static_cast<const Operator*>(op)->api;
  return Guard(api, "BinaryMatMul", [&] {
    InferredShape shape = InferenceInput(api, context, kX);
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

ElementType InputType(const CustomOp*, std::size_t index) {
  constexpr ElementType kTypes[kInputs] = {ElementType::kUndefined, ElementType::kUint8,
                                           ElementType::kFloat16, ElementType::kUint8,
                                           ElementType::kUint16};
  return kTypes[index];
}

}  // namespace

Operator MakeBinaryMatMulOp(const Api* api) {
  Operator op = NewOperator(api);
  op.GetName = [](const CustomOp*) { return "BinaryMatMul"; };
  op.GetInputType = InputType;
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetOutputType = [](const CustomOp*, std::size_t) { return ElementType::kUndefined; };
  op.GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const CustomOp*, std::size_t index) {
    return index >= kSigns ? Characteristic::kOptional : Characteristic::kRequired;
  };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  op.InferOutputShapeFn = InferShape;
  return op;
}

}  // namespace bivlm::ort
