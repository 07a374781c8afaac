#include "bundle.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "error.h"
#include "files.h"
#include "sha256.h"

namespace bivlm::device {
namespace {

using Json = nlohmann::json;

constexpr int kBundleVersion = 2;
constexpr int kPromptVersion = 1;
constexpr uint64_t kProbeBlocks = 256;
constexpr uint64_t kProbeBlockBytes = 4096;

template <typename T>
std::optional<T> Optional(const Json& values, const char* name) {
  const auto found = values.find(name);
  if (found == values.end() || found->is_null()) return std::nullopt;
  return found->get<T>();
}

ImageSpec ReadImageSpec(const Json& values) {
  ImageSpec spec;
  spec.family = values.at("family").get<std::string>();
  spec.resize_mode = values.at("resize_mode").get<std::string>();
  spec.resize = values.at("resize").get<std::array<int, 2>>();
  spec.resample = values.at("resample").get<int>();
  spec.crop = Optional<std::array<int, 2>>(values, "crop");
  spec.rescale = Optional<double>(values, "rescale");
  spec.mean = values.at("mean").get<std::vector<double>>();
  spec.std = values.at("std").get<std::vector<double>>();
  spec.background = Optional<std::array<int, 3>>(values, "background");
  spec.split_tiles = Optional<bool>(values, "split_tiles").value_or(false);
  return spec;
}

Manifest FromJson(const Json& values) {
  Manifest manifest;
  manifest.name = values.at("name").get<std::string>();
  manifest.layers = values.at("layers").get<int>();
  manifest.kv_heads = values.at("kv_heads").get<int64_t>();
  manifest.head_dim = values.at("head_dim").get<int64_t>();
  manifest.dtype = values.at("dtype").get<std::string>();
  manifest.context_length = values.at("context_length").get<int64_t>();
  manifest.vocab_size = values.at("vocab_size").get<int64_t>();
  manifest.image_token_id = values.at("image_token_id").get<int64_t>();
  manifest.image_token = values.at("image_token").get<std::string>();
  manifest.image_tokens = values.at("image_tokens").get<int64_t>();
  manifest.pixel_shape = values.at("pixel_shape").get<std::array<int64_t, 3>>();
  manifest.bos_token_id = Optional<int64_t>(values, "bos_token_id");
  manifest.eos_token_ids = values.at("eos_token_ids").get<std::vector<int64_t>>();
  manifest.max_new_tokens = values.at("max_new_tokens").get<int64_t>();
  manifest.image = ReadImageSpec(values.at("image"));
  manifest.image_prompt = values.at("image_prompt").get<std::string>();
  manifest.uses_custom_ops = values.at("uses_custom_ops").get<bool>();
  manifest.fallback = values.at("fallback").get<std::string>();
  manifest.image_grid = Optional<std::array<int64_t, 2>>(values, "image_grid");
  return manifest;
}

std::string FileName(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

void CheckFile(const std::string& path, const Json& record, bool whole) {
  const uint64_t size = FileSize(path);
  const uint64_t expected = record.at("bytes").get<uint64_t>();
  if (size != expected) {
    throw InputError("'" + path + "' has " + std::to_string(size) + " bytes, the manifest says " +
                     std::to_string(expected) +
                     ": it is truncated or belongs to another export. Copy the file again, or "
                     "export again.");
  }
  std::string found;
  if (whole) {
    const std::string bytes = ReadFile(path, "cannot be read.");
    Sha256 digest;
    digest.Add(bytes.data(), bytes.size());
    found = digest.Hex();
  } else {
    found = Probe(path);
  }
  if (found != record.at(whole ? "sha256" : "probe").get<std::string>()) {
    throw InputError("'" + path +
                     "' does not have the checksum in the manifest: it was changed or belongs to "
                     "another export. Copy all three parts of one export together, or export "
                     "again.");
  }
}

void CheckFiles(const BundlePaths& paths, const Json& values) {
  const Json& files = values.at("files");
  const std::string data_name = values.at("data_name").get<std::string>();
  if (files.contains("data") && FileName(paths.data()) != data_name) {
    throw InputError("'" + paths.graph + "' keeps its weights under the name '" + data_name +
                     "': rename the parts back, or export again under the new name.");
  }
  const std::array<std::pair<const char*, std::string>, 4> parts = {
      {{"graph", paths.graph},
       {"data", paths.data()},
       {"tokenizer", paths.tokenizer()},
       {"prompt", paths.prompt()}}};
  for (const auto& [role, path] : parts) {
    if (!files.contains(role)) continue;
    if (!IsFile(path)) {
      throw InputError("'" + path + "' is missing: it belongs to '" + FileName(paths.graph) +
                       "'. Copy all three parts of the export together, or export again.");
    }
    const bool is_small = path != paths.graph && path != paths.data();
    CheckFile(path, files.at(role), is_small);
  }
}

}  // namespace

std::string BundlePaths::assets() const {
  const std::size_t slash = graph.find_last_of('/');
  const std::size_t dot = graph.find_last_of('.');
  const bool has_suffix =
      dot != std::string::npos && (slash == std::string::npos || dot > slash + 1);
  return (has_suffix ? graph.substr(0, dot) : graph) + ".assets";
}

Manifest ReadBundle(const BundlePaths& paths) {
  if (!IsFile(paths.graph)) {
    throw InputError("'" + paths.graph +
                     "' is not there. Give the path of an exported .onnx file; bivlm-export writes "
                     "one.");
  }
  const std::string path = paths.assets() + "/manifest.json";
  const std::string text =
      ReadFile(path, "is missing: it belongs to '" + FileName(paths.graph) +
                         "' and was written beside it. Copy the folder '" +
                         FileName(paths.assets()) + "' next to the .onnx file, or export again.");
  try {
    const Json values = Json::parse(text);
    const int version = values.at("version").get<int>();
    if (version != kBundleVersion) {
      throw InputError("'" + path + "' has bundle version " + std::to_string(version) +
                       "; this build reads " + std::to_string(kBundleVersion) +
                       ". Export the model again with this version of bivlm-edge.");
    }
    CheckFiles(paths, values);
    return FromJson(values);
  } catch (const Json::exception& error) {
    throw InputError("'" + path + "' is not a manifest of bivlm-export (" + error.what() +
                     "). Export the model again.");
  }
}

PromptFrame ReadPromptFrame(const BundlePaths& paths, bool has_image) {
  const std::string path = paths.prompt();
  const std::string text =
      ReadFile(path,
               "is missing: the model was exported before the text round a question was written "
               "there. Export it again, or give token ids (--token-ids).");
  try {
    const Json values = Json::parse(text);
    const int version = values.at("version").get<int>();
    if (version != kPromptVersion) {
      throw InputError("'" + path + "' has version " + std::to_string(version) +
                       "; this build reads " + std::to_string(kPromptVersion) +
                       ". Export the model again, or give token ids (--token-ids).");
    }
    const Json& frame = values.at(has_image ? "with_image" : "without_image");
    if (frame.is_null()) {
      throw RequestError("the chat template of '" + FileName(paths.graph) +
                         "' does not put fixed text round a question " +
                         (has_image ? "with" : "without") +
                         " a picture, so that this tool cannot write the prompt. Render it with "
                         "transformers and give token ids (--token-ids).");
    }
    return {frame.at("before").get<std::string>(), frame.at("behind").get<std::string>(),
            frame.at("strips").get<bool>()};
  } catch (const Json::exception& error) {
    throw InputError("'" + path + "' is damaged (" + error.what() +
                     "). Copy it again, or export the model again.");
  }
}

std::string Probe(const std::string& path) {
  const uint64_t size = FileSize(path);
  const uint64_t last = size > kProbeBlockBytes ? size - kProbeBlockBytes : 0;
  std::ifstream stream(path, std::ios::binary);
  std::vector<char> block(kProbeBlockBytes);
  Sha256 digest;
  for (uint64_t index = 0; index < kProbeBlocks; ++index) {
    stream.clear();
    stream.seekg(static_cast<std::streamoff>(last * index / (kProbeBlocks - 1)));
    stream.read(block.data(), static_cast<std::streamsize>(block.size()));
    digest.Add(block.data(), static_cast<std::size_t>(stream.gcount()));
  }
  return digest.Hex();
}

}  // namespace bivlm::device
