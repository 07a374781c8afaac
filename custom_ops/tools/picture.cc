#include "picture.h"

#include <jerror.h>
#include <jpeglib.h>
#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>

#include "error.h"
#include "files.h"

namespace bivlm::device {
namespace {

// Pillow's limit for what it calls a decompression bomb.
constexpr int64_t kMostPixels = 178956970;
constexpr char kAccepted[] = "PNG, JPEG and binary PPM or PGM files are accepted; ";

Error Damaged(const std::string& path, const std::string& why) {
  return InputError("'" + path + "' cannot be read as a picture: " + why + ". " + kAccepted +
                    "check or convert the file.");
}

// "" if a picture may have this size.
std::string SizeProblem(int64_t width, int64_t height) {
  if (width < 1 || height < 1) return "it has no pixels";
  if (width > kMostPixels / height) {
    return "it has " + std::to_string(width) + " x " + std::to_string(height) +
           " pixels, more than the " + std::to_string(kMostPixels) + " that are accepted";
  }
  return "";
}

// A colour over white, as Pillow's alpha_composite computes it.
uint8_t OnWhite(uint8_t value, uint8_t alpha) {
  if (alpha == 0) return 255;
  const uint32_t coefficient = static_cast<uint32_t>(alpha) << 7;
  const uint32_t sum = value * coefficient + 255U * ((255U << 7) - coefficient) + (0x80U << 7);
  return static_cast<uint8_t>(((sum >> 8) + sum) >> 8 >> 7);
}

// What libpng and libjpeg fill while an error may jump out of them; no object is created between.
struct PngState {
  const uint8_t* bytes = nullptr;
  std::size_t size = 0;
  std::size_t position = 0;
  std::jmp_buf jump{};
  std::string problem;
  int width = 0;
  int height = 0;
  int channels = 0;
  bool is_grey16 = false;
  std::vector<uint8_t> pixels;
  std::vector<png_bytep> rows;
  int orientation = 1;
};

void PngFail(png_structp png, png_const_charp message) {
  auto* state = static_cast<PngState*>(png_get_error_ptr(png));
  state->problem = message;
  std::longjmp(state->jump, 1);
}

void PngWarn(png_structp /*png*/, png_const_charp /*message*/) {}

void PngRead(png_structp png, png_bytep target, std::size_t count) {
  auto* state = static_cast<PngState*>(png_get_io_ptr(png));
  if (count > state->size - state->position) png_error(png, "the file is truncated");
  std::memcpy(target, state->bytes + state->position, count);
  state->position += count;
}

void ReadPngHeader(png_structp png, png_infop info, PngState* state) {
  png_read_info(png, info);
  state->problem = SizeProblem(png_get_image_width(png, info), png_get_image_height(png, info));
  if (!state->problem.empty()) std::longjmp(state->jump, 1);
  state->width = static_cast<int>(png_get_image_width(png, info));
  state->height = static_cast<int>(png_get_image_height(png, info));
  const int depth = png_get_bit_depth(png, info);
  const int type = png_get_color_type(png, info);
  state->is_grey16 = depth == 16 && type == PNG_COLOR_TYPE_GRAY;
  if (type == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png);
  if (type == PNG_COLOR_TYPE_GRAY && depth < 8) png_set_expand_gray_1_2_4_to_8(png);
  if (!state->is_grey16) {  // 16-bit grey is scaled as a whole; its transparency does not count
    if (png_get_valid(png, info, PNG_INFO_tRNS) != 0) png_set_tRNS_to_alpha(png);
    if (depth == 16) png_set_strip_16(png);
  }
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  state->channels = png_get_channels(png, info);
}

void ReadPngExif(png_structp png, png_infop info, PngState* state) {
#ifdef PNG_eXIf_SUPPORTED
  png_bytep exif = nullptr;
  png_uint_32 count = 0;
  if (png_get_eXIf_1(png, info, &count, &exif) != 0) {
    state->orientation = ExifOrientation(exif, count);
  }
#else
  static_cast<void>(png), static_cast<void>(info), static_cast<void>(state);
#endif
}

// Fills `state`; its `problem` is not empty if that failed.
void ReadPng(PngState* state) {
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, state, PngFail, PngWarn);
  png_infop info = png == nullptr ? nullptr : png_create_info_struct(png);
  if (info == nullptr) {
    state->problem = "there is no memory for it";
    png_destroy_read_struct(&png, &info, nullptr);
    return;
  }
  if (setjmp(state->jump) == 0) {  // NOLINT(cert-err52-cpp)
    png_set_read_fn(png, state, PngRead);
    ReadPngHeader(png, info, state);
    const std::size_t row = png_get_rowbytes(png, info);
    state->pixels.resize(row * static_cast<std::size_t>(state->height));
    state->rows.resize(static_cast<std::size_t>(state->height));
    for (std::size_t y = 0; y < state->rows.size(); ++y) {
      state->rows[y] = state->pixels.data() + y * row;
    }
    png_read_image(png, state->rows.data());
    png_read_end(png, info);
    ReadPngExif(png, info, state);
  }
  png_destroy_read_struct(&png, &info, nullptr);
}

Picture FromGrey16(const PngState& state) {
  Picture picture(state.width, state.height);
  const std::size_t count = state.pixels.size() / 2;
  const auto value = [&state](std::size_t i) {
    return static_cast<unsigned>(state.pixels[2 * i]) << 8 | state.pixels[2 * i + 1];
  };
  unsigned largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, value(i));
  for (std::size_t i = 0; i < count; ++i) {
    const auto byte = static_cast<uint8_t>(largest > 255 ? value(i) / 257 : value(i));
    std::fill_n(picture.pixels.data() + 3 * i, 3, byte);
  }
  return picture;
}

