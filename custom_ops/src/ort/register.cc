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

// The domain and its operators for one copy of ONNX Runtime. Sessions keep pointers to both, so a
// registration lives as long as the process.
struct Registration {
  const Api* api;
  Operator ops[3];
  CustomOpDomain* domain = nullptr;

  explicit Registration(const Api* used)
      : api(used),
        ops{MakeBinaryMatMulOp(used), MakeTokenPruneOp(used, ElementType::kFloat32),
            MakeTokenPruneOp(used, ElementType::kFloat16)} {
    Check(CreateCustomOpDomain::Call(api, kDomain, &domain));
    for (const Operator& op : ops) Check(CustomOpDomain_Add::Call(api, domain, &op));
  }
};

CustomOpDomain* DomainFor(const Api* api) {
  static std::mutex mutex;
  static auto& registrations = *new std::list<Registration>();  // outlives the sessions
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Registration& registration : registrations) {
    if (registration.api == api) return registration.domain;
  }
  return registrations.emplace_back(api).domain;
}

// ONNX Runtime older than the API this library uses: its own API still makes a status.
Status* RefuseOldRuntime(const ApiBase* base) {
  const std::string version = base->get_version_string();
  const std::size_t dot = version.find('.');
  const char* minor = version.c_str() + (dot == std::string::npos ? version.size() : dot + 1);
  const Api* api = base->get_api(static_cast<uint32_t>(std::strtoul(minor, nullptr, 10)));
  if (api == nullptr) api = base->get_api(1);
  if (api == nullptr) return nullptr;
  const std::string message = "bivlm_custom_ops " BIVLM_VERSION
                              " needs ONNX Runtime 1.17 or newer, this is " +
                              version + ": upgrade onnxruntime";
  return CreateStatus::Call(api, ErrorCode::kNotImplemented, message.c_str());
}

}  // namespace
}  // namespace bivlm::ort

// Adds the operators of domain ai.bivlm to the options of a session.
extern "C" __attribute__((visibility("default"))) bivlm::ort::Status* RegisterCustomOps(
    bivlm::ort::SessionOptions* options, const bivlm::ort::ApiBase* base) {
  using namespace bivlm::ort;  // NOLINT(google-build-using-namespace)
  const Api* api = base->get_api(kApiVersion);
  if (api == nullptr) return RefuseOldRuntime(base);
  return Guard(api, "RegisterCustomOps",
               [&] { Check(AddCustomOpDomain::Call(api, options, DomainFor(api))); });
}
