// Text of bivlm-device: tokenizers of both kinds, UTF-8, checksums.
#include <string>
#include <vector>

#include "check.h"
#include "error.h"
#include "files.h"
#include "sha256.h"
#include "tokenizer.h"

namespace bivlm::device {
namespace {

using testing::Checker;
using Ids = std::vector<int64_t>;

// A byte-level tokenizer: letters a to e and space (as U+0120), three merges, a special token.
std::string ByteLevel(const std::string& pre_tokenizer, const std::string& added = "") {
  return R"({"normalizer": null, "post_processor": null, "decoder": {"type": "ByteLevel"},
    "pre_tokenizer": )" +
         pre_tokenizer + R"(, "added_tokens": [{"id": 90, "content": "<x>", "special": true,
    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})" +
         added + R"(], "model": {"type": "BPE", "unk_token": null, "byte_fallback": false,
    "vocab": {"a": 1, "b": 2, "c": 3, "\u0120": 4, "ab": 5, "\u0120a": 6, "abc": 7, "1": 8,
              "\u00c3": 9, "\u00a9": 10, "bc": 11, "<x>": 90},
    "merges": ["a b", ["ab", "c"], "\u0120 a", "b c"]}})";
}

constexpr char kGpt2[] = R"({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true})";

// A tokenizer on characters: U+2581 for spaces, one before the text; bytes of a and b only.
std::string WithByteFallback() {
  return R"({"normalizer": {"type": "Sequence", "normalizers": [
      {"type": "Prepend", "prepend": "\u2581"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
    "pre_tokenizer": null, "post_processor": null,
    "decoder": {"type": "Sequence", "decoders": [
      {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
      {"type": "ByteFallback"}, {"type": "Fuse"},
      {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "added_tokens": [], "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true,
      "byte_fallback": true, "vocab": {"<unk>": 0, "\u2581": 1, "h": 2, "i": 3, "hi": 4,
      "\u2581hi": 5, "<0xC3>": 6, "<0xA9>": 7, "<0xF0>": 8},
      "merges": ["h i", "\u2581 hi"]}})";
}

std::string Shown(const Ids& ids) {
  std::string text;
  for (const int64_t id : ids) text += std::to_string(id) + " ";
  return text;
}

void Expect(Checker* check, const Tokenizer& tokenizer, const std::string& text, const Ids& want) {
  const Ids found = tokenizer.Encode(text);
  check->Expect(found == want, "'", text, "': ", Shown(found), "for ", Shown(want));
}

void EncodesBytes(Checker* check) {
  const Tokenizer tokenizer(ByteLevel(kGpt2), "tokenizer.json");
  Expect(check, tokenizer, "", {});
  Expect(check, tokenizer, "abc", {7});
  Expect(check, tokenizer, "bc ab", {11, 4, 5});  // "a b" has the lower rank
  Expect(check, tokenizer, "a<x>b<x>", {1, 90, 2, 90});
  Expect(check, tokenizer, "<x<x>", {90});  // '<' and 'x' have no token and vanish
  Expect(check, tokenizer, "\xc3\xa9", {9, 10});
  Expect(check, tokenizer, "11", {8, 8});
  check->Expect(tokenizer.Decode({7, 6, 90, 2, 1000}) == "abc ab", "decoding leaves <x> out");
  check->Expect(tokenizer.Decode({9}) == "\xef\xbf\xbd", "half a character");
  check->Expect(tokenizer.Decode({9, 10}) == "\xc3\xa9", "a whole one");
}

void EncodesCharacters(Checker* check) {
  const Tokenizer tokenizer(WithByteFallback(), "tokenizer.json");
  Expect(check, tokenizer, "hi", {5});
  Expect(check, tokenizer, "hi hi", {5, 5});
  Expect(check, tokenizer, "\xc3\xa9", {1, 6, 7});
  Expect(check, tokenizer, "xyhi", {1, 0, 4});  // unknown ones in a row are one
  check->Expect(tokenizer.Decode({5, 5}) == "hi hi", "the first space goes");
  check->Expect(tokenizer.Decode({5, 6, 7}) == "hi\xc3\xa9", "bytes become a character");
  check->Expect(tokenizer.Decode({6, 8}) == "\xef\xbf\xbd\xef\xbf\xbd", "bytes that are none");
}

void CutsDigits(Checker* check) {
  const std::string digits = R"({"type": "Sequence", "pretokenizers": [
      {"type": "Digits", "individual_digits": true}, )" +
                             std::string(kGpt2) + "]}";
  const Tokenizer tokenizer(ByteLevel(digits), "tokenizer.json");
  Expect(check, tokenizer, "ab1bc", {5, 8, 11});
}

void StripsRoundTokens(Checker* check) {
  const std::string added = R"(, {"id": 91, "content": "<y>", "special": false,
      "single_word": false, "lstrip": true, "rstrip": true, "normalized": false},
      {"id": 92, "content": "<y>>", "special": false,
      "single_word": false, "lstrip": false, "rstrip": false, "normalized": true})";
  const Tokenizer tokenizer(ByteLevel(kGpt2, added), "tokenizer.json");
  Expect(check, tokenizer, "a <y> \xc2\xa0 b", {1, 91, 2});
  Expect(check, tokenizer, "<x> <y><x>", {90, 91, 90});
}

