#include "pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstddef>
#include <utility>

#include "error.h"

namespace bivlm::device {
namespace {

// White_Space of Unicode, as the inside of a character class. PCRE2's own \s has U+180E, which
// stopped being white space with Unicode 6.3.
constexpr char kWhiteSpace[] = "\\p{Z}\\x{09}-\\x{0d}\\x{85}";

// `expression` with \s and \S spelled out.
std::string WithWhiteSpace(const std::string& expression) {
  std::string spelled;
  bool in_class = false;
  for (std::size_t i = 0; i < expression.size(); ++i) {
    const char c = expression[i];
    if (c != '\\' || i + 1 == expression.size()) {
      if (c == '[') in_class = true;
      if (c == ']') in_class = false;
      spelled += c;
      continue;
    }
    const char escaped = expression[++i];
    if (escaped == 's') {
      spelled += in_class ? kWhiteSpace : "[" + std::string(kWhiteSpace) + "]";
    } else if (escaped == 'S' && !in_class) {
      spelled += "[^" + std::string(kWhiteSpace) + "]";
    } else if (escaped == 'S') {
      throw RequestError("the tokenizer's pattern '" + expression +
                         "' has \\S in a character class, which this tool does not read. Give "
                         "token ids (--token-ids).");
    } else {
      spelled += std::string{c, escaped};
    }
  }
  return spelled;
}

std::string MessageOf(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof(text));
  return reinterpret_cast<const char*>(text);
}

}  // namespace

struct Pattern::Code {
  explicit Code(pcre2_code* compiled)
      : code(compiled), match(pcre2_match_data_create_from_pattern(compiled, nullptr)) {}
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
  ~Code() {
    pcre2_match_data_free(match);
    pcre2_code_free(code);
  }
  pcre2_code* code;
  pcre2_match_data* match;
};

Pattern::Pattern(const std::string& expression) {
  const std::string spelled = WithWhiteSpace(expression);
  int problem = 0;
  PCRE2_SIZE place = 0;
  pcre2_code* const code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(spelled.data()), spelled.size(),
                    PCRE2_UTF | PCRE2_UCP, &problem, &place, nullptr);
  if (code == nullptr) {
    throw RequestError("the tokenizer's pattern '" + expression + "' is none that PCRE2 reads: " +
                       MessageOf(problem) + ". Give token ids (--token-ids).");
  }
  code_ = std::make_unique<Code>(code);
}

Pattern::~Pattern() = default;
Pattern::Pattern(Pattern&&) noexcept = default;
Pattern& Pattern::operator=(Pattern&&) noexcept = default;

Pattern Pattern::Literal(const std::string& text) {
  std::string expression;
  for (const char c : text) {
    const bool is_special = std::string("\\^$.[]|()?*+{}#-").find(c) != std::string::npos;
    expression += is_special ? std::string{'\\', c} : std::string{c};
  }
  return Pattern(expression);
}

std::vector<std::string> Pattern::Isolated(const std::string& text) const {
  std::vector<std::string> pieces;
  std::size_t position = 0;  // where matching goes on
  std::size_t written = 0;
  while (position < text.size()) {
    const int found = pcre2_match(code_->code, reinterpret_cast<PCRE2_SPTR>(text.data()),
                                  text.size(), position, PCRE2_NO_UTF_CHECK, code_->match, nullptr);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) {
      throw RequestError("matching the tokenizer's pattern failed: " + MessageOf(found) +
                         ". Shorten the prompt, or give token ids (--token-ids).");
    }
    const PCRE2_SIZE* const ends = pcre2_get_ovector_pointer(code_->match);
    if (ends[1] == ends[0]) {  // an empty match cuts nothing here
      ++position;
      while (position < text.size() &&
             (static_cast<unsigned char>(text[position]) & 0xc0U) == 0x80U) {
        ++position;
      }
      continue;
    }
    if (ends[0] > written) pieces.push_back(text.substr(written, ends[0] - written));
    pieces.push_back(text.substr(ends[0], ends[1] - ends[0]));
    position = written = ends[1];
  }
  if (written < text.size()) pieces.push_back(text.substr(written));
  return pieces;
}

}  // namespace bivlm::device
