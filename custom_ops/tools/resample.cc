#include "resample.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "error.h"

namespace bivlm::device {
namespace {

constexpr int kFractionBits = 32 - 8 - 2;
constexpr double kPi = 3.14159265358979323846;

double Sinc(double x) { return x == 0.0 ? 1.0 : std::sin(x * kPi) / (x * kPi); }

double Lanczos(double x) { return -3.0 <= x && x < 3.0 ? Sinc(x) * Sinc(x / 3.0) : 0.0; }

double Bilinear(double x) { return std::max(0.0, 1.0 - std::fabs(x)); }

double Bicubic(double x) {
  constexpr double kA = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((kA + 2.0) * x - (kA + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * kA;
  return 0.0;
}

double Box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

double Hamming(double x) {
  x = std::fabs(x);
  if (x == 0.0) return 1.0;
  if (x >= 1.0) return 0.0;
  x *= kPi;
  return std::sin(x) / x * (0.54F + 0.46F * std::cos(x));  // Pillow's are floats, too
}

struct FilterFunction {
  double (*value)(double x);
  double support;
};

FilterFunction FunctionOf(Filter filter) {
  switch (filter) {
    case Filter::kLanczos:
      return {Lanczos, 3.0};
    case Filter::kBilinear:
      return {Bilinear, 1.0};
    case Filter::kBicubic:
      return {Bicubic, 2.0};
    case Filter::kBox:
      return {Box, 0.5};
    case Filter::kHamming:
      return {Hamming, 1.0};
  }
  throw InputError("unknown filter");
}

// How one value of the result is made of values `first`, `first + 1`, ... of the source.
struct Weights {
  int first = 0;
  std::vector<int32_t> values;  // in units of 2^-kFractionBits
};

std::vector<Weights> WeightsOf(int source, int target, Filter filter) {
  const FilterFunction function = FunctionOf(filter);
  const double scale = static_cast<double>(source) / target;
  const double widened = std::max(scale, 1.0);
  const double support = function.support * widened;
  std::vector<Weights> all(static_cast<std::size_t>(target));
  std::vector<double> exact;
  for (int i = 0; i < target; ++i) {
    const double center = (i + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(center - support + 0.5));
    const int end = std::min(source, static_cast<int>(center + support + 0.5));
    exact.clear();
    double sum = 0.0;
    for (int x = first; x < end; ++x) {
      exact.push_back(function.value((x - center + 0.5) * (1.0 / widened)));
      sum += exact.back();
    }
    Weights& weights = all[static_cast<std::size_t>(i)];
    weights.first = first;
    for (double value : exact) {
      if (sum != 0.0) value /= sum;
      const double fixed = value * (1 << kFractionBits);
      weights.values.push_back(static_cast<int32_t>(value < 0.0 ? fixed - 0.5 : fixed + 0.5));
    }
  }
  return all;
}

// Sums `weights` over pixels that lie `stride` bytes apart, one channel.
uint8_t Sum(const Weights& weights, const uint8_t* first, std::size_t stride) {
  int32_t sum = 1 << (kFractionBits - 1);
  for (std::size_t i = 0; i < weights.values.size(); ++i) {
    sum += weights.values[i] * first[i * stride];
  }
  return static_cast<uint8_t>(std::clamp(sum >> kFractionBits, 0, 255));
}

Picture WithWidth(const Picture& picture, int width, Filter filter) {
  if (width == picture.width) return picture;
  Picture result(width, picture.height);
  const std::vector<Weights> columns = WeightsOf(picture.width, width, filter);
  for (int y = 0; y < picture.height; ++y) {
    for (int x = 0; x < width; ++x) {
      const Weights& weights = columns[static_cast<std::size_t>(x)];
      for (std::size_t c = 0; c < 3; ++c) {
        result.at(x, y)[c] = Sum(weights, picture.at(weights.first, y) + c, 3);
      }
    }
  }
  return result;
}

Picture WithHeight(const Picture& picture, int height, Filter filter) {
  if (height == picture.height) return picture;
  Picture result(picture.width, height);
  const std::vector<Weights> rows = WeightsOf(picture.height, height, filter);
  const std::size_t stride = std::size_t{3} * static_cast<std::size_t>(picture.width);
  for (int y = 0; y < height; ++y) {
    const Weights& weights = rows[static_cast<std::size_t>(y)];
    const uint8_t* const first = picture.at(0, weights.first);
    uint8_t* const target = result.at(0, y);
    for (std::size_t i = 0; i < stride; ++i) target[i] = Sum(weights, first + i, stride);
  }
  return result;
}

}  // namespace

Filter FilterFromNumber(int number) {
  if (number < 1 || number > 5) {
    throw InputError("the manifest asks for resampling filter " + std::to_string(number) +
                     "; this tool has 1 (Lanczos), 2 (bilinear), 3 (bicubic), 4 (box) and 5 "
                     "(Hamming). Run the model with bivlm-run.");
  }
  return static_cast<Filter>(number);
}

Picture Resized(const Picture& picture, int width, int height, Filter filter) {
  const bool rows_first =
      height < picture.height && picture.height - height > 2 * (picture.width - width);
  if (rows_first) return WithWidth(WithHeight(picture, height, filter), width, filter);
  return WithHeight(WithWidth(picture, width, filter), height, filter);
}

}  // namespace bivlm::device
