// An exported model on disk: what bivlm_edge/bundle.py says, read without Python.
#ifndef BIVLM_TOOLS_BUNDLE_H_
#define BIVLM_TOOLS_BUNDLE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace bivlm::device {

// How a picture becomes pixel_values; see ImageSpec in bivlm_edge/bundle.py.
struct ImageSpec {
  std::string family;
  std::string resize_mode;
  std::array<int, 2> resize{};  // height, width
  int resample = 0;
  std::optional<std::array<int, 2>> crop;  // height, width
  std::optional<double> rescale;
  std::vector<double> mean;  // per channel, or none
  std::vector<double> std;
  std::optional<std::array<int, 3>> background;
  bool split_tiles = false;
};

// The fields of the manifest that running the model needs.
struct Manifest {
  std::string name;
  int layers = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  std::string dtype;  // "fp32" or "fp16"
  int64_t context_length = 0;
  int64_t vocab_size = 0;
  int64_t image_token_id = 0;
  std::string image_token;
  int64_t image_tokens = 0;
  std::array<int64_t, 3> pixel_shape{};
  std::optional<int64_t> bos_token_id;
  std::vector<int64_t> eos_token_ids;
  int64_t max_new_tokens = 0;
  ImageSpec image;
  std::string image_prompt;
  bool uses_custom_ops = false;
  std::string fallback;
  std::optional<std::array<int64_t, 2>> image_grid;  // rows, columns
};

// Text before and behind the question of one user turn.
struct PromptFrame {
  std::string before;
  std::string behind;
  bool strips = false;  // the template drops white space round the question
};

struct BundlePaths {
  std::string graph;

  std::string data() const { return graph + ".data"; }
  std::string assets() const;
  std::string tokenizer() const { return assets() + "/tokenizer.json"; }
  std::string prompt() const { return assets() + "/prompt.json"; }
};

// Reads the manifest and checks that the files are those it was written for: size and probe of
// graph and data (about 1 MiB is read), all of the small files. Throws InputError.
Manifest ReadBundle(const BundlePaths& paths);

// The frame of questions with or without a picture. Throws InputError if the export has none.
PromptFrame ReadPromptFrame(const BundlePaths& paths, bool has_image);

// SHA-256 of up to 256 blocks of 4096 bytes spread over the file.
std::string Probe(const std::string& path);

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_BUNDLE_H_
