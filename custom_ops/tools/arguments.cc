#include "arguments.h"

#include <cerrno>
#include <cstdlib>
#include <functional>
#include <map>

#include "error.h"
#include "files.h"

namespace bivlm::device {
namespace {

int64_t Integer(const std::string& option, const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0) {
    throw RequestError(option + " takes a whole number, not '" + text + "'.");
  }
  return value;
}

double Number(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') {
    throw RequestError(option + " takes a number, not '" + text + "'.");
  }
  return value;
}

std::vector<int64_t> Numbers(const std::string& text, const std::string& source) {
  constexpr char kBetween[] = ", \t\r\n";
  std::vector<int64_t> found;
  std::size_t start = text.find_first_not_of(kBetween);
  while (start != std::string::npos) {
    const std::size_t end = text.find_first_of(kBetween, start);
    const std::string word = text.substr(start, end == std::string::npos ? end : end - start);
    if (word.find_first_not_of("-0123456789") != std::string::npos) {
      throw RequestError(source + " holds '" + word +
                         "', which is no token id. Give whole numbers with commas between them.");
    }
    found.push_back(Integer(source, word));
    start = end == std::string::npos ? end : text.find_first_not_of(kBetween, end);
  }
  return found;
}

}  // namespace

const char kHelp[] = R"(Usage: bivlm-device MODEL [PROMPT] [options]

Answers a question about a picture, or a question alone, with a model that bivlm-export wrote.
Needs libonnxruntime.so (1.17 or newer) and the operator library; no Python.

  MODEL                     the exported model.onnx; its .data and .assets lie beside it
  PROMPT                    the question
  --token-ids IDS|FILE      in place of PROMPT: the prompt's token ids ("1,2,3" or a file of them)
  --image FILE              one picture: PNG, JPEG or binary PPM or PGM
  --max-new-tokens N        longest answer (default: the model's own)
  --keep-tokens FRACTION    of the image tokens to keep, of a model exported with pruning
  --threads N               of one operator (default: physical cores)
  --onnxruntime FILE        libonnxruntime.so (default: BIVLM_ONNXRUNTIME, else the loader's)
  --library FILE            operator library (default: BIVLM_OPS_LIBRARY, or with --provider cuda
                            BIVLM_CUDA_OPS_LIBRARY; else beside this program)
  --provider cpu|cuda       where the graph runs: cuda on an NVIDIA GPU (default: cpu)
  --no-custom-ops           run on stock ONNX Runtime operators
  --json                    print one line of JSON only
  --show pixels|token-ids   print pixel_values (float32, raw) or the prompt's token ids (JSON) and
                            stop: for comparison with bivlm-run
  --bench                   measure load time, first token, prefill, decode and memory; prints the
                            JSON of bivlm-bench. Without --image the question alone is measured.
    --new-tokens N          tokens per answer; end tokens are ignored (default: 32)
    --repeats N             measured rounds (default: 10)
    --warmups N             rounds before, not counted (default: 2)
    --context N             tokens in the KV cache when decoding starts (default: the prompt's)

Examples:
  bivlm-device model.onnx --image cat.png "what is this?"
  bivlm-device model.onnx --image cat.jpg --bench
  bivlm-device model.onnx --token-ids 1,306,626 --json

Exit codes: 0 done, 1 unexpected, 2 the request cannot be carried out, 3 an input file is bad.
)";

Arguments ParseArguments(const std::vector<std::string>& words) {
  Arguments arguments;
  const std::map<std::string, bool*> flags = {{"--no-custom-ops", &arguments.no_custom_ops},
                                              {"--json", &arguments.json},
                                              {"--help", &arguments.help},
                                              {"--bench", &arguments.bench}};
  using Setter = std::function<void(const std::string&)>;
  const std::map<std::string, Setter> options = {
      {"--token-ids", [&](const std::string& text) { arguments.token_ids = text; }},
      {"--image",
       [&](const std::string& text) {
         if (!arguments.image.empty()) {
           throw RequestError(
               "--image is given twice; this command supports one picture per question.");
         }
         arguments.image = text;
       }},
      {"--onnxruntime", [&](const std::string& text) { arguments.onnxruntime = text; }},
      {"--library", [&](const std::string& text) { arguments.library = text; }},
      {"--provider",
       [&](const std::string& text) {
         if (text != "cpu" && text != "cuda") {
           throw RequestError("--provider '" + text + "' is not known. Accepted: cpu, cuda.");
         }
         arguments.provider = text;
       }},
      {"--show", [&](const std::string& text) { arguments.show = text; }},
      {"--keep-tokens",
       [&](const std::string& text) { arguments.keep_tokens = Number("--keep-tokens", text); }},
      {"--threads",
       [&](const std::string& text) {
         const int64_t threads = Integer("--threads", text);
         if (threads < 1 || threads > 1024) {
           throw RequestError("--threads " + text + " is not a number of threads. Give 1 or more.");
         }
         arguments.threads = static_cast<int>(threads);
       }},
      {"--max-new-tokens",
       [&](const std::string& text) {
         arguments.max_new_tokens = Integer("--max-new-tokens", text);
       }},
      {"--new-tokens",
       [&](const std::string& text) { arguments.new_tokens = Integer("--new-tokens", text); }},
      {"--repeats",
       [&](const std::string& text) { arguments.repeats = Integer("--repeats", text); }},
      {"--warmups",
       [&](const std::string& text) { arguments.warmups = Integer("--warmups", text); }},
      {"--context",
       [&](const std::string& text) { arguments.context = Integer("--context", text); }}};
  bool only_words = false;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (only_words || word.empty() || word[0] != '-') {
      if (arguments.model.empty()) {
        arguments.model = word;
      } else if (!arguments.prompt.has_value()) {
        arguments.prompt = word;
      } else {
        throw RequestError("'" + word +
                           "' is one word too many: give MODEL and one PROMPT, in quotes.");
      }
      continue;
    }
    if (word == "--") {
      only_words = true;
      continue;
    }
    if (const auto flag = flags.find(word); flag != flags.end()) {
      *flag->second = true;
      continue;
    }
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const auto option = options.find(name);
    if (option == options.end()) {
      throw RequestError("'" + name + "' is no option. See bivlm-device --help.");
    }
    if (equals == std::string::npos && i + 1 == words.size()) {
      throw RequestError(name + " needs a value. See bivlm-device --help.");
    }
    option->second(equals == std::string::npos ? words[++i] : word.substr(equals + 1));
    if (name == "--new-tokens" || name == "--repeats" || name == "--warmups" ||
        name == "--context") {
      arguments.bench_option = name;
    }
  }
  return arguments;
}

std::vector<int64_t> ParseTokenIds(const std::string& text) {
  const bool is_list = text.find_first_not_of("-0123456789, ") == std::string::npos;
  std::vector<int64_t> found =
      is_list ? Numbers(text, "--token-ids")
              : Numbers(ReadFile(text, "is no file of token ids. Give one, or numbers: 1,2,3."),
                        "'" + text + "'");
  if (found.empty()) throw RequestError("--token-ids holds no token ids. Give numbers: 1,2,3.");
  return found;
}

}  // namespace bivlm::device