// What opening a tokenizer complains about.
std::string Problem(const std::string& json, int exit_code) {
  try {
    const Tokenizer tokenizer(json, "tokenizer.json");
    return "";
  } catch (const Error& error) {
    return error.exit_code() == exit_code ? error.what() : "wrong exit code";
  }
}

void NamesWhatIsMissing(Checker* check) {
  const auto expect = [check](const std::string& json, int code, const std::string& part) {
    const std::string problem = Problem(json, code);
    check->Expect(problem.find(part) != std::string::npos, "'", part, "' in '", problem, "'");
  };
  expect(ByteLevel(R"({"type": "BertPreTokenizer"})"), 2, "the pre-tokenizer BertPreTokenizer");
  expect(ByteLevel(R"({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed"})"), 2,
         "a Split with behavior Removed");
  expect(ByteLevel(R"({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"})"), 2,
         "the tokenizer's pattern '('");
  expect(ByteLevel(kGpt2, R"(, {"id": 91, "content": "<y>", "special": false,
      "single_word": true, "lstrip": true, "rstrip": true, "normalized": false})"),
         2, "'<y>' with single_word");
  expect(R"({"model": {"type": "WordPiece", "vocab": {}}})", 2, "a model of type WordPiece");
  expect("{", 3, "is damaged");
  expect(R"({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["a b"]}})", 3, "merges 'b'");
  bool is_refused = false;
  try {
    Tokenizer(ByteLevel(kGpt2), "tokenizer.json").Encode("a\xff");
  } catch (const Error& error) {
    is_refused = std::string(error.what()).find("byte 1 starts no character") != std::string::npos;
  }
  check->Expect(is_refused, "malformed UTF-8 is refused");
}

void RepairsUtf8(Checker* check) {
  const std::string bad = "\xef\xbf\xbd";
  check->Expect(ValidUtf8("a\xff"
                          "b") == "a" + bad + "b",
                "a byte that starts nothing");
  check->Expect(ValidUtf8("\xe2\x82") == bad, "two of three bytes are one mark");
  check->Expect(ValidUtf8("\xe2\x82\xac") == "\xe2\x82\xac", "a whole character stays");
  check->Expect(ValidUtf8("\xc0\xaf") == bad + bad, "an overlong form");
  check->Expect(ValidUtf8("\xed\xa0\x80") == bad + bad + bad, "a surrogate");
  check->Expect(ValidUtf8("\xf0\x9f\x98"
                          "a") == bad + "a",
                "a cut emoji");
  check->Expect(SpaceAtStart(" \xc2\xa0\t.") == 4 && SpaceAtEnd(".\xe3\x80\x80 ") == 4, "spaces");
}

std::string Sha256Of(const std::string& text) {
  Sha256 digest;
  for (std::size_t i = 0; i < text.size(); i += 7) {  // in pieces that cross blocks
    const std::string piece = text.substr(i, 7);
    digest.Add(piece.data(), piece.size());
  }
  return digest.Hex();
}

void Digests(Checker* check) {  // examples of FIPS 180
  check->Expect(Sha256Of("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
                "empty");
  check->Expect(
      Sha256Of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "abc");
  check->Expect(Sha256Of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
                    "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
                "two blocks");
  check->Expect(Sha256Of(std::string(1000000, 'a')) ==
                    "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
                "a million");
}

}  // namespace
}  // namespace bivlm::device

int main() {
  bivlm::testing::Checker check;
  bivlm::device::EncodesBytes(&check);
  bivlm::device::EncodesCharacters(&check);
  bivlm::device::CutsDigits(&check);
  bivlm::device::StripsRoundTokens(&check);
  bivlm::device::NamesWhatIsMissing(&check);
  bivlm::device::RepairsUtf8(&check);
  bivlm::device::Digests(&check);
  return check.Finish("device_tokenizer_test");
}
