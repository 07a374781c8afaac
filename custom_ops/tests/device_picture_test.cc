// Pictures of bivlm-device: decoding, orientation, resizing and preprocessing.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "error.h"
#include "picture.h"
#include "preprocess.h"
#include "resample.h"

namespace bivlm::device {
namespace {

using testing::Checker;

uint8_t Value(int x, int y, int channel) {
  return static_cast<uint8_t>((x * 53 + y * 101 + channel * 37 + x * y * 7) % 256);
}

Picture Drawn(int width, int height) {
  Picture picture(width, height);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (int c = 0; c < 3; ++c) picture.at(x, y)[c] = Value(x, y, c);
    }
  }
  return picture;
}

// What reading `bytes` complains about; "" if it does not.
std::string Problem(const std::string& bytes) {
  try {
    DecodePicture(bytes, "file");
    return "";
  } catch (const Error& error) {
    return error.exit_code() == 3 ? error.what() : "wrong exit code";
  }
}

bool Holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Of Drawn(7, 5): the first channel, then all channels of the last pixel. From Pillow 13:
// Image.fromarray(...).resize((width, height), filter).
struct Resizing {
  int filter;
  int width;
  int height;
  std::vector<int> values;
};

const std::vector<Resizing>& Resizings() {
  static const std::vector<Resizing> all = {
      {1, 3, 2, {95, 126, 110, 130, 112, 135, 135, 133, 139}},
      {1, 8, 3, {45,  85,  150, 121, 135, 138, 62,  120, 153, 72,  131, 109, 99, 134,
                 103, 166, 98,  172, 141, 75,  128, 147, 95,  172, 172, 84,  139}},
      {2, 3, 2, {103, 121, 114, 125, 113, 132, 132, 131, 134}},
      {2, 8, 3, {43, 89,  138, 125, 127, 130, 78,  123, 145, 84,  116, 111, 119, 134,
                 95, 149, 105, 168, 136, 97,  117, 139, 107, 170, 170, 98,  135}},
      {3, 3, 2, {98, 126, 111, 127, 113, 133, 133, 130, 137}},
      {3, 8, 3, {42, 87,  145, 125, 129, 136, 68,  122, 150, 75,  124, 108, 112, 137,
                 94, 157, 102, 175, 136, 87,  119, 146, 99,  172, 172, 92,  137}},
      {4, 3, 2, {89, 139, 90, 137, 117, 140, 140, 113, 150}},
      {4, 8, 3, {51, 107, 164, 92,  92,  149, 77, 134, 202, 13,  80,  147, 147, 214,
                 25, 92,  98,  175, 125, 74,  74, 152, 101, 179, 179, 88,  125}},
      {5, 3, 2, {100, 121, 109, 126, 108, 132, 132, 122, 142}},
      {5, 8, 3, {38, 92,  141, 123, 128, 149, 62,  116, 165, 54,  108, 113, 134, 161,
                 65, 129, 110, 185, 118, 95,  117, 156, 89,  165, 165, 105, 142}},
  };
  return all;
}

void ResizesAsPillow(Checker* check) {
  const Picture source = Drawn(7, 5);
  for (const Resizing& want : Resizings()) {
    const Picture found = Resized(source, want.width, want.height, FilterFromNumber(want.filter));
    std::vector<int> values;
    for (std::size_t i = 0; i < found.pixels.size(); i += 3) values.push_back(found.pixels[i]);
    values.insert(values.end(), found.pixels.end() - 3, found.pixels.end());
    check->Expect(values == want.values, "filter ", want.filter, " to ", want.width, " x ",
                  want.height);
  }
}

void ResizesAnySize(Checker* check) {
  for (int filter = 1; filter <= 5; ++filter) {
    for (const int from : {1, 2, 3, 17, 64}) {
      for (const int to : {1, 2, 5, 33, 100}) {
        Picture plain(from, from);
        std::fill(plain.pixels.begin(), plain.pixels.end(), uint8_t{200});
        const Picture found = Resized(plain, to, from, FilterFromNumber(filter));
        const bool is_plain = std::all_of(found.pixels.begin(), found.pixels.end(),
                                          [](uint8_t value) { return value == 200; });
        check->Expect(is_plain && found.width == to && found.height == from, "one colour, filter ",
                      filter, " ", from, " to ", to);
      }
    }
  }
  const Picture picture = Drawn(9, 4);
  check->Expect(Resized(picture, 9, 4, Filter::kBicubic).pixels == picture.pixels, "same size");
  bool is_refused = false;
  try {
    FilterFromNumber(0);
  } catch (const Error& error) {
    is_refused = Holds(error.what(), "filter 0");
  }
  check->Expect(is_refused, "filter 0 is refused");
}

