// check_errors of the kernels on the host executor, while a test wants it.
#include "check_errors/check_errors_host_cuda.h"

#include "check_errors/check_errors_op.h"

namespace keye_ops {
namespace {

const TakeErrorWord kOnDevice = take_cuda_error_word();

}  // namespace

extern "C" {

KEYE_API void check_errors_host_cuda_install() {
  take_error_word_host_cuda(0);  // what an earlier test has left
  take_cuda_error_word() = &take_error_word_host_cuda;
}

KEYE_API void check_errors_host_cuda_restore() { take_cuda_error_word() = kOnDevice; }
}

}  // namespace keye_ops
