// Errors: every message names the op, the requirement and the value received.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace keye_ops {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream stream;
  ((stream << parts), ...);
  return stream.str();
}

// A macro, so that the message is built on failure only.
#define KEYE_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(::keye_ops::message(__VA_ARGS__))

}  // namespace keye_ops
