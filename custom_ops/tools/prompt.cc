#include "prompt.h"

#include "error.h"
#include "files.h"

namespace bivlm::device {
namespace {

constexpr char kUnfinished[] = "\xef\xbf\xbd";  // U+FFFD

std::string Stripped(const std::string& text) {
  const std::string rest = text.substr(SpaceAtStart(text));
  return rest.substr(0, rest.size() - SpaceAtEnd(rest));
}

void ReplaceFirst(std::string* text, const std::string& from, const std::string& to) {
  const std::size_t place = text->find(from);
  if (place != std::string::npos) text->replace(place, from.size(), to);
}

std::string Repeated(const std::string& text, int64_t count) {
  std::string result;
  for (int64_t i = 0; i < count; ++i) result += text;
  return result;
}

}  // namespace

PromptBuilder::PromptBuilder(const BundlePaths& paths, const Manifest& manifest)
    : paths_(paths),
      manifest_(manifest),
      tokenizer_(ReadFile(paths.tokenizer(),
                          "is missing: it belongs to the exported model. Copy the whole folder "
                          "next to the .onnx file, or export again."),
                 paths.tokenizer()) {}

std::vector<int64_t> PromptBuilder::Encode(const std::string& question,
                                           const PreparedPicture& picture) const {
  CodePoints(question, "the prompt");  // the rest relies on valid UTF-8
  if (Stripped(question).empty()) {
    throw RequestError("the prompt is empty. Give a question, e.g. 'what is this?'.");
  }
  if (question.find(manifest_.image_token) != std::string::npos) {
    throw RequestError("the prompt holds '" + manifest_.image_token +
                       "', the mark that stands for a picture in this model. Leave it out; --image "
                       "puts the picture before the text.");
  }
  const PromptFrame frame = ReadPromptFrame(paths_, picture.batch.images > 0);
  std::string before = frame.before;
  std::string behind = frame.behind;
  if (picture.batch.images > 0) {
    const bool is_before = before.find(manifest_.image_token) != std::string::npos;
    ReplaceFirst(is_before ? &before : &behind, manifest_.image_token, Expanded(picture));
  }
  const std::string text = before + (frame.strips ? Stripped(question) : question) + behind;
  std::vector<int64_t> ids = tokenizer_.Encode(text);
  const std::optional<int64_t> bos = manifest_.bos_token_id;
  if (bos.has_value() && (ids.empty() || ids.front() != *bos)) ids.insert(ids.begin(), *bos);
  return ids;
}

// The text that stands for a picture; with tiles as Idefics3Processor writes it.
std::string PromptBuilder::Expanded(const PreparedPicture& picture) const {
  const std::string run = Repeated(manifest_.image_token, manifest_.image_tokens);
  std::string whole = manifest_.image_prompt;
  ReplaceFirst(&whole, "{image}", run);
  if (picture.rows == 0) return whole;
  const std::string& prompt = manifest_.image_prompt;
  const std::size_t end = prompt.find_first_of("<>", 1);
  const bool has_mark =
      !prompt.empty() && prompt[0] == '<' && end != std::string::npos && prompt[end] == '>';
  const std::string opening = has_mark ? prompt.substr(0, end + 1) : "";
  std::string text;
  for (int row = 1; row <= picture.rows; ++row) {
    for (int column = 1; column <= picture.columns; ++column) {
      text +=
          opening + "<row_" + std::to_string(row) + "_col_" + std::to_string(column) + ">" + run;
    }
    text += "\n";
  }
  return text + "\n" + whole;
}

std::string TextStream::Add(int64_t token) {
  seen_.push_back(token);
  text_ = tokenizer_.Decode(seen_);
  const std::size_t size = sizeof(kUnfinished) - 1;
  const bool is_unfinished =
      text_.size() >= size && text_.compare(text_.size() - size, size, kUnfinished) == 0;
  return is_unfinished ? "" : Rest();
}

std::string TextStream::Finish() { return Rest(); }

std::string TextStream::Rest() {
  if (text_.compare(0, written_.size(), written_) != 0) return "";
  const std::string rest = text_.substr(written_.size());
  written_ = text_;
  return rest;
}

}  // namespace bivlm::device
