// Twins of what Hopper adds, but wgmma: asynchronous copies, clusters, stmatrix, registers.
#pragma once

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "host_executor/twin/twin.h"

namespace keye_ops::twin {

// How many lanes are elected, and whether they are in the mask.
KEYE_KERNEL(kWarpSize, 1) elect_kernel(KEYE_PARAMS TwinParams params) {
  const int lane_idx = thread_idx();
  const uint32_t masks[] = {kFullMask, params.in[0] | 1, 0x10000};
  for (int i = 0; i < 3; i++) {
    bool elected = false;
    if ((masks[i] >> lane_idx & 1) != 0) elected = ptx::elect_sync(masks[i]);
    const uint32_t lanes = warp_ballot(elected);
    params.out[i * 64 + lane_idx] = reduce_add(elected ? 1u : 0u);
    params.out[i * 64 + 32 + lane_idx] = (lanes & ~masks[i]) == 0 ? 1 : 0;
  }
}

template <int kCount, bool kTransposed>
KEYE_KERNEL(kWarpSize, 1)
stmatrix_kernel(KEYE_PARAMS TwinParams params) {
  const int lane_idx = thread_idx();
  unsigned char* shared = shared_memory();
  auto* out = reinterpret_cast<FourWords*>(params.out) + lane_idx;
  store_bytes(shared + lane_idx * 16, FourWords{});
  sync_warp();
  uint32_t a[kCount];
  for (int i = 0; i < kCount; i++) a[i] = params.in[lane_idx * kCount + i];
  const uint32_t row = shared_address(shared) + static_cast<uint32_t>((lane_idx * 5 + 3) % 32 * 16);
  if constexpr (kTransposed) {
    ptx::stmatrix_trans(row, a);
  } else {
    ptx::stmatrix(row, a);
  }
  sync_warp();
  store_bytes(out, load_bytes<FourWords>(shared + lane_idx * 16));
}

// Bytes and threads on one barrier; pieces go back in another order.
template <ptx::Scope kScope>
KEYE_KERNEL(kWarpSize, 1)
bulk_kernel(KEYE_PARAMS TwinParams params) {
  constexpr uint32_t kSizes[] = {16, 48, 1024, 512}, kBarrier = 2048;
  const uint32_t shared = shared_address(shared_memory()), mbarrier = shared + kBarrier;
  if (thread_idx() != 0) return;
  ptx::mbarrier_init(mbarrier, 2);
  ptx::fence_mbarrier_init();
  uint32_t offset = 0;
  for (uint32_t i = 0; i < 4; i++) {
    ptx::mbarrier_arrive(mbarrier);
    if (i % 2 == 0) {
      ptx::mbarrier_expect_tx(mbarrier, kSizes[i]);
      ptx::mbarrier_arrive(mbarrier);
      ptx::mbarrier_expect_tx(mbarrier, 0);
    } else {
      ptx::mbarrier_arrive_expect_tx(mbarrier, kSizes[i]);
    }
    ptx::cp_async_bulk_load(shared + offset, params.in + offset / 4, kSizes[i], mbarrier);
    ptx::mbarrier_wait<kScope>(mbarrier, i % 2);
    params.out[400 + i] = ptx::mbarrier_test_wait_parity<kScope>(mbarrier, i % 2) ? 1 : 0;
    params.out[404 + i] = ptx::mbarrier_try_wait_parity<kScope>(mbarrier, i % 2) ? 1 : 0;
    offset += kSizes[i];
  }
  for (uint32_t i = 4; i-- > 0;) {
    offset -= kSizes[i];
    ptx::cp_async_bulk_store(params.out + offset / 4, shared + offset, kSizes[i]);
    ptx::cp_async_bulk_commit_group();
    if (i == 1) ptx::cp_async_bulk_wait_group_read<1>();
  }
  ptx::cp_async_bulk_wait_group_read<0>();
  ptx::cp_async_bulk_wait_group<0>();
}

// ---- TMA ----

constexpr uint32_t kMaxBoxBytes = 4096;

template <int kRank>
KEYE_KERNEL(kWarpSize, 1)
tensor_load_kernel(KEYE_PARAMS TwinParams params) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t address = shared_address(shared), mbarrier = address + kMaxBoxBytes;
  if (thread_idx() == 0) {
    int coords[kRank];
    for (int i = 0; i < kRank; i++) coords[i] = params.coords[i];
    ptx::prefetch_tensormap(params.map);
    ptx::mbarrier_init(mbarrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(mbarrier, params.box_bytes);
    ptx::cp_async_bulk_tensor_load(address, params.map, coords, mbarrier);
  }
  sync_warp();
  ptx::mbarrier_wait(mbarrier, 0);
  for (uint32_t i = thread_idx(); i < params.box_bytes / 4; i += kWarpSize) {
    params.out[i] = shared[i];
  }
}

template <int kRank>
KEYE_KERNEL(kWarpSize, 1)
tensor_store_kernel(KEYE_PARAMS TwinParams params) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (uint32_t i = thread_idx(); i < params.box_bytes / 4; i += kWarpSize) {
    shared[i] = params.in[i];
  }
  ptx::fence_proxy_async();
  sync_warp();
  if (thread_idx() != 0) return;
  int coords[kRank];
  for (int i = 0; i < kRank; i++) coords[i] = params.coords[i];
  ptx::cp_async_bulk_tensor_store(params.map, coords, shared_address(shared));
  ptx::cp_async_bulk_commit_group();
  ptx::cp_async_bulk_wait_group<0>();
}

