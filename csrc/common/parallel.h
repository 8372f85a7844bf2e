// Work for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace keye_ops {

// Calls f(i) for every i in [0, count), each once, by as many threads as torch.set_num_threads
// says. A thread takes the next index when it is free, so put long tasks first. What f writes must
// not depend on who takes what. For count <= 1 no thread is woken.
template <class F>
void for_each_task(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  };
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, work);
}

}  // namespace keye_ops
