// RMSNorm of a row, y = x * rstd * weight: the formulas, once for host and device.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace keye_ops {

// 1 / sqrt(mean(x ** 2) + eps), from the sum of squares over the row.
template <class S>
KEYE_HOST_DEVICE S rms_norm_rstd(S squares, S size, S eps) {
  const S mean = squares / size, sum = mean + eps, root = 1 / std::sqrt(sum);
  // A step of Newton's with what the roundings have lost: an error of rstd is one of all values of
  // the row.
  const S part = sum - mean;
  const S lost = (mean - (sum - part)) + (eps - part) + std::fma(-mean, size, squares) / size;
  const S square = root * root, rest = std::fma(root, root, -square);
  const S missed = std::fma(-sum, square, S(1)) - (sum * rest + lost * square);
  const S better = std::fma(root, missed / 2, root);
  return better == better ? better : root;  // of zero and of infinity
}

// Gradient with respect to x: normed is x * rstd, weighted is dy * weight, and correlation is
// mean(weighted * normed).
template <class V, class S>
KEYE_HOST_DEVICE V rms_norm_dx(V weighted, V normed, S rstd, S correlation) {
  return rstd * (weighted - correlation * normed);
}

}  // namespace keye_ops