void TurnsUpright(Checker* check) {
  const Picture picture = Drawn(3, 2);
  // Where pixel (0, 0) of the file ends up, and the one right of it, for orientations 1 to 8.
  const int places[8][4] = {{0, 0, 1, 0}, {2, 0, 1, 0}, {2, 1, 1, 1}, {0, 1, 1, 1},
                            {0, 0, 0, 1}, {1, 0, 1, 1}, {1, 2, 1, 1}, {0, 2, 0, 1}};
  for (int orientation = 1; orientation <= 8; ++orientation) {
    const Picture turned = Upright(picture, orientation);
    const int* place = places[orientation - 1];
    check->Expect(turned.width == (orientation < 5 ? 3 : 2), "width at orientation ", orientation);
    check->Expect(std::equal(picture.at(0, 0), picture.at(0, 0) + 3, turned.at(place[0], place[1])),
                  "corner at orientation ", orientation);
    check->Expect(std::equal(picture.at(1, 0), picture.at(1, 0) + 3, turned.at(place[2], place[3])),
                  "neighbour at orientation ", orientation);
  }
  check->Expect(Upright(picture, 9).pixels == picture.pixels, "no such orientation");
  const std::vector<uint8_t> little = {'I', 'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12,
                                       1,   3,   0,  1, 0, 0, 0, 6, 0, 0, 0};
  const std::vector<uint8_t> big = {'M',  'M', 0, 42, 0, 0, 0, 8, 0, 1, 1,
                                    0x12, 0,   3, 0,  0, 0, 1, 0, 8, 0, 0};
  check->Expect(ExifOrientation(little.data(), little.size()) == 6, "little-endian EXIF");
  check->Expect(ExifOrientation(big.data(), big.size()) == 8, "big-endian EXIF");
  for (std::size_t bytes = 0; bytes < little.size(); ++bytes) {
    const std::vector<uint8_t> cut(little.begin(),
                                   little.begin() + static_cast<std::ptrdiff_t>(bytes));
    check->Expect(ExifOrientation(cut.data(), bytes) == 1, "EXIF of ", bytes, " bytes");
  }
}

void ReadsPpm(Checker* check) {
  const Picture colour = DecodePicture("P6 # a comment\n2 1\n255\nabcdef", "file");
  check->Expect(colour.width == 2 && colour.height == 1, "size of a PPM");
  check->Expect(std::string(colour.pixels.begin(), colour.pixels.end()) == "abcdef", "PPM");
  const Picture grey = DecodePicture("P5 1 2 255 xy", "file");
  check->Expect(std::string(grey.pixels.begin(), grey.pixels.end()) == "xxxyyy", "PGM");
  check->Expect(Holds(Problem("P6 2 1 255 abcde"),
                      "'file' cannot be read as a picture: the file is truncated"),
                "a PPM that ends early");
  check->Expect(Holds(Problem("P6 2 1 65535 abcdef"), "its largest value is 65535"), "16 bits");
  check->Expect(Holds(Problem("P6 0 1 255 "), "no pixels"), "no width");
  check->Expect(Holds(Problem("P6 99999 99999 255 "), "more than the"), "too large");
  check->Expect(Holds(Problem("P6 99999999999999999999 1 255 "), "more than the"), "overflow");
  check->Expect(Holds(Problem("P6 2"), "header is damaged"), "no height");
}

