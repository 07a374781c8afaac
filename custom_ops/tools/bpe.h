// Byte-pair encoding of one word: merge the pair of lowest rank, the leftmost of equals, until
// there is none.
#ifndef BIVLM_TOOLS_BPE_H_
#define BIVLM_TOOLS_BPE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace bivlm::device {

class Bpe {
 public:
  struct Options {
    std::string unknown;          // token of characters that have none; "": they are dropped
    bool fuses_unknown = false;   // several in a row become one
    bool byte_fallback = false;   // such characters become tokens <0x00> to <0xFF> if all exist
    bool ignores_merges = false;  // a word that is a token is that token
  };

  // Throws InputError if a merge or the unknown token is not in the vocabulary.
  Bpe(std::unordered_map<std::string, int64_t> vocabulary,
      const std::vector<std::pair<std::string, std::string>>& merges, Options options);

  // Appends the ids of a word in UTF-8.
  void Encode(const std::string& word, std::vector<int64_t>* ids) const;

  std::optional<int64_t> Id(const std::string& token) const;

 private:
  struct Merge {
    std::size_t rank;
    int64_t id;
  };

  std::vector<int64_t> Symbols(const std::string& word) const;
  const Merge* Find(int64_t left, int64_t right) const;

  std::unordered_map<std::string, int64_t> vocabulary_;
  std::unordered_map<uint64_t, Merge> merges_;  // by both ids
  Options options_;
};

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_BPE_H_
