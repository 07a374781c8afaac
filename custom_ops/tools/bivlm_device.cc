// bivlm-device: one question, one answer, without Python.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "arguments.h"
#include "bench.h"
#include "bundle.h"
#include "error.h"
#include "generate.h"
#include "ort_runtime.h"
#include "picture.h"
#include "preprocess.h"
#include "prompt.h"
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

// Token ids of the prompt that was asked for, in words or in numbers.
std::vector<int64_t> PromptIds(const Arguments& arguments, const PromptBuilder* prompts,
                               const PreparedPicture& picture) {
  if (arguments.token_ids.has_value()) return ParseTokenIds(*arguments.token_ids);
  return prompts->Encode(*arguments.prompt, picture);
}

// Prints what a run would be given; needs no ONNX Runtime.
void Show(const Arguments& arguments) {
  const BundlePaths paths{arguments.model};
  const Manifest manifest = ReadBundle(paths);
  PreparedPicture picture;
  if (!arguments.image.empty()) picture = Preprocess(ReadPicture(arguments.image), manifest);
  if (arguments.show == "pixels") {
    const std::vector<float>& values = picture.batch.values;
    Print({reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)});
    return;
  }
  const PromptBuilder prompts(paths, manifest);
  Print(Json(PromptIds(arguments, &prompts, picture)).dump() + "\n");
}

// The tokenizer of the bundle; with --token-ids one of another kind is no hindrance.
std::unique_ptr<PromptBuilder> OpenPrompts(const Arguments& arguments, const Session& session) {
  try {
    return std::make_unique<PromptBuilder>(session.paths(), session.manifest());
  } catch (const Error&) {
    if (!arguments.token_ids.has_value()) throw;
    return nullptr;
  }
}

int Answer(const Arguments& arguments, const Session& session) {
  const auto prompts = OpenPrompts(arguments, session);
  const auto start = std::chrono::steady_clock::now();
  PreparedPicture picture;
  if (!arguments.image.empty()) {
    picture = Preprocess(ReadPicture(arguments.image), session.manifest());
  }
  const std::vector<int64_t> ids = PromptIds(arguments, prompts.get(), picture);
  Generation generation(session, ids, std::move(picture.batch), arguments.max_new_tokens);
  std::unique_ptr<TextStream> stream;
  if (prompts != nullptr) stream = std::make_unique<TextStream>(prompts->tokenizer());
  std::vector<int64_t> answer;
  std::string text;
  const auto put = [&](const std::string& piece) {
    text += piece;
    if (!arguments.json) Print(piece);
  };
  while (const std::optional<int64_t> token = generation.Next()) {
    answer.push_back(*token);
    put(stream == nullptr ? std::to_string(*token) + " " : stream->Add(*token));
  }
  if (stream != nullptr) put(stream->Finish());
  if (!arguments.json) {
    Print("\n");
    return 0;
  }
  const Json values = {{"text", stream == nullptr ? Json(nullptr) : Json(text)},
                       {"prompt_tokens", generation.prompt_tokens()},
                       {"kept_tokens", generation.kept_tokens()},
                       {"new_tokens", generation.new_tokens()},
                       {"stop_reason", generation.stop_reason()},
                       {"seconds", std::round(SecondsSince(start) * 1e4) / 1e4},
                       {"token_ids", answer}};
  Print(values.dump() + "\n");
  return 0;
}

void CheckArguments(const Arguments& arguments) {
  if (arguments.model.empty()) throw RequestError("MODEL is missing. See bivlm-device --help.");
  if (!arguments.bench && !arguments.bench_option.empty()) {
    throw RequestError(arguments.bench_option + " is about --bench. Leave it out, or add --bench.");
  }
  if (arguments.bench && (!arguments.show.empty() || arguments.max_new_tokens.has_value())) {
    throw RequestError("--bench goes with neither --show nor --max-new-tokens. Leave them out.");
  }
  if (!arguments.show.empty() && arguments.show != "pixels" && arguments.show != "token-ids") {
    throw RequestError("--show is 'pixels' or 'token-ids', not '" + arguments.show + "'.");
  }
  if (arguments.show == "pixels" && arguments.image.empty()) {
    throw RequestError("--show pixels needs a picture: --image FILE.");
  }
  if (arguments.prompt.has_value() && arguments.token_ids.has_value()) {
    throw RequestError("PROMPT and --token-ids were both given. Leave one of them out.");
  }
  const bool needs_prompt = !arguments.bench && arguments.show != "pixels";
  if (needs_prompt && !arguments.prompt.has_value() && !arguments.token_ids.has_value()) {
    throw RequestError("PROMPT is missing. Give a question, or its token ids with --token-ids.");
  }
}

// As bivlm_edge/memory.py: glibc would keep freed memory, the more the larger the blocks.
void KeepNoFreedMemory() {
#ifdef __GLIBC__
  mallopt(M_TRIM_THRESHOLD, 128 << 10);
#endif
}

int Run(const std::vector<std::string>& words) {
  const Arguments arguments = ParseArguments(words);
  if (arguments.help) {
    Print(kHelp);
    return 0;
  }
  CheckArguments(arguments);
  if (!arguments.show.empty()) {
    Show(arguments);
    return 0;
  }
  const OrtRuntime runtime(arguments.onnxruntime);
  if (arguments.bench) {
    Print(Bench(runtime, arguments) + "\n");
    return 0;
  }
  const Session session(runtime, BundlePaths{arguments.model},
                        {arguments.library, !arguments.no_custom_ops, arguments.threads,
                         arguments.keep_tokens, arguments.provider == "cuda"});
  return Answer(arguments, session);
}

}  // namespace
}  // namespace bivlm::device

int main(int count, char** words) {
  bivlm::device::KeepNoFreedMemory();
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
