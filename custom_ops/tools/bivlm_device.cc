// bivlm-device: one question, one answer, without Python.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "arguments.h"
#include "bundle.h"
#include "error.h"
#include "generate.h"
#include "ort_runtime.h"
#include "picture.h"
#include "preprocess.h"
#include "session.h"

namespace bivlm::device {
namespace {

using Json = nlohmann::ordered_json;

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Print(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

int Answer(const Arguments& arguments, const Session& session) {
  const auto start = std::chrono::steady_clock::now();
  PreparedPicture picture;
  if (!arguments.image.empty()) {
    picture = Preprocess(ReadPicture(arguments.image), session.manifest());
  }
  Generation generation(session, ParseTokenIds(*arguments.token_ids), std::move(picture.batch),
                        arguments.max_new_tokens);
  std::vector<int64_t> answer;
  while (const std::optional<int64_t> token = generation.Next()) {
    answer.push_back(*token);
    if (!arguments.json) Print(std::to_string(*token) + " ");
  }
  if (!arguments.json) {
    Print("\n");
    return 0;
  }
  const Json values = {{"text", nullptr},
                       {"prompt_tokens", generation.prompt_tokens()},
                       {"kept_tokens", generation.kept_tokens()},
                       {"new_tokens", generation.new_tokens()},
                       {"stop_reason", generation.stop_reason()},
                       {"seconds", std::round(SecondsSince(start) * 1e4) / 1e4},
                       {"token_ids", answer}};
  Print(values.dump() + "\n");
  return 0;
}

int Run(const std::vector<std::string>& words) {
  const Arguments arguments = ParseArguments(words);
  if (arguments.help) {
    Print(kHelp);
    return 0;
  }
  if (arguments.model.empty()) throw RequestError("MODEL is missing. See bivlm-device --help.");
  const OrtRuntime runtime(arguments.onnxruntime);
  const Session session(
      runtime, BundlePaths{arguments.model},
      {arguments.library, !arguments.no_custom_ops, arguments.threads, arguments.keep_tokens});
  return Answer(arguments, session);
}

}  // namespace
}  // namespace bivlm::device

int main(int count, char** words) {
  try {
    return bivlm::device::Run({words + 1, words + count});
  } catch (const bivlm::device::Error& error) {
    std::fprintf(stderr, "bivlm-device: %s\n", error.what());
    return error.exit_code();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bivlm-device: unexpected: %s\n", error.what());
    return 1;
  }
}
