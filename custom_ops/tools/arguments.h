// The command line of bivlm-device.
#ifndef BIVLM_TOOLS_ARGUMENTS_H_
#define BIVLM_TOOLS_ARGUMENTS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace bivlm::device {

struct Arguments {
  std::string model;
  std::optional<std::string> prompt;
  std::optional<std::string> token_ids;  // numbers, or the file that holds them
  std::string image;                     // "": none
  std::string onnxruntime;
  std::string library;
  std::string provider = "cpu";  // or "cuda"
  std::optional<int64_t> max_new_tokens;
  std::optional<double> keep_tokens;
  std::optional<int> threads;
  bool no_custom_ops = false;
  bool json = false;
  bool help = false;
  bool bench = false;
  int64_t new_tokens = 32;
  int64_t repeats = 10;
  int64_t warmups = 2;
  std::optional<int64_t> context;
  // What only --bench takes and was given; "" if nothing was.
  std::string bench_option;
  // Print what was computed on the way instead of an answer: "pixels" or "token-ids".
  std::string show;
};

// Throws RequestError for what is not understood.
Arguments ParseArguments(const std::vector<std::string>& words);

// "1,2,3", or the numbers in the file of that name, apart by commas or white space.
std::vector<int64_t> ParseTokenIds(const std::string& text);

extern const char kHelp[];

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_ARGUMENTS_H_
