// patchify on the CPU: tables of weights, threads, and registration.
#include "patchify/patchify_cpu.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "patchify/patchify_op.h"

namespace keye_ops {
namespace {

constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kGrainBytes = 1 << 18;  // of output; less is not worth a thread

template <class W>
struct Table {
  std::vector<int32_t> first, count;
  std::vector<W> weights;
  int taps;

  explicit Table(const PatchifyAxis& axis)
      : first(axis.size), count(axis.size), taps(patchify_taps(axis)) {
    weights.resize(int64_t{axis.size} * taps);
    std::vector<double> values(taps);
    for (int i = 0; i < axis.size; i++) {
      const PatchifyWindow window = patchify_window(axis, i);
      double sum = 0.0;
      for (int tap = 0; tap < window.count; tap++) {
        sum += values[tap] = patchify_value(axis, window, tap);
      }
      for (int tap = 0; tap < window.count; tap++) {
        weights[int64_t{i} * taps + tap] = patchify_weight(values[tap] / sum, axis.precision, W{});
      }
      first[i] = window.first;
      count[i] = window.count;
    }
  }

  PatchifyTable pointers() const { return {first.data(), count.data(), weights.data(), taps}; }
};

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The most source pixels behind a run of output pixels.
int most_behind(const PatchifyAxis& axis, int run) {
  return static_cast<int>(run * patchify_scale(axis)) + patchify_taps(axis) + 2;
}

template <class W>
void forward_as(const PatchifyParams& params) {
  const Table<W> across(params.across), down(params.down);
  PatchifyCpuParams cpu{params, across.pointers(), down.pointers(), 0, 0, 0};
  const int columns = std::min(kPatchifyColumns, params.across.size);
  cpu.pitch = round_up(params.across.size, kPatchifyRows);
  cpu.ring_rows =
      params.vertical_first ? kPatchifyRows : patchify_taps(params.down) + kPatchifyRows;
  cpu.turned_bytes = round_up(3 * most_behind(params.across, columns), kPatchifyRows);

  // Frames, in runs of rows of patches where they are fewer than threads.
  const int64_t bands = params.down.size / params.patch_size;
  const int64_t bytes = params.num_frames * params.down.size * params.across.size * 3;
  const int64_t wanted =
      std::min<int64_t>(bytes / kGrainBytes, kTasksPerThread * torch::stable::get_num_threads());
  const int64_t runs = torch::stable::get_num_threads() == 1
                           ? 1
                           : std::clamp<int64_t>(wanted / params.num_frames, 1, bands);
  const auto run_bands = KEYE_SELECT_ISA(patchify_bands);
  const int64_t scratch = KEYE_SELECT_ISA(patchify_scratch_bytes)(cpu);
  const auto make = [&] { return std::unique_ptr<char[]>(new char[scratch]); };
  for_each_task_with(params.num_frames * runs, make, [&](const auto& memory, int64_t task) {
    const int64_t run = task % runs;
    run_bands(cpu, task / runs, static_cast<int>(bands * run / runs),
              static_cast<int>(bands * (run + 1) / runs), memory.get());
  });
}

void forward(const PatchifyParams& params, int /*device_index*/) {
  params.is_float ? forward_as<float>(params) : forward_as<int32_t>(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CPU, m) {
  patchify_backend(PatchifyDevice::kCpu) = {&forward};
  m.impl("patchify", TORCH_BOX(&patchify));
}

}  // namespace keye_ops
