// patchify's CUDA kernels on the host executor: every tensor becomes a guarded copy.
#include "host_executor/kernels.h"
#include "patchify/patchify_host_cuda.h"
#include "patchify/patchify_launch.cuh"

namespace keye_ops {

using host_executor::Role;

void patchify_host_cuda(const PatchifyParams& given, int device_index) {
  const struct Freed {
    ~Freed() { host_executor::free_copies(); }
  } freed;
  PatchifyParams params = given;
  const int64_t row = int64_t{3} * params.across.source;
  const int64_t values = params.num_frames * params.down.size * params.across.size * 3;
  params.frames = static_cast<const uint8_t*>(host_executor::guard(
      "frames", params.frames, 1,
      {{params.num_frames, params.stride_frame}, {params.down.source, params.stride_row}, {row, 1}},
      Role::kInput));
  params.out = static_cast<uint8_t*>(
      host_executor::guard("out", params.out, 1, {{values, 1}}, Role::kOutput));
  launch_patchify(params, device_index);
  host_executor::copy_back();
}

// ---- launches by name, past the op's checks: with any plan ----

namespace {

using host_executor::Arguments;

PatchifyAxis named_axis(const Arguments& arguments, const std::string& name) {
  return {static_cast<int>(arguments.integer(name + "_source")),
          static_cast<int>(arguments.integer(name + "_size")),
          static_cast<int>(arguments.integer(name + "_precision")),
          arguments.integer("bicubic") != 0};
}

template <class W>
host_executor::BoundKernel bind(const PatchifyParams& patchify, const Arguments& arguments) {
  PatchifyKernelParams params = plan_patchify<W>(patchify);
  set_span(params, static_cast<int>(arguments.integer("span")));
  params.chunk_rows = static_cast<int>(arguments.integer("chunk_rows"));
  params.frames_per_block = static_cast<int>(arguments.integer("frames_per_block"));
  return host_executor::bind_kernel(&patchify_kernel<W>, params);
}

const bool kRegistered = host_executor::register_kernel("patchify", [](const Arguments& arguments) {
  PatchifyParams params{};
  params.frames = arguments.array<uint8_t>("frames");
  params.out = arguments.array<uint8_t>("out");
  params.stride_frame = arguments.integer("stride_frame");
  params.stride_row = arguments.integer("stride_row");
  params.num_frames = arguments.integer("num_frames");
  params.across = named_axis(arguments, "across");
  params.down = named_axis(arguments, "down");
  params.patch_size = static_cast<int>(arguments.integer("patch_size"));
  params.is_float = arguments.integer("is_float") != 0;
  return params.is_float ? bind<float>(params, arguments) : bind<int32_t>(params, arguments);
});

}  // namespace

}  // namespace keye_ops
