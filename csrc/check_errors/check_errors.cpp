// check_errors: schema, and the error that a kernel has left behind.
#include <torch/csrc/stable/library.h>

#include "check_errors/check_errors_op.h"
#include "common/check.h"

namespace keye_ops {

TakeErrorWord& take_cuda_error_word() {
  static TakeErrorWord take = nullptr;
  return take;
}

namespace {

void check_errors(int64_t device_index) {
  if (take_cuda_error_word() == nullptr) return;
  const ErrorWord word = take_cuda_error_word()(static_cast<int>(device_index));
  const auto error = static_cast<DeviceError>(word.code);
  KEYE_CHECK(error == DeviceError::kNone, text_of(word));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(keye_ops, m) { m.def("check_errors(int device_index) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CompositeExplicitAutograd, m) {
  m.impl("check_errors", TORCH_BOX(&check_errors));
}

}  // namespace keye_ops