// A tensor of rows of 160 bytes, of which some elements at the end are outside, and boxes of it:
// inside, over either edge, and far away.
template <int kRank>
void add_tensor_twins(Twins& twins) {
  constexpr int64_t kRowBytes = 160;
  const std::vector<int64_t> outer_sizes = {5, 4, 3, 2}, outer_box = {3, 2, 2, 2};
  for (uint32_t swizzle = 0; swizzle < 4; swizzle++) {
    const int64_t span = swizzle_span(Swizzle{swizzle});
    const int element_size = 1 << (kRank + swizzle) % 4;
    TensorMapSpec spec{"twin", nullptr, element_size,    {kRowBytes / element_size - 3},
                       {},     {},      Swizzle{swizzle}};
    int64_t bytes = kRowBytes;
    for (int i = 0; i + 1 < kRank; i++) {
      spec.sizes.push_back(outer_sizes[i]);
      spec.strides.push_back(bytes);
      bytes *= outer_sizes[i];
    }
    // The last is a box whose rows are half a span.
    const int first = static_cast<int>(spec.sizes[0]);
    const std::vector<std::vector<int>> places = {{0, 0, 0, 0, 0},
                                                  {-3, -1, 1, -1, 0},
                                                  {first - 2, 3, 3, 2, 1},
                                                  {9, 900, 0, 0, 0},
                                                  {1, 1, 1, 1, 0}};
    for (size_t place = 0; place < places.size(); place++) {
      const bool is_half = place + 1 == places.size();
      if (is_half && swizzle == 0) continue;
      spec.box = std::vector<int64_t>{span / element_size / (is_half ? 2 : 1)};
      for (int i = 0; i + 1 < kRank; i++) spec.box.push_back(outer_box[i]);
      int64_t box_bytes = element_size;
      for (const int64_t size : spec.box) box_bytes *= size;
      for (const bool is_load : {true, false}) {
        const std::vector<int> coords(places[place].begin(), places[place].begin() + kRank);
        twins.push_back(
            {std::string(is_load ? "cp_async_bulk_tensor_load " : "cp_async_bulk_tensor_store ") +
                 std::to_string(kRank) + "d swizzle " + std::to_string(span) + " place " +
                 std::to_string(place),
             is_load ? &tensor_load_kernel<kRank> : &tensor_store_kernel<kRank>,
             static_cast<uint32_t>((is_load ? bytes : box_bytes) / 4),
             static_cast<uint32_t>((is_load ? box_bytes : bytes) / 4),
             "bits",
             "exact",
             kWarpSize,
             kMaxBoxBytes + 8,
             1,
             {1, 1, 1},
             spec,
             coords,
             is_load});
      }
    }
  }
}

// ---- clusters ----

constexpr uint32_t kClusterSize = 4;

