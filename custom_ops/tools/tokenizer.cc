#include "tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "bpe.h"
#include "error.h"
#include "files.h"
#include "pattern.h"

namespace bivlm::device {
namespace {

using Json = nlohmann::json;
using Words = std::vector<std::string>;

// The split of GPT-2, which ByteLevel makes with use_regex.
constexpr char kGpt2[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr char kUnfinished[] = "\xef\xbf\xbd";  // U+FFFD

Error NotSupported(const std::string& part) {
  return RequestError("the tokenizer has " + part +
                      ", which this tool does not implement. Encode the prompt with the tokenizers "
                      "library and give token ids (--token-ids).");
}

std::string TypeOf(const Json& part) { return part.at("type").get<std::string>(); }

bool StartsWith(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

std::string Replaced(const std::string& text, const std::string& from, const std::string& to) {
  std::string result;
  std::size_t position = 0;
  for (std::size_t found = text.find(from); found != std::string::npos && !from.empty();
       found = text.find(from, position)) {
    result += text.substr(position, found - position) + to;
    position = found + from.size();
  }
  return result + text.substr(position);
}

// The string of a pattern that must be no regular expression.
std::string StringPattern(const Json& part) {
  const Json& pattern = part.at("pattern");
  if (!pattern.contains("String"))
    throw NotSupported("a " + TypeOf(part) + " of a regular expression");
  return pattern.at("String").get<std::string>();
}

// Characters that stand for the bytes 0 to 255 in byte-level vocabularies, as UTF-8.
std::array<std::string, 256> ByteCharacters() {
  std::array<std::string, 256> characters;
  char32_t next = 256;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool is_printed =
        (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    characters[byte] = Utf8(is_printed ? byte : next++);
  }
  return characters;
}

std::string Composed(const std::string& text) {
  utf8proc_uint8_t* composed = nullptr;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  const utf8proc_ssize_t length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &composed, options);
  const std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> owned(composed, std::free);
  if (length < 0) {
    throw RequestError(std::string("the prompt cannot be normalised: ") + utf8proc_errmsg(length) +
                       ".");
  }
  return {reinterpret_cast<const char*>(composed), static_cast<std::size_t>(length)};
}

// A stretch of the text between two added tokens.
struct Piece {
  std::string text;
  bool is_first;                 // it starts where the whole text does
  std::optional<int64_t> token;  // it is this added token
};

struct AddedToken {
  std::string content;
  int64_t id;
  bool strips_left;
  bool strips_right;
};

// Cuts pieces at added tokens: the leftmost match first, of those the longest.
std::vector<Piece> CutAtTokens(const Piece& piece, const std::vector<AddedToken>& tokens) {
  std::vector<Piece> pieces;
  const std::string& text = piece.text;
  std::size_t written = 0;
  const auto put_text = [&](std::size_t end) {
    if (end > written) {
      pieces.push_back(
          {text.substr(written, end - written), piece.is_first && written == 0, std::nullopt});
    }
  };
  for (std::size_t position = 0; position < text.size();) {
    const AddedToken* best = nullptr;
    for (const AddedToken& token : tokens) {
      const bool is_longer = best == nullptr || token.content.size() > best->content.size();
      if (is_longer && text.compare(position, token.content.size(), token.content) == 0) {
        best = &token;
      }
    }
    if (best == nullptr) {
      ++position;
      continue;
    }
    std::size_t start = position;
    std::size_t end = position + best->content.size();
    if (best->strips_left) start -= SpaceAtEnd(text.substr(written, start - written));
    if (best->strips_right) end += SpaceAtStart(text.substr(end));
    put_text(start);
    pieces.push_back({"", false, best->id});
    position = written = end;
  }
  put_text(text.size());
  return pieces;
}

using Normalizer = std::function<std::string(const std::string&)>;
using PreTokenizer = std::function<Words(const Words&, bool is_first)>;
using Decoder = std::function<Words(const Words&)>;

void AddNormalizer(const Json& part, std::vector<Normalizer>* steps) {
  if (part.is_null()) return;
  const std::string type = TypeOf(part);
  if (type == "Sequence") {
    for (const Json& step : part.at("normalizers")) AddNormalizer(step, steps);
  } else if (type == "Prepend") {
    const auto prefix = part.at("prepend").get<std::string>();
    steps->emplace_back(
        [=](const std::string& text) { return text.empty() ? text : prefix + text; });
  } else if (type == "Replace") {
    const std::string from = StringPattern(part);
    const auto to = part.at("content").get<std::string>();
    steps->emplace_back([=](const std::string& text) { return Replaced(text, from, to); });
  } else if (type == "NFC") {
    steps->emplace_back(Composed);
  } else {
    throw NotSupported("the normalizer " + type);
  }
}

// A step that makes several words of each.
PreTokenizer EachWord(std::function<Words(const std::string&)> cut) {
  return [cut = std::move(cut)](const Words& words, bool /*is_first*/) {
    Words found;
    for (const std::string& word : words) {
      for (std::string& piece : cut(word)) found.push_back(std::move(piece));
    }
    return found;
  };
}

PreTokenizer SplitAt(Pattern pattern) {
  const auto shared = std::make_shared<const Pattern>(std::move(pattern));
  return EachWord([shared](const std::string& word) { return shared->Isolated(word); });
}

PreTokenizer ToByteCharacters() {
  return EachWord([characters = ByteCharacters()](const std::string& word) {
    std::string mapped;
    for (const char byte : word) mapped += characters[static_cast<unsigned char>(byte)];
    return Words{mapped};
  });
}

PreTokenizer Metaspace(const Json& part) {
  const auto mark = part.at("replacement").get<std::string>();
  std::string scheme = part.value("add_prefix_space", true) ? "always" : "never";
  scheme = part.value("prepend_scheme", scheme);
  const bool splits = part.value("split", true);
  return [=](const Words& words, bool is_first) {
    Words found;
    for (std::size_t i = 0; i < words.size(); ++i) {
      std::string word = Replaced(words[i], " ", mark);
      const bool wants = scheme == "always" || (scheme == "first" && is_first && i == 0);
      if (wants && !StartsWith(word, mark)) word = mark + word;
      std::size_t start = 0;  // each mark starts a word
      for (std::size_t next = word.find(mark, 1); splits && next != std::string::npos;
           next = word.find(mark, next + 1)) {
        found.push_back(word.substr(start, next - start));
        start = next;
      }
      if (start < word.size()) found.push_back(word.substr(start));
    }
    return found;
  };
}

void AddPreTokenizer(const Json& part, std::vector<PreTokenizer>* steps) {
  if (part.is_null()) return;
  const std::string type = TypeOf(part);
  if (type == "Sequence") {
    for (const Json& step : part.at("pretokenizers")) AddPreTokenizer(step, steps);
  } else if (type == "Digits") {
    steps->push_back(
        SplitAt(Pattern(part.at("individual_digits").get<bool>() ? "\\p{N}" : "\\p{N}+")));
  } else if (type == "Split") {
    const auto behavior = part.at("behavior").get<std::string>();
    if (behavior != "Isolated") throw NotSupported("a Split with behavior " + behavior);
    if (part.value("invert", false)) throw NotSupported("an inverted Split");
    const Json& pattern = part.at("pattern");
    steps->push_back(SplitAt(pattern.contains("Regex")
                                 ? Pattern(pattern.at("Regex").get<std::string>())
                                 : Pattern::Literal(pattern.at("String").get<std::string>())));
  } else if (type == "ByteLevel") {
    if (part.at("add_prefix_space").get<bool>()) {
      steps->push_back(EachWord([](const std::string& word) {
        return Words{StartsWith(word, " ") ? word : " " + word};
      }));
    }
    if (part.value("use_regex", true)) steps->push_back(SplitAt(Pattern(kGpt2)));
    steps->push_back(ToByteCharacters());
  } else if (type == "Metaspace") {
    steps->push_back(Metaspace(part));
  } else {
    throw NotSupported("the pre-tokenizer " + type);
  }
}

std::string Joined(const Words& words) {
  std::string text;
  for (const std::string& word : words) text += word;
  return text;
}

Decoder FromByteCharacters() {
  std::unordered_map<std::string, char> bytes;
  const std::array<std::string, 256> characters = ByteCharacters();
  for (std::size_t byte = 0; byte < 256; ++byte) {
    bytes[characters[byte]] = static_cast<char>(static_cast<unsigned char>(byte));
  }
  return [bytes = std::move(bytes)](const Words& tokens) {
    std::string text;
    for (const std::string& token : tokens) {
      std::string mapped;
      bool is_mapped = true;
      for (const char32_t c : CodePoints(token, "a token")) {
        const auto byte = bytes.find(Utf8(c));
        is_mapped = is_mapped && byte != bytes.end();
        if (is_mapped) mapped += byte->second;
      }
      text += is_mapped ? mapped : token;  // a token that is no byte-level one stands for itself
    }
    return Words{ValidUtf8(text)};
  };
}

// Runs of tokens <0x00> to <0xFF> become the characters of these bytes, or U+FFFD each.
Words FromByteTokens(const Words& tokens) {
  Words found;
  std::string bytes;
  const auto flush = [&] {
    if (ValidUtf8(bytes) == bytes) {
      if (!bytes.empty()) found.push_back(bytes);
    } else {
      found.insert(found.end(), bytes.size(), kUnfinished);
    }
    bytes.clear();
  };
  for (const std::string& token : tokens) {
    const bool is_byte = token.size() == 6 && StartsWith(token, "<0x") && token[5] == '>' &&
                         token.find_first_not_of("0123456789abcdefABCDEF", 3) == 5;
    if (is_byte) {
      bytes += static_cast<char>(std::strtol(token.substr(3, 2).c_str(), nullptr, 16));
    } else {
      flush();
      found.push_back(token);
    }
  }
  flush();
  return found;
}

Decoder Stripping(const std::string& content, std::size_t start, std::size_t stop) {
  return [=](const Words& tokens) {
    Words found;
    for (std::string token : tokens) {
      for (std::size_t i = 0; i < start && StartsWith(token, content); ++i) {
        token.erase(0, content.size());
      }
      for (std::size_t i = 0;
           i < stop && token.size() >= content.size() &&
           token.compare(token.size() - content.size(), content.size(), content) == 0;
           ++i) {
        token.erase(token.size() - content.size());
      }
      found.push_back(token);
    }
    return found;
  };
}

Decoder EachToken(std::function<std::string(const std::string&, bool is_first)> change) {
  return [change = std::move(change)](const Words& tokens) {
    Words found;
    for (const std::string& token : tokens) found.push_back(change(token, found.empty()));
    return found;
  };
}

void AddDecoder(const Json& part, std::vector<Decoder>* steps) {
  const std::string type = TypeOf(part);
  if (type == "Sequence") {
    for (const Json& step : part.at("decoders")) AddDecoder(step, steps);
  } else if (type == "ByteLevel") {
    steps->push_back(FromByteCharacters());
  } else if (type == "ByteFallback") {
    steps->emplace_back(FromByteTokens);
  } else if (type == "Fuse") {
    steps->emplace_back([](const Words& tokens) { return Words{Joined(tokens)}; });
  } else if (type == "Replace") {
    const std::string from = StringPattern(part);
    const auto to = part.at("content").get<std::string>();
    steps->push_back(
        EachToken([=](const std::string& token, bool) { return Replaced(token, from, to); }));
  } else if (type == "Strip") {
    steps->push_back(Stripping(part.at("content").get<std::string>(),
                               part.at("start").get<std::size_t>(),
                               part.at("stop").get<std::size_t>()));
  } else if (type == "Metaspace") {
    const auto mark = part.at("replacement").get<std::string>();
    const std::string prepends = part.value("add_prefix_space", true) ? "always" : "never";
    const bool drops_first = part.value("prepend_scheme", prepends) != "never";
    steps->push_back(EachToken([=](const std::string& token, bool is_first) {
      return Replaced(token, mark, is_first && drops_first ? "" : " ");
    }));
  } else {
    throw NotSupported("the decoder " + type);
  }
}

std::vector<std::pair<std::string, std::string>> ReadMerges(const Json& merges) {
  std::vector<std::pair<std::string, std::string>> pairs;
  pairs.reserve(merges.size());
  for (const Json& merge : merges) {
    if (merge.is_array()) {
      pairs.emplace_back(merge.at(0).get<std::string>(), merge.at(1).get<std::string>());
      continue;
    }
    const auto& text = merge.get_ref<const std::string&>();
    const std::size_t space = text.find(' ');
    if (space == std::string::npos)
      throw InputError("the tokenizer's merge '" + text + "' is no pair.");
    pairs.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
  return pairs;
}

bool IsGiven(const Json& part, const char* name) {
  const auto found = part.find(name);
  return found != part.end() && !found->is_null() && *found != "" && *found != 0.0;
}

Bpe ReadModel(const Json& model) {
  if (model.value("type", "BPE") != "BPE") throw NotSupported("a model of type " + TypeOf(model));
  for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    if (IsGiven(model, name)) throw NotSupported(std::string("a BPE model with ") + name);
  }
  Bpe::Options options;
  if (IsGiven(model, "unk_token")) options.unknown = model.at("unk_token").get<std::string>();
  options.fuses_unknown = model.value("fuse_unk", false);
  options.byte_fallback = model.value("byte_fallback", false);
  options.ignores_merges = model.value("ignore_merges", false);
  return {model.at("vocab").get<std::unordered_map<std::string, int64_t>>(),
          ReadMerges(model.at("merges")), options};
}

}  // namespace

struct Tokenizer::Parts {
  explicit Parts(const Json& json) : bpe(ReadModel(json.at("model"))) {
    AddNormalizer(json.at("normalizer"), &normalizers);
    AddPreTokenizer(json.at("pre_tokenizer"), &pre_tokenizers);
    if (json.at("decoder").is_null()) throw NotSupported("no decoder");
    AddDecoder(json.at("decoder"), &decoders);
    for (const auto& [token, id] : json.at("model").at("vocab").items()) {
      tokens[id.get<int64_t>()] = token;
    }
    for (const Json& added : json.at("added_tokens")) AddToken(added);
  }

