// Work for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace keye_ops {

// Calls f(state, i) for every i in [0, count), each once, by as many threads as
// torch.set_num_threads says, each with a state of its own from make_state(). A thread takes the
// next index when it is free, so put long tasks first. What f writes must not depend on who takes
// what. For count <= 1 no thread is woken.
template <class Make, class F>
void for_each_task_with(int64_t count, const Make& make_state, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    const auto state = make_state();
    for (int64_t i = next++; i < count; i = next++) f(state, i);
  };
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (workers > 0) torch::stable::parallel_for(0, workers, 1, work);
}

// The same without a state.
template <class F>
void for_each_task(int64_t count, const F& f) {
  for_each_task_with(count, [] { return 0; }, [&](int, int64_t i) { f(i); });
}

}  // namespace keye_ops
