// ONNX Runtime, found at run time: its library, an environment, and handles that free themselves.
#ifndef BIVLM_TOOLS_ORT_RUNTIME_H_
#define BIVLM_TOOLS_ORT_RUNTIME_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bivlm/ort_abi.h"

namespace bivlm::device {

// What ONNX Runtime says went wrong, for the caller to put into a sentence.
class OrtError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class OrtRuntime {
 public:
  // Opens libonnxruntime: `path`; or if that is "" the file that BIVLM_ONNXRUNTIME names, or what
  // the loader finds. Throws RequestError if there is none or it is older than 1.17.
  explicit OrtRuntime(const std::string& path);
  OrtRuntime(const OrtRuntime&) = delete;
  OrtRuntime& operator=(const OrtRuntime&) = delete;
  ~OrtRuntime();

  const ort::Api* api() const { return api_; }
  const ort::Env* env() const { return env_; }
  const ort::MemoryInfo* memory() const { return memory_; }
  ort::Allocator* allocator() const { return allocator_; }
  const std::string& version() const { return version_; }

  // Throws OrtError with the message of `status`, which is freed.
  void Check(ort::Status* status) const;

  // The string that a call of the session has allocated.
  std::string Take(char* text) const;

 private:
  void* library_ = nullptr;
  const ort::Api* api_ = nullptr;
  ort::Env* env_ = nullptr;
  ort::MemoryInfo* memory_ = nullptr;
  ort::Allocator* allocator_ = nullptr;
  std::string version_;
};

// Frees a handle with the function `Release` of the API.
template <typename Handle, typename Release>
struct Releaser {
  const ort::Api* api = nullptr;
  void operator()(Handle* handle) const { Release::Call(api, handle); }
};

template <typename Handle, typename Release>
using Owned = std::unique_ptr<Handle, Releaser<Handle, Release>>;

using OwnedBinding = Owned<ort::IoBinding, ort::ReleaseIoBinding>;
using OwnedMemoryInfo = Owned<ort::MemoryInfo, ort::ReleaseMemoryInfo>;
using OwnedOptions = Owned<ort::SessionOptions, ort::ReleaseSessionOptions>;
using OwnedRunOptions = Owned<ort::RunOptions, ort::ReleaseRunOptions>;
using OwnedSession = Owned<ort::Session, ort::ReleaseSession>;
using OwnedTypeInfo = Owned<ort::TypeInfo, ort::ReleaseTypeInfo>;
using OwnedValue = Owned<ort::Value, ort::ReleaseValue>;

inline std::size_t ElementSize(ort::ElementType type) {
  return type == ort::ElementType::kFloat16 ? 2 : type == ort::ElementType::kInt64 ? 8 : 4;
}

// A tensor that is a view of `data`, which must outlive it and lies where `memory` says; null: on
// the host.
OwnedValue TensorView(const OrtRuntime& runtime, ort::ElementType type,
                      const std::vector<int64_t>& dims, void* data, std::size_t bytes,
                      const ort::MemoryInfo* memory = nullptr);

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_ORT_RUNTIME_H_
