#include "ort_runtime.h"

#include <dlfcn.h>

#include <cstdlib>

#include "error.h"

namespace bivlm::device {
namespace {

constexpr char kVariable[] = "BIVLM_ONNXRUNTIME";

void* Open(const std::string& path) {
  if (!path.empty()) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) return library;
    throw RequestError(
        "'" + path + "' does not load as ONNX Runtime: " + dlerror() +
        ". Give a libonnxruntime.so of this machine's architecture (--onnxruntime, " + kVariable +
        "); the Python wheel onnxruntime holds one in onnxruntime/capi.");
  }
  for (const char* name : {"libonnxruntime.so.1", "libonnxruntime.so"}) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
  }
  throw RequestError(std::string("the loader finds no libonnxruntime.so. Name it with "
                                 "--onnxruntime FILE or ") +
                     kVariable + "; the Python wheel onnxruntime holds one in onnxruntime/capi.");
}

std::string Chosen(const std::string& path) {
  const char* variable = std::getenv(kVariable);  // NOLINT(concurrency-mt-unsafe)
  return path.empty() && variable != nullptr ? variable : path;
}

}  // namespace

OrtRuntime::OrtRuntime(const std::string& path) : library_(Open(Chosen(path))) {
  const auto get_base =
      reinterpret_cast<const ort::ApiBase* (*)()>(dlsym(library_, "OrtGetApiBase"));
  if (get_base == nullptr) {
    throw RequestError("'" + Chosen(path) +
                       "' is no ONNX Runtime: it has no OrtGetApiBase. Give a libonnxruntime.so.");
  }
  version_ = get_base()->get_version_string();
  api_ = get_base()->get_api(ort::kApiVersion);
  if (api_ == nullptr) {
    throw RequestError("ONNX Runtime " + version_ + " is too old: 1.17 or newer is needed.");
  }
  Check(ort::CreateEnv::Call(api_, ort::LoggingLevel::kFatal, "bivlm-device", &env_));
  Check(ort::CreateCpuMemoryInfo::Call(api_, ort::AllocatorType::kDevice, ort::MemoryType::kDefault,
                                       &memory_));
  Check(ort::GetAllocatorWithDefaultOptions::Call(api_, &allocator_));
}

OrtRuntime::~OrtRuntime() {
  ort::ReleaseMemoryInfo::Call(api_, memory_);
  ort::ReleaseEnv::Call(api_, env_);
  // The library stays: its threads' destructors may still run.
}

void OrtRuntime::Check(ort::Status* status) const {
  if (status == nullptr) return;
  std::string message = ort::GetErrorMessage::Call(api_, status);
  ort::ReleaseStatus::Call(api_, status);
  message = message.substr(0, message.find('\n'));
  while (!message.empty() && (message.back() == '.' || message.back() == ' ')) message.pop_back();
  throw OrtError(message);
}

std::string OrtRuntime::Take(char* text) const {
  const std::string copy = text;
  Check(ort::AllocatorFree::Call(api_, allocator_, text));
  return copy;
}

OwnedValue TensorView(const OrtRuntime& runtime, ort::ElementType type,
                      const std::vector<int64_t>& dims, void* data, std::size_t bytes,
                      const ort::MemoryInfo* memory) {
  ort::Value* value = nullptr;
  runtime.Check(ort::CreateTensorWithDataAsOrtValue::Call(
      runtime.api(), memory == nullptr ? runtime.memory() : memory, data, bytes, dims.data(),
      dims.size(), type, &value));
  return OwnedValue(value, {runtime.api()});
}

}  // namespace bivlm::device
