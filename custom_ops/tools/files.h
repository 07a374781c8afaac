// Files as bytes and text.
#ifndef BIVLM_TOOLS_FILES_H_
#define BIVLM_TOOLS_FILES_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace bivlm::device {

bool IsFile(const std::string& path);

// Size in bytes; 0 of what is no file.
uint64_t FileSize(const std::string& path);

// The whole file. Throws InputError with `missing` behind the path if it cannot be read.
std::string ReadFile(const std::string& path, const std::string& missing);

// The same for files that a system may lack: "" without one.
std::string ReadIfThere(const std::string& path);

// Code points of UTF-8 text. Throws RequestError, with `what` in it, if the text is malformed.
std::u32string CodePoints(const std::string& text, const std::string& what);

// UTF-8 of a code point.
std::string Utf8(char32_t code_point);

// `bytes` with every maximal malformed part replaced by U+FFFD, as the Unicode standard recommends.
std::string ValidUtf8(const std::string& bytes);

// Bytes of white space (Unicode's White_Space) that valid UTF-8 starts or ends with.
std::size_t SpaceAtStart(const std::string& text);
std::size_t SpaceAtEnd(const std::string& text);

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_FILES_H_
