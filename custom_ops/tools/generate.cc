#include "generate.h"

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"

namespace bivlm::device {
namespace {

constexpr int64_t kGrowth = 256;  // tokens of an answer that the cache has room for at first

}  // namespace

Generation::Generation(const Session& session, std::vector<int64_t> prompt_ids, PixelBatch pixels,
                       std::optional<int64_t> max_new_tokens)
    : session_(session), prompt_(std::move(prompt_ids)), pixels_(std::move(pixels)) {
  const Manifest& manifest = session.manifest();
  limit_ = max_new_tokens.value_or(manifest.max_new_tokens);
  prompt_tokens_ = static_cast<int64_t>(prompt_.size());
  if (limit_ < 1) {
    throw RequestError("--max-new-tokens " + std::to_string(limit_) +
                       " leaves nothing to answer. Give 1 or more.");
  }
  if (prompt_.empty()) throw RequestError("the prompt has no tokens. Give a question.");
  for (const int64_t token : prompt_) {
    if (token < 0 || token >= manifest.vocab_size) {
      throw RequestError("token id " + std::to_string(token) + " is outside the vocabulary: '" +
                         manifest.name + "' has 0 to " + std::to_string(manifest.vocab_size - 1) +
                         ".");
    }
  }
  const int64_t of_images = std::count(prompt_.begin(), prompt_.end(), manifest.image_token_id);
  if (prompt_tokens_ >= manifest.context_length) {
    throw RequestError("the prompt has " + std::to_string(prompt_tokens_) + " tokens (" +
                       std::to_string(of_images) + " of them for images); the model takes " +
                       std::to_string(manifest.context_length) +
                       " in all, and the answer needs at least one. Shorten the prompt.");
  }
  const int64_t needed = pixels_.images * manifest.image_tokens;
  if (of_images != needed) {
    throw RequestError(
        "the prompt has " + std::to_string(of_images) + " image placeholders (token " +
        std::to_string(manifest.image_token_id) + "); " + std::to_string(pixels_.images) +
        " images of " + std::to_string(manifest.image_tokens) + " tokens need " +
        std::to_string(needed) + ". Give every image its run of placeholders, and no others.");
  }
  cache_ = std::make_unique<KvCache>(
      session, std::min(prompt_tokens_ + std::min(limit_, kGrowth), manifest.context_length));
}

std::optional<int64_t> Generation::Next() {
  const Manifest& manifest = session_.manifest();
  if (stop_reason_ == nullptr && new_tokens_ == limit_) stop_reason_ = "length";
  if (stop_reason_ == nullptr && prompt_tokens_ + new_tokens_ >= manifest.context_length) {
    stop_reason_ = "context";
  }
  if (stop_reason_ != nullptr) return std::nullopt;
  const int64_t token = Greedy(session_, Run());
  const std::vector<int64_t>& ends = manifest.eos_token_ids;
  if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
    stop_reason_ = "end";
    return std::nullopt;
  }
  ++new_tokens_;
  last_ = token;
  return token;
}

const void* Generation::Run() {
  if (prompt_.empty()) return cache_->Run({last_}, {}).logits;
  const void* const logits = cache_->Run(prompt_, pixels_).logits;
  kept_tokens_ = cache_->tokens();
  prompt_.clear();
  pixels_ = {};
  return logits;
}

}  // namespace bivlm::device
