#include "preprocess.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "error.h"
#include "resample.h"

namespace bivlm::device {
namespace {

constexpr int kIdefics3LongestEdge = 4096;
constexpr int64_t kMostResizedPixels = 200000000;

// Height and width, in 64 bits because those of elongated pictures are checked only afterwards.
struct Size {
  int64_t height;
  int64_t width;
};

std::string Text(int64_t width, int64_t height) {
  return std::to_string(width) + " x " + std::to_string(height);
}

Error UnknownMode(const ImageSpec& spec) {
  return InputError("the manifest asks for resize mode '" + spec.resize_mode + "' " +
                    (spec.crop.has_value() ? "with" : "without") + " crop in family '" +
                    spec.family + "', which this build does not know. Take a newer bivlm-device.");
}

Picture Resize(const Picture& picture, Size size, const ImageSpec& spec) {
  if (size.height * size.width > kMostResizedPixels) {
    throw InputError("a picture of " + Text(picture.width, picture.height) +
                     " would be resized to " + Text(size.width, size.height) + " pixels; up to " +
                     std::to_string(kMostResizedPixels) +
                     " pixels are accepted. Crop the picture.");
  }
  if (size.height < 1 || size.width < 1) {
    throw InputError("a picture of " + Text(picture.width, picture.height) +
                     " would be resized to " + Text(size.width, size.height) +
                     " pixels. Crop the picture.");
  }
  return Resized(picture, static_cast<int>(size.width), static_cast<int>(size.height),
                 FilterFromNumber(spec.resample));
}

// The middle of a square in the background colour.
Picture Squared(const Picture& picture, const ImageSpec& spec) {
  if (!spec.background.has_value()) {
    throw InputError(
        "the manifest names no background for image preprocessing 'square'. Export the model "
        "again.");
  }
  const int edge = std::max(picture.width, picture.height);
  if (int64_t{edge} * edge > kMostResizedPixels) {
    throw InputError("a picture of " + Text(picture.width, picture.height) +
                     " would be padded to " + Text(edge, edge) + " pixels; up to " +
                     std::to_string(kMostResizedPixels) +
                     " pixels are accepted. Crop the picture.");
  }
  Picture square(edge, edge);
  for (std::size_t i = 0; i < square.pixels.size(); ++i) {
    square.pixels[i] = static_cast<uint8_t>((*spec.background)[i % 3]);
  }
  const int left = (edge - picture.width) / 2;
  const int top = (edge - picture.height) / 2;
  for (int y = 0; y < picture.height; ++y) {
    std::copy_n(picture.at(0, y), 3 * picture.width, square.at(left, top + y));
  }
  return square;
}

// floor((a - b) / 2), also below 0.
int HalfDifference(int a, int b) { return (a - b - (a < b && (b - a) % 2 != 0 ? 1 : 0)) / 2; }

// The middle of a picture; where it is smaller, padded with black.
Picture CenterCrop(const Picture& picture, int height, int width) {
  // Python pads both sides alike first, then cuts from the rounded-down middle.
  const int top = HalfDifference(picture.height, height);
  const int left = HalfDifference(picture.width, width);
  Picture cut(width, height);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      const int from_x = x + left;
      const int from_y = y + top;
      if (from_x < 0 || from_y < 0 || from_x >= picture.width || from_y >= picture.height) continue;
      std::copy_n(picture.at(from_x, from_y), 3, cut.at(x, y));
    }
  }
  return cut;
}

Picture Cut(const Picture& picture, int left, int top, int edge) {
  Picture piece(edge, edge);
  for (int y = 0; y < edge; ++y) std::copy_n(picture.at(left, top + y), 3 * edge, piece.at(0, y));
  return piece;
}

Size ShortestEdge(const Picture& picture, int edge) {
  const auto other = [edge](int longer, int shorter) {
    return static_cast<int64_t>(static_cast<double>(int64_t{edge} * longer) / shorter);
  };
  if (picture.width <= picture.height) return {other(picture.height, picture.width), edge};
  return {edge, other(picture.width, picture.height)};
}

// The longer side becomes `edge`, the other one an even number, none above 4096.
Size LongestEdge(const Picture& picture, int edge) {
  const bool is_wide = picture.width >= picture.height;
  double aspect = static_cast<double>(picture.width) / picture.height;
  auto shorter = static_cast<int64_t>(is_wide ? edge / aspect : edge * aspect);
  shorter = std::max<int64_t>(1, shorter + shorter % 2);
  Size size = is_wide ? Size{shorter, edge} : Size{edge, shorter};
  aspect = static_cast<double>(size.width) / static_cast<double>(size.height);
  const int limit = kIdefics3LongestEdge;
  if (size.width >= size.height && size.width > limit) {
    size = {static_cast<int64_t>(limit / aspect), limit};
  } else if (size.height > size.width && size.height > limit) {
    size = {limit, static_cast<int64_t>(limit * aspect)};
  }
  return {std::max<int64_t>(1, size.height), std::max<int64_t>(1, size.width)};
}

