// A picture becomes pixel_values, number for number as runtime/preprocess.py does it.
#ifndef BIVLM_TOOLS_PREPROCESS_H_
#define BIVLM_TOOLS_PREPROCESS_H_

#include "bundle.h"
#include "picture.h"
#include "session.h"

namespace bivlm::device {

// A preprocessed picture: one image, or the tiles row by row and then the whole.
struct PreparedPicture {
  PixelBatch batch;
  int rows = 0;  // of tiles; 0 if the picture was not split
  int columns = 0;
};

// Throws InputError if the manifest asks for what this build does not know, or the picture is so
// elongated that resizing it would take gigabytes.
PreparedPicture Preprocess(const Picture& picture, const Manifest& manifest);

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_PREPROCESS_H_