Picture FromPng(const PngState& state) {
  if (state.is_grey16) return FromGrey16(state);
  Picture picture(state.width, state.height);
  const auto channels = static_cast<std::size_t>(state.channels);
  const bool is_grey = channels < 3;
  const bool has_alpha = channels % 2 == 0;
  for (std::size_t i = 0; i < picture.pixels.size() / 3; ++i) {
    const uint8_t* const pixel = state.pixels.data() + i * channels;
    for (std::size_t c = 0; c < 3; ++c) {
      const uint8_t value = pixel[is_grey ? 0 : c];
      picture.pixels[3 * i + c] = has_alpha ? OnWhite(value, pixel[channels - 1]) : value;
    }
  }
  return picture;
}

Picture DecodePng(const std::string& bytes, const std::string& path) {
  PngState state;
  state.bytes = reinterpret_cast<const uint8_t*>(bytes.data());
  state.size = bytes.size();
  ReadPng(&state);
  if (!state.problem.empty()) throw Damaged(path, state.problem);
  return Upright(FromPng(state), state.orientation);
}

struct JpegState {
  jpeg_error_mgr errors{};
  std::jmp_buf jump{};
  std::string problem;
  int channels = 0;
  Picture picture;
  std::vector<uint8_t> row;
  int orientation = 1;
};

void JpegFail(j_common_ptr info) {
  auto* state = static_cast<JpegState*>(info->client_data);
  char message[JMSG_LENGTH_MAX];
  info->err->format_message(info, message);
  state->problem = message;
  std::longjmp(state->jump, 1);
}

// Warnings are ignored, but for the end of the file before the end of the picture.
void JpegWarn(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) {
    static_cast<JpegState*>(info->client_data)->problem = "the file is truncated";
    std::longjmp(static_cast<JpegState*>(info->client_data)->jump, 1);
  }
}

int JpegOrientation(const jpeg_decompress_struct& info) {
  constexpr char kExif[] = "Exif\0";  // and one more zero: 6 bytes
  for (jpeg_saved_marker_ptr marker = info.marker_list; marker != nullptr; marker = marker->next) {
    if (marker->marker == JPEG_APP0 + 1 && marker->data_length > sizeof(kExif) &&
        std::memcmp(marker->data, kExif, sizeof(kExif)) == 0) {
      return ExifOrientation(marker->data + sizeof(kExif), marker->data_length - sizeof(kExif));
    }
  }
  return 1;
}

void ReadJpegRows(jpeg_decompress_struct* info, JpegState* state) {
  state->problem = SizeProblem(info->image_width, info->image_height);
  if (state->problem.empty() && info->num_components != 1 && info->num_components != 3) {
    state->problem = "it is a JPEG of " + std::to_string(info->num_components) +
                     " colour components (CMYK, say), and only grey and colour ones are read";
  }
  if (!state->problem.empty()) return;
  // The defaults of libjpeg-turbo are those that Pillow decodes with.
  info->out_color_space = info->num_components == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_start_decompress(info);
  state->picture =
      Picture(static_cast<int>(info->output_width), static_cast<int>(info->output_height));
  state->row.resize(std::size_t{3} * info->output_width);
  while (info->output_scanline < info->output_height) {
    uint8_t* const target = state->picture.at(0, static_cast<int>(info->output_scanline));
    JSAMPROW row = info->num_components == 1 ? state->row.data() : target;
    jpeg_read_scanlines(info, &row, 1);
    if (info->num_components != 1) continue;
    for (std::size_t x = 0; x < info->output_width; ++x) std::fill_n(target + 3 * x, 3, row[x]);
  }
  state->orientation = JpegOrientation(*info);
  jpeg_finish_decompress(info);
}

