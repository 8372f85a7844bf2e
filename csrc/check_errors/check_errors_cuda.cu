// check_errors on CUDA: registration.
#include "check_errors/check_errors_op.h"
#include "common/launch.cuh"

namespace keye_ops {
namespace {

const bool kRegistered = [] {
  take_cuda_error_word() = &take_error_word;
  return true;
}();

}  // namespace
}  // namespace keye_ops
