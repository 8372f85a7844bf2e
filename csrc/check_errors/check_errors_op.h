// check_errors: the host side that all devices share.
#pragma once

#include "common/error_word.h"
#include "common/export.h"

namespace keye_ops {

// Waits for a device, and takes its error word: it is empty afterwards. Null without kernels for
// such devices.
using TakeErrorWord = ErrorWord (*)(int device_index);

// The entry of CUDA devices, which their library fills.
KEYE_API TakeErrorWord& take_cuda_error_word();

}  // namespace keye_ops
