// check_errors on the host executor: the word that kernels there report to.
#pragma once

#include "common/error_word.h"

namespace keye_ops {

ErrorWord take_error_word_host_cuda(int device_index);

}  // namespace keye_ops
