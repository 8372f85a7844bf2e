// check_errors on the host executor.
#include "check_errors/check_errors_host_cuda.h"
#include "common/launch.cuh"

namespace keye_ops {

ErrorWord take_error_word_host_cuda(int /*device_index*/) {
  ErrorWord& word = *host_error_word();
  const ErrorWord found = word;
  word = {};
  return found;
}

}  // namespace keye_ops
