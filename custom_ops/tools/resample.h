// Resizing of 8-bit pictures, byte for byte as Pillow does it.
#ifndef BIVLM_TOOLS_RESAMPLE_H_
#define BIVLM_TOOLS_RESAMPLE_H_

#include "picture.h"

namespace bivlm::device {

// Numbers of PIL.Image.Resampling, as the manifest holds them.
enum class Filter : int { kLanczos = 1, kBilinear = 2, kBicubic = 3, kBox = 4, kHamming = 5 };

// Throws InputError for a number that is none of Filter.
Filter FilterFromNumber(int number);

// `picture` in another size: coefficients in float64 from the filter widened by the scale, rounded
// to 22 fractional bits; width first, then height, each rounded to 8 bits. The height comes first
// if it shrinks by more than twice as many pixels as the width, as in Pillow 13 (its pull request
// 9549); with older ones such pictures can differ by one step. Source: Pillow,
// src/libImaging/Resample.c.
Picture Resized(const Picture& picture, int width, int height, Filter filter);

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_RESAMPLE_H_