int64_t RoundedUp(int64_t value, int64_t tile) { return (value + tile - 1) / tile * tile; }

// Both sides become multiples of a tile, the shorter one after keeping the aspect.
Size TiledSize(const Picture& picture, int tile) {
  const double aspect = static_cast<double>(picture.width) / picture.height;
  if (picture.width >= picture.height) {
    const int64_t width = RoundedUp(picture.width, tile);
    const auto height = static_cast<int64_t>(static_cast<double>(width) / aspect);
    return {RoundedUp(height, tile), width};
  }
  const int64_t height = RoundedUp(picture.height, tile);
  const auto width = static_cast<int64_t>(static_cast<double>(height) * aspect);
  return {height, RoundedUp(width, tile)};
}

// Appends an image of [3, height, width], rescaled in float64 and normalised in float32.
void AppendNormalized(const Picture& picture, const ImageSpec& spec, PixelBatch* batch) {
  const std::size_t count = picture.pixels.size() / 3;
  std::vector<float>& values = batch->values;
  values.reserve(values.size() + picture.pixels.size());
  for (std::size_t channel = 0; channel < 3; ++channel) {
    float table[256];  // a value depends on its byte alone
    for (int byte = 0; byte < 256; ++byte) {
      float value = static_cast<float>(byte);
      if (spec.rescale.has_value()) value = static_cast<float>(byte * *spec.rescale);
      if (!spec.mean.empty()) {
        value = (value - static_cast<float>(spec.mean.at(channel))) /
                static_cast<float>(spec.std.at(channel));
      }
      table[byte] = value;
    }
    for (std::size_t i = 0; i < count; ++i) {
      values.push_back(table[picture.pixels[3 * i + channel]]);
    }
  }
  ++batch->images;
}

PreparedPicture Idefics3(const Picture& picture, const ImageSpec& spec) {
  if (spec.resize_mode != "longest_edge" || !spec.crop.has_value()) throw UnknownMode(spec);
  const int tile = (*spec.crop)[0];
  Picture resized = Resize(picture, LongestEdge(picture, spec.resize[0]), spec);
  PreparedPicture prepared;
  if (!spec.split_tiles) {
    AppendNormalized(Resize(resized, {tile, tile}, spec), spec, &prepared.batch);
    return prepared;
  }
  resized = Resize(resized, TiledSize(resized, tile), spec);
  if (resized.height <= tile && resized.width <= tile) {
    AppendNormalized(resized, spec, &prepared.batch);
    return prepared;
  }
  prepared.rows = resized.height / tile;
  prepared.columns = resized.width / tile;
  for (int row = 0; row < prepared.rows; ++row) {
    for (int column = 0; column < prepared.columns; ++column) {
      AppendNormalized(Cut(resized, column * tile, row * tile, tile), spec, &prepared.batch);
    }
  }
  AppendNormalized(Resize(resized, {tile, tile}, spec), spec, &prepared.batch);
  return prepared;
}

PreparedPicture Clip(const Picture& picture, const ImageSpec& spec) {
  Size size{spec.resize[0], spec.resize[1]};
  if (spec.resize_mode == "shortest_edge") {
    size = ShortestEdge(picture, spec.resize[0]);
  } else if (spec.resize_mode != "exact") {
    throw UnknownMode(spec);
  }
  Picture resized = Resize(picture, size, spec);
  if (spec.crop.has_value()) resized = CenterCrop(resized, (*spec.crop)[0], (*spec.crop)[1]);
  PreparedPicture prepared;
  AppendNormalized(resized, spec, &prepared.batch);
  return prepared;
}

PreparedPicture PreparedBy(const Picture& picture, const ImageSpec& spec) {
  if (spec.family == "clip") return Clip(picture, spec);
  if (spec.family == "square") return Clip(Squared(picture, spec), spec);
  if (spec.family == "idefics3") return Idefics3(picture, spec);
  throw InputError("the manifest asks for image preprocessing '" + spec.family +
                   "'; this build knows clip, square and idefics3. Take a newer bivlm-device.");
}

}  // namespace

PreparedPicture Preprocess(const Picture& picture, const Manifest& manifest) {
  const ImageSpec& spec = manifest.image;
  if (spec.mean.size() != spec.std.size() || (!spec.mean.empty() && spec.mean.size() != 3)) {
    throw InputError("the manifest has " + std::to_string(spec.mean.size()) + " means and " +
                     std::to_string(spec.std.size()) +
                     " deviations for three channels. Export the model again.");
  }
  PreparedPicture prepared = PreparedBy(picture, spec);
  const auto& [channels, height, width] = manifest.pixel_shape;
  const int64_t values = prepared.batch.images * channels * height * width;
  if (static_cast<int64_t>(prepared.batch.values.size()) != values) {
    throw InputError(
        "preprocessing gives images of another size than the " + Text(width, height) +
        " pixels that the graph takes: the manifest contradicts itself. Export again.");
  }
  return prepared;
}

}  // namespace bivlm::device
