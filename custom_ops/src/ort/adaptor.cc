#include "adaptor.h"

#include <atomic>
#include <chrono>
#include <cstdlib>

namespace bivlm::ort {
namespace {

// Frees the description of a tensor.
class ShapeInfo {
 public:
  ShapeInfo(const Api* api, TensorTypeAndShapeInfo* info) : api_(api), info_(info) {}
  ShapeInfo(const ShapeInfo&) = delete;
  ShapeInfo& operator=(const ShapeInfo&) = delete;
  ~ShapeInfo() { ReleaseTensorTypeAndShapeInfo::Call(api_, info_); }

  ElementType type() const {
    ElementType type = ElementType::kUndefined;
    Check(GetTensorElementType::Call(api_, info_, &type));
    return type;
  }

  Dims dims() const {
    std::size_t rank = 0;
    Check(GetDimensionsCount::Call(api_, info_, &rank));
    Dims dims(rank);
    if (rank > 0) Check(GetDimensions::Call(api_, info_, dims.data(), rank));
    return dims;
  }

  std::vector<std::string> names(std::size_t rank) const {
    std::vector<const char*> names(rank, nullptr);
    if (rank > 0) Check(GetSymbolicDimensions::Call(api_, info_, names.data(), rank));
    std::vector<std::string> result;
    for (const char* name : names) result.emplace_back(name == nullptr ? "" : name);
    return result;
  }

 private:
  const Api* api_;
  TensorTypeAndShapeInfo* info_;
};

// Whether a call succeeded; the status of a failed one is dropped.
bool Succeeded(const Api* api, Status* status) {
  if (status == nullptr) return true;
  ReleaseStatus::Call(api, status);
  return false;
}

bool HasInt(const Api* api, const KernelInfo* info, const char* name) {
  int64_t value = 0;
  return Succeeded(api, KernelInfoGetAttribute_int64::Call(api, info, name, &value));
}

bool HasFloat(const Api* api, const KernelInfo* info, const char* name) {
  float value = 0.0F;
  return Succeeded(api, KernelInfoGetAttribute_float::Call(api, info, name, &value));
}

bool HasString(const Api* api, const KernelInfo* info, const char* name) {
  std::size_t size = 0;
  return Succeeded(api, KernelInfoGetAttribute_string::Call(api, info, name, nullptr, &size));
}

bool HasInts(const Api* api, const KernelInfo* info, const char* name) {
  std::size_t count = 0;
  return Succeeded(api, KernelInfoGetAttributeArray_int64::Call(api, info, name, nullptr, &count));
}

// Refuses an attribute that exists with another type than the operator reads: without this it
// would count as absent.
void RefuseOtherTypes(const Api* api, const KernelInfo* info, const char* name,
                      const char* expected) {
  if (HasInt(api, info, name) || HasFloat(api, info, name) || HasString(api, info, name) ||
      HasInts(api, info, name)) {
    throw InvalidArgument(std::string("attribute ") + name + " must be of type " + expected);
  }
}

}  // namespace

void SessionThreads::Run(void* pool, std::size_t total, void (*body)(void*, std::size_t),
                         void* context) {
  const SessionThreads* threads = static_cast<const SessionThreads*>(pool);
  Check(KernelContext_ParallelFor::Call(threads->api_, threads->context_, body, total, 0, context));
}

std::string Text(const Dims& dims) {
  std::string text = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) {
    if (i > 0) text += ", ";
    text += dims[i] < 0 ? "?" : std::to_string(dims[i]);
  }
  return text + "]";
}

std::string Text(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return "float32";
    case ElementType::kInt8:
      return "int8";
    case ElementType::kUint8:
      return "uint8";
    case ElementType::kUint16:
      return "uint16";
    case ElementType::kInt32:
      return "int32";
    case ElementType::kInt64:
      return "int64";
    case ElementType::kFloat16:
      return "float16";
    case ElementType::kUndefined:
      break;
  }
  return "element type " + std::to_string(static_cast<int>(type));
}

