// The twins on the host executor, with the C functions that twin_cuda.cu has.
#include "host_executor/executor.h"
#include "host_executor/twin/memory.cuh"
#include "host_executor/twin/sm90.cuh"
#include "host_executor/twin/warp.cuh"
#include "host_executor/twin/wgmma.cuh"

namespace keye_ops::twin {
namespace {

// NOTE: variables of the namespace: guards of those in functions would need more of the
// sanitizer's runtime than the executor has.
const Twins kTwins = [] {
  Twins twins;
  add_warp_twins(twins);
  add_memory_twins(twins);
  add_sm90_twins(twins);
  add_wgmma_twins(twins);
  return twins;
}();

const std::string kList = describe(kTwins);
std::string error_text;

void run(const Twin& twin, const uint32_t* in, uint32_t* out, uint64_t seed) {
  using namespace host_executor;
  const auto words = [](const char* name, const uint32_t* host, uint32_t count, Role role) {
    return static_cast<uint32_t*>(guard(name, host, 4, {{count, 4}}, role));
  };
  const struct Call {
    void (*kernel)(TwinParams);
    TwinParams params;
  } call{twin.kernel, twin_params(twin, words("in", in, twin.in_words, Role::kInput),
                                  words("out", out, twin.out_words, Role::kInOut))};
  LaunchConfig config;
  config.grid = {twin.grid[0], twin.grid[1], twin.grid[2]};
  config.block.x = twin.num_threads;
  config.cluster.x = twin.cluster_size;
  config.shared_bytes = twin.shared_bytes;
  Schedule schedule;
  schedule.seed = seed;
  const Report report = launch(
      config,
      [](const void* context) {
        const Call& call = *static_cast<const Call*>(context);
        call.kernel(call.params);
      },
      &call, schedule);
  copy_back();
  free_copies();
  KEYE_CHECK(report.findings.empty(), "a twin must have no findings, got\n", report.text());
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* twin_list() { return kList.c_str(); }

extern "C" __attribute__((visibility("default"))) const char* twin_run(const char* name,
                                                                       const uint32_t* in,
                                                                       uint32_t* out,
                                                                       uint64_t seed) {
  try {
    run(find_twin(kTwins, name), in, out, seed);
    return nullptr;
  } catch (const std::exception& error) {
    error_text = error.what();
    return error_text.c_str();
  }
}

}  // namespace keye_ops::twin