  void AddToken(const Json& added) {
    const auto content = added.at("content").get<std::string>();
    const auto id = added.at("id").get<int64_t>();
    if (added.at("single_word").get<bool>()) {
      throw NotSupported("the added token '" + content + "' with single_word");
    }
    const bool is_normalized = added.at("normalized").get<bool>();
    const AddedToken token = {is_normalized ? Normalized(content) : content, id,
                              added.at("lstrip").get<bool>(), added.at("rstrip").get<bool>()};
    if (!token.content.empty())
      (is_normalized ? added_to_normalized : added_to_raw).push_back(token);
    if (added.at("special").get<bool>()) special.insert(id);
    tokens[id] = content;
  }

  std::string Normalized(std::string text) const {
    for (const Normalizer& step : normalizers) text = step(text);
    return text;
  }

  Bpe bpe;
  std::vector<Normalizer> normalizers;
  std::vector<PreTokenizer> pre_tokenizers;
  std::vector<Decoder> decoders;
  std::vector<AddedToken> added_to_raw;         // found before normalization
  std::vector<AddedToken> added_to_normalized;  // found behind it
  std::unordered_map<int64_t, std::string> tokens;
  std::unordered_set<int64_t> special;
};

Tokenizer::Tokenizer(const std::string& json, const std::string& path) {
  try {
    parts_ = std::make_unique<Parts>(Json::parse(json));
  } catch (const Json::exception& error) {
    throw InputError("'" + path + "' is damaged: " + error.what() +
                     ". Copy the assets folder again, or export the model again.");
  }
}

Tokenizer::~Tokenizer() = default;

std::vector<int64_t> Tokenizer::Encode(const std::string& text) const {
  CodePoints(text, "the prompt");  // the rest relies on valid UTF-8
  std::vector<int64_t> ids;
  for (Piece& raw : CutAtTokens({text, true, std::nullopt}, parts_->added_to_raw)) {
    if (raw.token.has_value()) {
      ids.push_back(*raw.token);
      continue;
    }
    raw.text = parts_->Normalized(raw.text);
    for (const Piece& piece : CutAtTokens(raw, parts_->added_to_normalized)) {
      if (piece.token.has_value()) {
        ids.push_back(*piece.token);
        continue;
      }
      Words words = {piece.text};
      for (const PreTokenizer& step : parts_->pre_tokenizers) words = step(words, piece.is_first);
      for (const std::string& word : words) parts_->bpe.Encode(word, &ids);
    }
  }
  return ids;
}

std::string Tokenizer::Decode(const std::vector<int64_t>& ids) const {
  Words tokens;
  for (const int64_t id : ids) {
    const auto token = parts_->tokens.find(id);
    if (token != parts_->tokens.end() && parts_->special.count(id) == 0) {
      tokens.push_back(token->second);
    }
  }
  for (const Decoder& step : parts_->decoders) tokens = step(tokens);
  return Joined(tokens);
}

}  // namespace bivlm::device
