// The loop: prefill, then one token after the other; the most likely one each time.
#ifndef BIVLM_TOOLS_GENERATE_H_
#define BIVLM_TOOLS_GENERATE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "session.h"

namespace bivlm::device {

class Generation {
 public:
  // Checks the request; nothing runs yet. Throws RequestError if the prompt is empty, fills the
  // context or has placeholders for other images than `pixels`, or max_new_tokens < 1.
  Generation(const Session& session, std::vector<int64_t> prompt_ids, PixelBatch pixels,
             std::optional<int64_t> max_new_tokens);

  // The next token; none at the end, for which stop_reason then says why.
  std::optional<int64_t> Next();

  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t kept_tokens() const { return kept_tokens_; }
  int64_t new_tokens() const { return new_tokens_; }
  // "end" (an end token), "length" (max_new_tokens) or "context" (no position left).
  const char* stop_reason() const { return stop_reason_; }

 private:
  const void* Run();

  const Session& session_;
  std::vector<int64_t> prompt_;
  PixelBatch pixels_;
  int64_t limit_ = 0;
  int64_t prompt_tokens_ = 0;
  int64_t kept_tokens_ = 0;
  int64_t new_tokens_ = 0;
  int64_t last_ = -1;
  const char* stop_reason_ = nullptr;
  std::unique_ptr<KvCache> cache_;
};

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_GENERATE_H_
