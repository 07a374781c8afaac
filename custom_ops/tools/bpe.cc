#include "bpe.h"

#include <cstdio>
#include <queue>
#include <tuple>

#include "error.h"

namespace bivlm::device {
namespace {

uint64_t Key(int64_t left, int64_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint64_t>(right);
}

std::string ByteToken(char byte) {
  char text[8];
  std::snprintf(text, sizeof(text), "<0x%02X>",
                static_cast<unsigned>(static_cast<unsigned char>(byte)));
  return text;
}

// Bytes of the character that starts at `position` of valid UTF-8.
std::size_t CharacterBytes(const std::string& text, std::size_t position) {
  std::size_t count = 1;
  while (position + count < text.size() &&
         (static_cast<unsigned char>(text[position + count]) & 0xc0U) == 0x80U) {
    ++count;
  }
  return count;
}

}  // namespace

Bpe::Bpe(std::unordered_map<std::string, int64_t> vocabulary,
         const std::vector<std::pair<std::string, std::string>>& merges, Options options)
    : vocabulary_(std::move(vocabulary)), options_(std::move(options)) {
  const auto id_of = [this](const std::string& token) {
    const std::optional<int64_t> id = Id(token);
    if (!id.has_value()) {
      throw InputError(
          "the tokenizer merges '" + token +
          "', which its vocabulary lacks. Copy tokenizer.json again, or export again.");
    }
    return *id;
  };
  merges_.reserve(merges.size());
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const uint64_t key = Key(id_of(left), id_of(right));
    merges_[key] = {rank, id_of(left + right)};
  }
  if (!options_.unknown.empty()) id_of(options_.unknown);
}

std::optional<int64_t> Bpe::Id(const std::string& token) const {
  const auto found = vocabulary_.find(token);
  if (found == vocabulary_.end()) return std::nullopt;
  return found->second;
}

const Bpe::Merge* Bpe::Find(int64_t left, int64_t right) const {
  const auto found = merges_.find(Key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

std::vector<int64_t> Bpe::Symbols(const std::string& word) const {
  std::vector<int64_t> symbols;
  bool follows_unknown = false;
  for (std::size_t position = 0; position < word.size();) {
    const std::size_t count = CharacterBytes(word, position);
    const std::string character = word.substr(position, count);
    position += count;
    if (const std::optional<int64_t> id = Id(character)) {
      symbols.push_back(*id);
      follows_unknown = false;
      continue;
    }
    std::vector<int64_t> bytes;
    for (const char byte : character) {
      const std::optional<int64_t> id = options_.byte_fallback ? Id(ByteToken(byte)) : std::nullopt;
      if (id.has_value()) bytes.push_back(*id);
    }
    if (bytes.size() == count) {
      symbols.insert(symbols.end(), bytes.begin(), bytes.end());
      follows_unknown = false;
    } else if (!options_.unknown.empty()) {
      if (!(follows_unknown && options_.fuses_unknown)) symbols.push_back(*Id(options_.unknown));
      follows_unknown = true;
    }
  }
  return symbols;
}

void Bpe::Encode(const std::string& word, std::vector<int64_t>* ids) const {
  if (options_.ignores_merges) {
    if (const std::optional<int64_t> id = Id(word)) {
      ids->push_back(*id);
      return;
    }
  }
  struct Symbol {
    int64_t id;
    std::ptrdiff_t previous;
    std::ptrdiff_t next;
  };
  const std::vector<int64_t> found = Symbols(word);
  const auto count = static_cast<std::ptrdiff_t>(found.size());
  std::vector<Symbol> symbols;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    symbols.push_back({found[static_cast<std::size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1});
  }
  const auto at = [&symbols](std::ptrdiff_t place) -> Symbol& {
    return symbols[static_cast<std::size_t>(place)];
  };
  // Rank, place of the left symbol, id of the result; an entry is stale if it no longer fits.
  using Entry = std::tuple<std::size_t, std::ptrdiff_t, int64_t>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> queue;
  const auto consider = [&](std::ptrdiff_t left) {
    if (left < 0 || at(left).next < 0) return;
    const Merge* merge = Find(at(left).id, at(at(left).next).id);
    if (merge != nullptr) queue.emplace(merge->rank, left, merge->id);
  };
  for (std::ptrdiff_t i = 0; i < count; ++i) consider(i);
  constexpr int64_t kGone = -1;
  while (!queue.empty()) {
    const auto [rank, left, id] = queue.top();
    queue.pop();
    if (at(left).id == kGone || at(left).next < 0) continue;
    const std::ptrdiff_t right = at(left).next;
    const Merge* merge = Find(at(left).id, at(right).id);
    if (merge == nullptr || merge->id != id) continue;
    at(left).id = id;
    at(left).next = at(right).next;
    if (at(right).next >= 0) at(at(right).next).previous = left;
    at(right).id = kGone;
    consider(at(left).previous);
    consider(left);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.id != kGone) ids->push_back(symbol.id);
  }
}

}  // namespace bivlm::device
