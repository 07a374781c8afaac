// Errors that a user can fix: what is wrong, what is accepted, what to do.
#ifndef BIVLM_TOOLS_ERROR_H_
#define BIVLM_TOOLS_ERROR_H_

#include <stdexcept>
#include <string>

namespace bivlm::device {

class Error : public std::runtime_error {
 public:
  Error(int exit_code, const std::string& message)
      : std::runtime_error(message), exit_code_(exit_code) {}
  int exit_code() const { return exit_code_; }

 private:
  int exit_code_;
};

// The request cannot be carried out.
inline Error RequestError(const std::string& message) { return Error(2, message); }

// An input file is missing, damaged or of a kind that is not read.
inline Error InputError(const std::string& message) { return Error(3, message); }

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_ERROR_H_
