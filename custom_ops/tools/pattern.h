// Regular expressions of pre-tokenizers, matched by PCRE2.
#ifndef BIVLM_TOOLS_PATTERN_H_
#define BIVLM_TOOLS_PATTERN_H_

#include <memory>
#include <string>
#include <vector>

namespace bivlm::device {

class Pattern {
 public:
  // A pattern in the syntax of Oniguruma, whose \s is Unicode's White_Space.
  // Throws RequestError if PCRE2 does not take it.
  explicit Pattern(const std::string& expression);
  ~Pattern();
  Pattern(Pattern&&) noexcept;
  Pattern& operator=(Pattern&&) noexcept;

  // A pattern that matches `text` itself.
  static Pattern Literal(const std::string& text);

  // Cuts UTF-8 text at the matches: every match is a piece, and so is what lies between two.
  std::vector<std::string> Isolated(const std::string& text) const;

 private:
  struct Code;
  std::unique_ptr<Code> code_;
};

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_PATTERN_H_