// Fills `state`; its `problem` is not empty if that failed.
void ReadJpeg(const std::string& bytes, JpegState* state) {
  jpeg_decompress_struct info{};
  info.err = jpeg_std_error(&state->errors);
  info.client_data = state;
  state->errors.error_exit = JpegFail;
  state->errors.emit_message = JpegWarn;
  if (setjmp(state->jump) == 0) {  // NOLINT(cert-err52-cpp)
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
    jpeg_save_markers(&info, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(&info, TRUE);
    ReadJpegRows(&info, state);
  }
  jpeg_destroy_decompress(&info);
}

Picture DecodeJpeg(const std::string& bytes, const std::string& path) {
  JpegState state;
  ReadJpeg(bytes, &state);
  if (!state.problem.empty()) throw Damaged(path, state.problem);
  return Upright(state.picture, state.orientation);
}

// The next number of a PPM header; a '#' starts a comment up to the end of the line.
int64_t HeaderNumber(const std::string& bytes, std::size_t* position) {
  const auto is_space = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
  while (*position < bytes.size() && (is_space(bytes[*position]) || bytes[*position] == '#')) {
    if (bytes[*position] == '#') {
      while (*position < bytes.size() && bytes[*position] != '\n') ++*position;
    } else {
      ++*position;
    }
  }
  int64_t value = 0;
  std::size_t digits = 0;
  for (; *position < bytes.size() && bytes[*position] >= '0' && bytes[*position] <= '9';
       ++*position, ++digits) {
    value = std::min<int64_t>(value * 10 + (bytes[*position] - '0'), kMostPixels + 1);
  }
  return digits == 0 ? -1 : value;
}

Picture DecodePpm(const std::string& bytes, const std::string& path) {
  const std::size_t channels = bytes[1] == '6' ? 3 : 1;
  std::size_t position = 2;
  const int64_t width = HeaderNumber(bytes, &position);
  const int64_t height = HeaderNumber(bytes, &position);
  const int64_t largest = HeaderNumber(bytes, &position);
  ++position;  // the one white space behind the header
  if (width < 0 || height < 0 || largest < 0) throw Damaged(path, "its PPM header is damaged");
  if (const std::string problem = SizeProblem(width, height); !problem.empty()) {
    throw Damaged(path, problem);
  }
  if (largest != 255) {
    throw Damaged(path, "its largest value is " + std::to_string(largest) +
                            ", and only PPM files with 255 are read");
  }
  Picture picture(static_cast<int>(width), static_cast<int>(height));
  const std::size_t needed = picture.pixels.size() / 3 * channels;
  if (position > bytes.size() || bytes.size() - position < needed) {
    throw Damaged(path, "the file is truncated");
  }
  for (std::size_t i = 0; i < picture.pixels.size(); ++i) {
    picture.pixels[i] = static_cast<uint8_t>(bytes[position + (channels == 3 ? i : i / 3)]);
  }
  return picture;
}

bool StartsWith(const std::string& bytes, const std::string& prefix) {
  return bytes.compare(0, prefix.size(), prefix) == 0;
}

}  // namespace

Picture ReadPicture(const std::string& path) {
  return DecodePicture(ReadFile(path, "is no picture that can be read. Give the path of a file."),
                       path);
}

Picture DecodePicture(const std::string& bytes, const std::string& path) {
  if (StartsWith(bytes, "\x89PNG\r\n\x1a\n")) return DecodePng(bytes, path);
  if (StartsWith(bytes, "\xff\xd8\xff")) return DecodeJpeg(bytes, path);
  if (StartsWith(bytes, "P6") || StartsWith(bytes, "P5")) return DecodePpm(bytes, path);
  throw Damaged(path,
                bytes.empty() ? "the file is empty" : "its first bytes are of another format");
}

Picture Upright(const Picture& picture, int orientation) {
  if (orientation < 2 || orientation > 8) return picture;
  const bool swaps = orientation >= 5;
  const int last_x = picture.width - 1;
  const int last_y = picture.height - 1;
  Picture turned(swaps ? picture.height : picture.width, swaps ? picture.width : picture.height);
  for (int y = 0; y < turned.height; ++y) {
    for (int x = 0; x < turned.width; ++x) {
      int from_x = swaps ? y : x;
      int from_y = swaps ? x : y;
      if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) {
        from_x = last_x - from_x;
      }
      if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) {
        from_y = last_y - from_y;
      }
      std::copy_n(picture.at(from_x, from_y), 3, turned.at(x, y));
    }
  }
  return turned;
}

int ExifOrientation(const uint8_t* tiff, std::size_t bytes) {
  constexpr unsigned kOrientation = 0x0112;
  constexpr unsigned kShort = 3;
  if (bytes < 8) return 1;
  const bool is_little = tiff[0] == 'I' && tiff[1] == 'I';
  if (!is_little && !(tiff[0] == 'M' && tiff[1] == 'M')) return 1;
  const auto number = [&](std::size_t position, std::size_t count) {
    std::size_t value = 0;
    for (std::size_t i = 0; i < count; ++i) {
      value |= static_cast<std::size_t>(tiff[position + i]) << 8 * (is_little ? i : count - 1 - i);
    }
    return value;
  };
  const std::size_t directory = number(4, 4);
  if (directory > bytes - 2) return 1;
  const std::size_t entries = number(directory, 2);
  for (std::size_t i = 0; i < entries; ++i) {
    const std::size_t entry = directory + 2 + 12 * i;
    if (entry + 12 > bytes) return 1;
    if (number(entry, 2) == kOrientation && number(entry + 2, 2) == kShort) {
      return static_cast<int>(number(entry + 8, 2));
    }
  }
  return 1;
}

}  // namespace bivlm::device
