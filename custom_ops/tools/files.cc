#include "files.h"

#include <sys/stat.h>

#include <cstddef>
#include <fstream>
#include <sstream>

#include "error.h"

namespace bivlm::device {
namespace {

// Reads one code point at `position` and returns its bytes, or minus the bytes of the malformed
// part there (the longest start of a sequence that could have been one, else one byte).
int NextCodePoint(const std::string& bytes, std::size_t position, char32_t* code_point) {
  const auto byte = [&](std::size_t index) -> unsigned {
    return index < bytes.size() ? static_cast<unsigned char>(bytes[index]) : 0U;
  };
  const unsigned first = byte(position);
  if (first < 0x80U) {
    *code_point = first;
    return 1;
  }
  int length = 0;
  unsigned lowest = 0x80U;  // of the second byte
  unsigned highest = 0xbfU;
  if (first >= 0xc2U && first <= 0xdfU) {
    length = 2;
  } else if (first >= 0xe0U && first <= 0xefU) {
    length = 3;
    if (first == 0xe0U) lowest = 0xa0U;
    if (first == 0xedU) highest = 0x9fU;  // no surrogates
  } else if (first >= 0xf0U && first <= 0xf4U) {
    length = 4;
    if (first == 0xf0U) lowest = 0x90U;
    if (first == 0xf4U) highest = 0x8fU;
  } else {
    return -1;
  }
  char32_t value = first & (0xffU >> (length + 1));
  for (int i = 1; i < length; ++i) {
    const unsigned next = byte(position + static_cast<std::size_t>(i));
    if (next < lowest || next > highest) return -i;
    lowest = 0x80U;
    highest = 0xbfU;
    value = value << 6 | (next & 0x3fU);
  }
  *code_point = value;
  return length;
}

}  // namespace

bool IsFile(const std::string& path) {
  struct stat info{};
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

uint64_t FileSize(const std::string& path) {
  struct stat info{};
  if (stat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) return 0;
  return static_cast<uint64_t>(info.st_size);
}

std::string ReadFile(const std::string& path, const std::string& missing) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  if (IsFile(path) && stream) text << stream.rdbuf();
  if (!IsFile(path) || !stream) throw InputError("'" + path + "' " + missing);
  return text.str();
}

std::string ReadIfThere(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  if (stream) text << stream.rdbuf();
  return text.str();
}

std::u32string CodePoints(const std::string& text, const std::string& what) {
  std::u32string found;
  for (std::size_t position = 0; position < text.size();) {
    char32_t code_point = 0;
    const int length = NextCodePoint(text, position, &code_point);
    if (length < 0) {
      throw RequestError(what + " is not UTF-8: byte " + std::to_string(position) +
                         " starts no character. Give UTF-8 text.");
    }
    found.push_back(code_point);
    position += static_cast<std::size_t>(length);
  }
  return found;
}

std::string Utf8(char32_t code_point) {
  const auto byte = [](char32_t value) {
    return static_cast<char>(static_cast<unsigned char>(value));
  };
  if (code_point < 0x80) return {byte(code_point)};
  if (code_point < 0x800) return {byte(0xc0 | code_point >> 6), byte(0x80 | (code_point & 0x3f))};
  if (code_point < 0x10000) {
    return {byte(0xe0 | code_point >> 12), byte(0x80 | (code_point >> 6 & 0x3f)),
            byte(0x80 | (code_point & 0x3f))};
  }
  return {byte(0xf0 | code_point >> 18), byte(0x80 | (code_point >> 12 & 0x3f)),
          byte(0x80 | (code_point >> 6 & 0x3f)), byte(0x80 | (code_point & 0x3f))};
}

std::string ValidUtf8(const std::string& bytes) {
  std::string text;
  for (std::size_t position = 0; position < bytes.size();) {
    char32_t code_point = 0;
    const int length = NextCodePoint(bytes, position, &code_point);
    if (length > 0) {
      text.append(bytes, position, static_cast<std::size_t>(length));
      position += static_cast<std::size_t>(length);
    } else {
      text += Utf8(0xfffd);
      position += static_cast<std::size_t>(-length);
    }
  }
  return text;
}

std::size_t SpaceAtStart(const std::string& text) {
  const auto is_space = [](char32_t c) {
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
  };
  std::size_t bytes = 0;
  for (const char32_t c : CodePoints(text, "the text")) {
    if (!is_space(c)) break;
    bytes += Utf8(c).size();
  }
  return bytes;
}

std::size_t SpaceAtEnd(const std::string& text) {
  for (std::size_t start = 0; start < text.size(); ++start) {
    if ((static_cast<unsigned char>(text[start]) & 0xc0U) == 0x80U) continue;
    const std::string tail = text.substr(start);
    if (SpaceAtStart(tail) == tail.size()) return tail.size();
  }
  return 0;
}

}  // namespace bivlm::device
