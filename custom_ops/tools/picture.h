// Files to pictures in RGB, as Pillow and bivlm_edge/pictures.py read them.
#ifndef BIVLM_TOOLS_PICTURE_H_
#define BIVLM_TOOLS_PICTURE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace bivlm::device {

// 8-bit RGB, row by row.
struct Picture {
  Picture() = default;
  Picture(int picture_width, int picture_height)
      : width(picture_width),
        height(picture_height),
        pixels(std::size_t{3} * static_cast<std::size_t>(picture_width) *
               static_cast<std::size_t>(picture_height)) {}

  uint8_t* at(int x, int y) {
    return pixels.data() + 3 * (static_cast<std::size_t>(y) * static_cast<std::size_t>(width) +
                                static_cast<std::size_t>(x));
  }
  const uint8_t* at(int x, int y) const { return const_cast<Picture*>(this)->at(x, y); }

  int width = 0;
  int height = 0;
  std::vector<uint8_t> pixels;
};

// The picture in a PNG, JPEG or binary PPM or PGM file: upright by its EXIF orientation,
// transparency on white, 16-bit grey scaled to 8 bits. Throws InputError.
Picture ReadPicture(const std::string& path);

// The same with the file's bytes in memory; `path` is what errors call it.
Picture DecodePicture(const std::string& bytes, const std::string& path);

// `picture` turned as EXIF orientation 1 to 8 says; other values leave it as it is.
Picture Upright(const Picture& picture, int orientation);

// EXIF orientation in a TIFF header and what follows it; 1 if it says none.
int ExifOrientation(const uint8_t* tiff, std::size_t bytes);

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_PICTURE_H_