std::string Mismatch(const char* name, const Tensor& tensor, ElementType type, const Dims& dims) {
  if (tensor.type == type && tensor.dims == dims) return "";
  return std::string(name) + " is " + Text(tensor.type) + " " + Text(tensor.dims) + ", expected " +
         Text(type) + " " + Text(dims);
}

Tensor View(const Api* api, const Value* value) {
  static constexpr char kNothing = 0;
  Tensor tensor;
  if (value == nullptr) return tensor;
  TensorTypeAndShapeInfo* info = nullptr;
  Check(GetTensorTypeAndShape::Call(api, value, &info));
  const ShapeInfo shape(api, info);
  tensor.type = shape.type();
  tensor.dims = shape.dims();
  void* data = nullptr;
  Check(GetTensorMutableData::Call(api, const_cast<Value*>(value), &data));
  tensor.data = data == nullptr ? &kNothing : data;
  return tensor;
}

Tensor Input(const Api* api, const KernelContext* context, std::size_t index) {
  std::size_t count = 0;
  Check(KernelContext_GetInputCount::Call(api, context, &count));
  if (index >= count) return Tensor();
  const Value* value = nullptr;
  Check(KernelContext_GetInput::Call(api, context, index, &value));
  return View(api, value);
}

void* Output(const Api* api, KernelContext* context, std::size_t index, const Dims& dims) {
  std::size_t count = 0;
  Check(KernelContext_GetOutputCount::Call(api, context, &count));
  if (index >= count) return nullptr;
  Value* value = nullptr;
  Check(KernelContext_GetOutput::Call(api, context, index, dims.data(), dims.size(), &value));
  if (value == nullptr) return nullptr;
  void* data = nullptr;
  Check(GetTensorMutableData::Call(api, value, &data));
  return data;
}

Tensor ConstantInput(const Api* api, const KernelInfo* info, std::size_t index) {
  std::size_t count = 0;
  Check(KernelInfo_GetInputCount::Call(api, info, &count));
  if (index >= count) return Tensor();
  int is_constant = 0;
  const Value* value = nullptr;
  Check(KernelInfoGetConstantInput_tensor::Call(api, info, index, &is_constant, &value));
  return View(api, is_constant != 0 ? value : nullptr);
}

int64_t IntAttribute(const Api* api, const KernelInfo* info, const char* name, int64_t fallback) {
  int64_t value = 0;
  if (Succeeded(api, KernelInfoGetAttribute_int64::Call(api, info, name, &value))) return value;
  RefuseOtherTypes(api, info, name, "int");
  return fallback;
}

int64_t RequiredInt(const Api* api, const KernelInfo* info, const char* name) {
  if (!HasInt(api, info, name)) {
    throw InvalidArgument(std::string("attribute ") + name + " (int) is missing");
  }
  return IntAttribute(api, info, name, 0);
}

float FloatAttribute(const Api* api, const KernelInfo* info, const char* name, float fallback) {
  float value = 0.0F;
  if (Succeeded(api, KernelInfoGetAttribute_float::Call(api, info, name, &value))) return value;
  RefuseOtherTypes(api, info, name, "float");
  return fallback;
}

std::string StringAttribute(const Api* api, const KernelInfo* info, const char* name,
                            const char* fallback) {
  std::size_t size = 0;
  if (!Succeeded(api, KernelInfoGetAttribute_string::Call(api, info, name, nullptr, &size))) {
    RefuseOtherTypes(api, info, name, "string");
    return fallback;
  }
  std::string text(size, '\0');
  Check(KernelInfoGetAttribute_string::Call(api, info, name, text.data(), &size));
  return text.c_str();  // without the terminator, which `size` counts
}

std::vector<int64_t> IntsAttribute(const Api* api, const KernelInfo* info, const char* name) {
  std::size_t count = 0;
  if (!Succeeded(api, KernelInfoGetAttributeArray_int64::Call(api, info, name, nullptr, &count))) {
    throw InvalidArgument(std::string("attribute ") + name + " (ints) is missing");
  }
  std::vector<int64_t> values(count);
  if (count > 0) {
    Check(KernelInfoGetAttributeArray_int64::Call(api, info, name, values.data(), &count));
  }
  return values;
}