void RefusesOthers(Checker* check) {
  check->Expect(Holds(Problem(""), "the file is empty"), "empty");
  check->Expect(Holds(Problem("GIF89a"), "another format"), "GIF");
  check->Expect(Holds(Problem("P3 1 1 255 1 2 3"), "another format"), "plain PPM");
  const std::string png("\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 16);
  check->Expect(Holds(Problem(png), "truncated"), "a PNG that ends early");
  check->Expect(!Problem(png + std::string(100, 'x')).empty(), "a PNG of noise");
  check->Expect(!Problem("\xff\xd8\xff" + std::string(50, '\x01')).empty(), "a JPEG of noise");
}

Manifest ManifestOf(const std::string& family, const std::string& mode, std::array<int, 2> resize,
                    std::array<int64_t, 3> shape) {
  Manifest manifest;
  manifest.image.family = family;
  manifest.image.resize_mode = mode;
  manifest.image.resize = resize;
  manifest.image.resample = 3;
  manifest.pixel_shape = shape;
  return manifest;
}

void Preprocesses(Checker* check) {
  Manifest manifest = ManifestOf("clip", "exact", {2, 3}, {3, 2, 3});
  manifest.image.rescale = 1.0 / 255;
  manifest.image.mean = {0.5, 0.25, 0.0};
  manifest.image.std = {0.5, 2.0, 1.0};
  const Picture picture = Drawn(3, 2);
  const PreparedPicture found = Preprocess(picture, manifest);
  check->Expect(found.batch.images == 1 && found.rows == 0, "one image");
  for (std::size_t c = 0; c < 3; ++c) {
    for (std::size_t i = 0; i < 6; ++i) {
      const auto scaled = static_cast<float>(picture.pixels[3 * i + c] * (1.0 / 255));
      const float want = (scaled - static_cast<float>(manifest.image.mean[c])) /
                         static_cast<float>(manifest.image.std[c]);
      check->Expect(found.batch.values[6 * c + i] == want, "value ", i, " of channel ", c);
    }
  }
  // A crop larger than the picture is padded with black, the odd row before it.
  manifest = ManifestOf("clip", "exact", {2, 3}, {3, 5, 3});
  manifest.image.crop = {5, 3};
  const std::vector<float> padded = Preprocess(picture, manifest).batch.values;
  check->Expect(padded[5] == 0.0F && padded[6] == Value(0, 0, 0) && padded[9] == Value(0, 1, 0) &&
                    padded[12] == 0.0F,
                "padded crop");
  manifest = ManifestOf("square", "exact", {3, 3}, {3, 3, 3});
  manifest.image.background = {7, 8, 9};
  const std::vector<float> square = Preprocess(picture, manifest).batch.values;
  check->Expect(square[0] == Value(0, 0, 0) && square[6] == 7.0F && square[26] == 9.0F, "square");
  manifest = ManifestOf("idefics3", "longest_edge", {8, 8}, {3, 4, 4});
  manifest.image.crop = {4, 4};
  manifest.image.split_tiles = true;
  const PreparedPicture tiles = Preprocess(Drawn(20, 10), manifest);
  check->Expect(tiles.rows == 1 && tiles.columns == 2 && tiles.batch.images == 3, "tiles");
}

void RefusesManifests(Checker* check) {
  const auto problem = [](const Manifest& manifest, const Picture& picture) -> std::string {
    try {
      Preprocess(picture, manifest);
      return "";
    } catch (const Error& error) {
      return error.what();
    }
  };
  const Picture picture = Drawn(3, 2);
  check->Expect(Holds(problem(ManifestOf("qwen", "exact", {2, 3}, {3, 2, 3}), picture), "'qwen'"),
                "unknown family");
  check->Expect(Holds(problem(ManifestOf("clip", "longest_edge", {2, 3}, {3, 2, 3}), picture),
                      "'longest_edge'"),
                "unknown mode");
  check->Expect(
      Holds(problem(ManifestOf("square", "exact", {2, 2}, {3, 2, 2}), picture), "no background"),
      "no background");
  check->Expect(
      Holds(problem(ManifestOf("clip", "exact", {2, 2}, {3, 2, 3}), picture), "contradicts itself"),
      "other size");
  check->Expect(Holds(problem(ManifestOf("clip", "shortest_edge", {32, 32}, {3, 32, 32}),
                              Picture(1000000, 1)),
                      "1000000 x 1 would be resized to 32000000 x 32"),
                "endless strip");
}

}  // namespace
}  // namespace bivlm::device

int main() {
  bivlm::testing::Checker check;
  bivlm::device::ResizesAsPillow(&check);
  bivlm::device::ResizesAnySize(&check);
  bivlm::device::TurnsUpright(&check);
  bivlm::device::ReadsPpm(&check);
  bivlm::device::RefusesOthers(&check);
  bivlm::device::Preprocesses(&check);
  bivlm::device::RefusesManifests(&check);
  return check.Finish("device_picture_test");
}