// Words go to the next block, which waits for them; then every block reads the one after the next.
template <class V>
KEYE_KERNEL(kWarpSize, 1)
cluster_kernel(KEYE_PARAMS TwinParams params) {
  constexpr int kNumWords = kWarpSize * sizeof(V) / 4;
  const uint32_t rank = ptx::cluster_ctarank(), size = ptx::cluster_nctarank();
  const uint32_t own = shared_address(shared_memory() + thread_idx() * sizeof(V));
  const uint32_t mbarrier = shared_address(shared_memory() + kWarpSize * sizeof(V));
  const auto* in = reinterpret_cast<const V*>(params.in) + rank * kWarpSize + thread_idx();
  auto* out = reinterpret_cast<V*>(params.out) + rank * kWarpSize + thread_idx();
  if (thread_idx() == 0) {
    ptx::mbarrier_init(mbarrier, 1);
    ptx::fence_mbarrier_init();
    params.out[kClusterSize * 2 * kNumWords + rank] = rank * 16 + size;
  }
  ptx::barrier_cluster_arrive_release();
  ptx::barrier_cluster_wait_acquire();
  const uint32_t next = (rank + 1) % size;
  ptx::st_shared_cluster(ptx::mapa(own, next), load_bytes<V>(in));
  sync_warp();
  if (thread_idx() == 0) ptx::mbarrier_arrive_cluster(ptx::mapa(mbarrier, next));
  ptx::mbarrier_wait<ptx::Scope::kCluster>(mbarrier, 0);
  store_bytes(out, load_bytes<V>(shared_memory() + thread_idx() * sizeof(V)));
  ptx::barrier_cluster_arrive_release();
  ptx::barrier_cluster_wait_acquire();
  store_bytes(out + kClusterSize * kWarpSize,
              ptx::ld_shared_cluster<V>(ptx::mapa(own, (rank + 2) % size)));
  ptx::barrier_cluster_arrive_release();
  ptx::barrier_cluster_wait_acquire();
}

// ---- registers, dependent grids ----

// 168 registers a thread at first; what one warpgroup gives away, the others take.
KEYE_KERNEL(384, 1) setmaxnreg_kernel(KEYE_PARAMS TwinParams params) {
  if (warp_in_block() < 4) {
    ptx::setmaxnreg_dec<24>();
  } else {
    ptx::setmaxnreg_inc<240>();
  }
  params.out[thread_idx()] = params.in[thread_idx()] + 1;
}

KEYE_KERNEL(kWarpSize, 1) griddepcontrol_kernel(KEYE_PARAMS TwinParams params) {
  ptx::griddepcontrol_wait();
  params.out[thread_idx()] = params.in[thread_idx()] ^ 1;
  ptx::griddepcontrol_launch_dependents();
}

inline void add_sm90_twins(Twins& twins) {
  twins.push_back({"elect_sync", &elect_kernel, 1, 192});
  const auto add = [&](const std::string& name, void (*kernel)(TwinParams), int in_words) {
    twins.push_back(
        {name, kernel, static_cast<uint32_t>(in_words), 128, "bits", "exact", kWarpSize, 512});
  };
  add("stmatrix 1", &stmatrix_kernel<1, false>, 32);
  add("stmatrix 2", &stmatrix_kernel<2, false>, 64);
  add("stmatrix 4", &stmatrix_kernel<4, false>, 128);
  add("stmatrix_trans 1", &stmatrix_kernel<1, true>, 32);
  add("stmatrix_trans 2", &stmatrix_kernel<2, true>, 64);
  add("stmatrix_trans 4", &stmatrix_kernel<4, true>, 128);
  const auto add_bulk = [&](const char* name, void (*kernel)(TwinParams)) {
    twins.push_back({name, kernel, 400, 408, "bits", "exact", kWarpSize, 2056});
  };
  add_bulk("cp_async_bulk block", &bulk_kernel<ptx::Scope::kBlock>);
  add_bulk("cp_async_bulk cluster", &bulk_kernel<ptx::Scope::kCluster>);
  add_tensor_twins<1>(twins);
  add_tensor_twins<2>(twins);
  add_tensor_twins<3>(twins);
  add_tensor_twins<4>(twins);
  add_tensor_twins<5>(twins);
  const auto add_cluster = [&](const char* name, void (*kernel)(TwinParams), uint32_t bytes) {
    const uint32_t words = kClusterSize * kWarpSize * bytes / 4;
    twins.push_back({name,
                     kernel,
                     words,
                     2 * words + kClusterSize,
                     "bits",
                     "exact",
                     kWarpSize,
                     kWarpSize * bytes + 8,
                     kClusterSize,
                     {kClusterSize, 1, 1}});
  };
  add_cluster("st_shared_cluster 4", &cluster_kernel<uint32_t>, 4);
  add_cluster("st_shared_cluster 8", &cluster_kernel<uint64_t>, 8);
  add_cluster("st_shared_cluster 16", &cluster_kernel<FourWords>, 16);
  twins.push_back({"setmaxnreg", &setmaxnreg_kernel, 384, 384, "bits", "exact", 384});
  twins.push_back({"griddepcontrol", &griddepcontrol_kernel, 32, 32});
}

}  // namespace keye_ops::twin