bool HasInput(const Api* api, const KernelInfo* info, std::size_t index) {
  std::size_t count = 0;
  Check(KernelInfo_GetInputCount::Call(api, info, &count));
  if (index >= count) return false;
  std::size_t size = 0;  // with the terminator
  Check(KernelInfo_GetInputName::Call(api, info, index, nullptr, &size));
  return size > 1;
}

std::string NodeLabel(const Api* api, const KernelInfo* info, const char* op) {
  std::size_t size = 0;
  Check(KernelInfo_GetNodeName::Call(api, info, nullptr, &size));
  std::string name(size, '\0');
  if (size > 0) Check(KernelInfo_GetNodeName::Call(api, info, name.data(), &size));
  return std::string(op) + " node '" + name.c_str() + "'";
}

std::string ForcedKernel() {
  const char* forced = std::getenv("BIVLM_FORCE_KERNEL");  // NOLINT(concurrency-mt-unsafe)
  return forced == nullptr ? "" : forced;
}

std::string ForcedKernelProblem(const std::string& forced, const std::string& available) {
  return "BIVLM_FORCE_KERNEL=" + forced + " names no kernel that this build and this CPU have" +
         "; available here: " + available;
}

InferredShape InferenceInput(const Api* api, const ShapeInferContext* context, std::size_t index) {
  InferredShape shape;
  std::size_t count = 0;
  Check(ShapeInferContext_GetInputCount::Call(api, context, &count));
  if (index >= count) return shape;
  TensorTypeAndShapeInfo* raw = nullptr;
  if (!Succeeded(api, ShapeInferContext_GetInputTypeShape::Call(api, context, index, &raw)) ||
      raw == nullptr) {
    return shape;
  }
  // Not freed: it belongs to the context.
  Check(GetTensorElementType::Call(api, raw, &shape.type));
  std::size_t rank = 0;
  Check(GetDimensionsCount::Call(api, raw, &rank));
  shape.dims.resize(rank);
  std::vector<const char*> names(rank, nullptr);
  if (rank > 0) {
    Check(GetDimensions::Call(api, raw, shape.dims.data(), rank));
    Check(GetSymbolicDimensions::Call(api, raw, names.data(), rank));
  }
  for (std::size_t i = 0; i < rank; ++i) {
    shape.names.emplace_back(names[i] == nullptr ? "" : names[i]);
    // Without a name ONNX Runtime would take the -1 for a size.
    if (shape.dims[i] < 0 && shape.names[i].empty()) shape.names[i] = UniqueSizeName("unknown");
  }
  shape.known = true;
  return shape;
}

void SetInferenceOutput(const Api* api, const ShapeInferContext* context, std::size_t index,
                        const InferredShape& shape) {
  TensorTypeAndShapeInfo* raw = nullptr;
  Check(CreateTensorTypeAndShapeInfo::Call(api, &raw));
  const ShapeInfo info(api, raw);
  Check(SetTensorElementType::Call(api, raw, shape.type));
  Check(SetDimensions::Call(api, raw, shape.dims.data(), shape.dims.size()));
  std::vector<const char*> names;
  for (const std::string& name : shape.names) names.push_back(name.c_str());
  names.resize(shape.dims.size(), "");
  Check(SetSymbolicDimensions::Call(api, raw, names.data(), names.size()));
  Check(ShapeInferContext_SetOutputTypeShape::Call(api, context, index, raw));
}

std::string UniqueSizeName(const char* prefix) {
  // Starts anew in every process, since a saved graph may bring names of an earlier one.
  static std::atomic<int64_t> count{std::chrono::system_clock::now().time_since_epoch().count()};
  return std::string("bivlm_") + prefix + "_" + std::to_string(count.fetch_add(1));
}

int64_t InferenceInt(const Api* api, const ShapeInferContext* context, const char* name) {
  const OpAttr* attribute = nullptr;
  Check(ShapeInferContext_GetAttribute::Call(api, context, name, &attribute));
  int64_t value = 0;
  std::size_t used = 0;
  Check(ReadOpAttr::Call(api, attribute, AttributeType::kInt, &value, sizeof(value), &used));
  return value;
}

}  // namespace bivlm::ort
