// A question becomes token ids, and token ids become text; as runtime/prompt.py does it.
#ifndef BIVLM_TOOLS_PROMPT_H_
#define BIVLM_TOOLS_PROMPT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "bundle.h"
#include "preprocess.h"
#include "tokenizer.h"

namespace bivlm::device {

class PromptBuilder {
 public:
  // Reads the tokenizer of the bundle. Throws Error if it is missing, damaged or of another kind.
  PromptBuilder(const BundlePaths& paths, const Manifest& manifest);

  // Token ids of one user turn: the picture's placeholders, if there is one, and the question.
  // Throws RequestError if the question is empty or holds the placeholder.
  std::vector<int64_t> Encode(const std::string& question, const PreparedPicture& picture) const;

  const Tokenizer& tokenizer() const { return tokenizer_; }

 private:
  std::string Expanded(const PreparedPicture& picture) const;

  BundlePaths paths_;
  const Manifest& manifest_;
  Tokenizer tokenizer_;
};

// The text of an answer as its tokens come; what is not yet a whole character waits.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  // Text that this token completes.
  std::string Add(int64_t token);
  // What is left at the end.
  std::string Finish();

 private:
  std::string Rest();

  const Tokenizer& tokenizer_;
  std::vector<int64_t> seen_;
  std::string text_;
  std::string written_;
};

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_PROMPT_H_
