// RMSNorm of a row, y = x * rstd * weight: the formulas, once for host and device.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace keye_ops {

// 1 / sqrt(mean(x ** 2) + eps), from the sum of squares over the row.
template <class S>
KEYE_HOST_DEVICE S rms_norm_rstd(S squares, S size, S eps) {
  return 1 / std::sqrt(squares / size + eps);
}

// Gradient with respect to x: normed is x * rstd, weighted is dy * weight, and correlation is
// mean(weighted * normed).
template <class V, class S>
KEYE_HOST_DEVICE V rms_norm_dx(V weighted, V normed, S rstd, S correlation) {
  return rstd * (weighted - correlation * normed);
}

}  // namespace keye_ops
