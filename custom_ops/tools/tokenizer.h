// Text to token ids and back, as the `tokenizers` library does it for the tokenizer.json of the
// supported model families: BPE on bytes (GPT-2, SmolVLM, Qwen2, Llama 3) or on characters with
// byte fallback (Llama 2, Mistral).
#ifndef BIVLM_TOOLS_TOKENIZER_H_
#define BIVLM_TOOLS_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace bivlm::device {

class Tokenizer {
 public:
  // Reads a tokenizer.json; `path` is what errors call it. Throws InputError if it is malformed,
  // RequestError naming the part if it has one that is not implemented here.
  Tokenizer(const std::string& json, const std::string& path);
  ~Tokenizer();

  // Token ids of UTF-8 text; special tokens in it are found, none are added.
  // Throws RequestError if the text is no UTF-8.
  std::vector<int64_t> Encode(const std::string& text) const;

  // Text of token ids, special tokens left out. Ids without a token count as none.
  std::string Decode(const std::vector<int64_t>& ids) const;

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_TOKENIZER_H_
