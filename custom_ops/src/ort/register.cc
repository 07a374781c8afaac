// RegisterCustomOps, the one function that the library exports.
#include <cstdlib>
#include <list>
#include <mutex>
#include <string>

#include "adaptor.h"
#include "operators.h"

namespace bivlm::ort {
namespace {

constexpr const char* kDomain = "ai.bivlm";

// N of an ONNX Runtime 1.N, which is also its API version.
uint32_t MinorVersion(const ApiBase* base) {
  const std::string version = base->get_version_string();
  const std::size_t dot = version.find('.');
  if (dot == std::string::npos) return 0;
  return static_cast<uint32_t>(std::strtoul(version.c_str() + dot + 1, nullptr, 10));
}

// The domain and its operators for one copy of ONNX Runtime. Sessions keep pointers to both, so a
// registration is never freed.
struct Registration {
  const Api* api;
  std::vector<Operator> ops;
  CustomOpDomain* domain = nullptr;

  Registration(const Api* used, bool infers_shapes) : api(used), ops(kLibrary.operators(used)) {
    Check(CreateCustomOpDomain::Call(api, kDomain, &domain));
    for (Operator& op : ops) {
      if (!infers_shapes) op.InferOutputShapeFn = nullptr;
      Check(CustomOpDomain_Add::Call(api, domain, &op));
    }
  }
};

CustomOpDomain* DomainFor(const Api* api, uint32_t minor_version) {
  static std::mutex mutex;
  static auto& registrations = *new std::list<Registration>();  // outlives the sessions
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Registration& registration : registrations) {
    if (registration.api == api) return registration.domain;
  }
  // Before 1.24 (seen on 1.20 to 1.23) ONNX Runtime itself crashes when it prepares the shape
  // inference of a custom operator that lacks an optional input before one that it has.
  return registrations.emplace_back(api, minor_version >= 24).domain;
}

// ONNX Runtime older than the API this library uses: its own API still makes a status.
Status* RefuseOldRuntime(const ApiBase* base) {
  const Api* api = base->get_api(MinorVersion(base));
  if (api == nullptr) api = base->get_api(1);
  if (api == nullptr) return nullptr;
  const std::string message = kLibrary.name + std::string(" " BIVLM_VERSION) +
                              " needs ONNX Runtime 1." + std::to_string(kLibrary.api_version) +
                              " or newer, this is " + base->get_version_string() +
                              ": upgrade onnxruntime";
  return CreateStatus::Call(api, ErrorCode::kNotImplemented, message.c_str());
}

}  // namespace
}  // namespace bivlm::ort

// Adds the operators of domain ai.bivlm to the options of a session.
extern "C" __attribute__((visibility("default"))) bivlm::ort::Status* RegisterCustomOps(
    bivlm::ort::SessionOptions* options, const bivlm::ort::ApiBase* base) {
  using namespace bivlm::ort;  // NOLINT(google-build-using-namespace)
  const Api* api = base->get_api(kLibrary.api_version);
  if (api == nullptr) return RefuseOldRuntime(base);
  return Guard(api, "RegisterCustomOps", [&] {
    CustomOpDomain* domain = DomainFor(api, MinorVersion(base));
    Check(AddCustomOpDomain::Call(api, options, domain));
  });
}
