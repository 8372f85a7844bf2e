// LayerNorm and RMSNorm of rows on CUDA, forward and backward. A row lies in the registers of a
// team, which is a warp or all warps of a block, 16 bytes a chunk: it comes from memory once. Where
// it lies there is for the op to say, and which rows there are.
#pragma once

#include "common/layer_norm.h"
#include "common/ptx/control.cuh"
#include "common/ptx/ldst.cuh"
#include "common/rms_norm.h"
#include "common/vec.cuh"

namespace keye_ops {

// Chunks of a row that a lane holds: 1152 values in 16 bits take a warp, 4608 take four.
constexpr int kNormChunks = 5;
// Of a team. NOTE: as many as fit with the 168 registers that the backward needs.
constexpr int kNormMaxWarps = 12;
constexpr int kNormMaxThreads = kNormMaxWarps * kWarpSize;

enum class NormKind { kLayer, kRms };

struct NormPlan {
  const void* weight;  // [width]
  const void* bias;    // [width]; of LayerNorm's forward
  // [num_blocks, width] each, backward only; the bias's of LayerNorm only
  float *dweight_partial, *dbias_partial;
  int64_t num_rows;
  int num_chunks;  // of a row
  int num_warps;   // of a team
  int num_teams;   // of a block
  int all_teams;   // of all blocks
  float eps;
};

// Where a row lies. Chunks of x, or of what is added to the residual, and of dx are the op's to
// find: they may not come one after another.
template <class T>
struct NormRow {
  bool inside;        // else nothing of it is read, and zeros are written
  const T* residual;  // or null
  T* sum;             // of x and the residual
  T* out;             // in the forward
  const T* dout;      // in the backward
  const T* dsum;      // or null
};

// ---- teams ----

struct NormTeam {
  int num_warps, num_threads;
  int thread;
  int index;  // in the block
  int first;  // row
  int flip;   // which scratch comes next, where one sum a row takes turns with itself
};

KEYE_DEVICE NormTeam make_team(const NormPlan& plan) {
  NormTeam team;
  team.num_warps = plan.num_warps;
  team.num_threads = plan.num_warps * kWarpSize;
  team.index = warp_in_block() / plan.num_warps;
  team.thread = thread_idx() - team.index * team.num_threads;
  // Consecutive rows go to consecutive blocks, so that few rows keep all of them busy.
  team.first = static_cast<int>(block_idx() + team.index * grid_size());
  team.flip = 0;
  return team;
}

// Shared memory of team_sum.
constexpr int kNormScratchBytes = 3 * 2 * kNormMaxWarps * static_cast<int>(sizeof(float));
static_assert(kNormScratchBytes % kVectorBytes == 0, "chunks come behind it");

// Sums over the team, in an order that only its size decides; the same bits in every thread.
template <int kCount>
KEYE_DEVICE void team_sum(const NormTeam& team, int scratch_idx, float (&values)[kCount]) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int j = 0; j < kCount; j++) values[j] += shuffle_xor(values[j], mask);
  }
  if (team.num_warps == 1) return;

  // NOTE: one barrier a sum is enough, as no scratch serves two sums in a row: who writes one again
  // has passed the barrier that comes after all reads of it.
  const int offset = scratch_idx * 2 * kNormMaxWarps;
  float* scratch = reinterpret_cast<float*>(shared_memory()) + offset;
  if (team.thread % kWarpSize == 0) {
#pragma unroll
    for (int j = 0; j < kCount; j++) scratch[team.thread / kWarpSize * kCount + j] = values[j];
  }
  syncthreads();
#pragma unroll
  for (int j = 0; j < kCount; j++) values[j] = scratch[j];
#pragma unroll 1
  for (int warp = 1; warp < team.num_warps; warp++) {
#pragma unroll
    for (int j = 0; j < kCount; j++) values[j] += scratch[warp * kCount + j];
  }
}

// ---- chunks ----

// Calls f(i, chunk, mine) for every chunk of a row that this thread takes care of: the i-th that it
// holds. kChunks of 0 is for rows that do not fit in registers.
// NOTE: lanes without a chunk do the work of the last one again, which costs nothing; they only may
// not store, nor add to sums.
template <int kChunks, class F>
KEYE_DEVICE void for_each_chunk(const NormTeam& team, int num_chunks, const F& f) {
  if constexpr (kChunks > 0) {
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
      const int chunk = team.thread + i * team.num_threads;
      f(i, min(chunk, num_chunks - 1), chunk < num_chunks);
    }
  } else {
    for (int chunk = team.thread; chunk < num_chunks; chunk += team.num_threads) f(0, chunk, true);
  }
}

constexpr int num_held(int chunks) { return chunks > 0 ? chunks : 1; }

// A chunk that was loaded before, or has to come from memory again.
template <int kChunks>
KEYE_DEVICE Chunk held_or_loaded(const Chunk& held, const void* memory) {
  if constexpr (kChunks > 0) {
    return held;
  } else {
    return load_bytes<Chunk>(memory);
  }
}

// NOTE: 16-bit values are cheaper to unpack in every pass than to hold as fp32 between passes.
template <int kHeld>
KEYE_DEVICE void forget_unpacked(Chunk (&held)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) ptx::forget(held[i].values[j]);
  }
}

// Chunks of one thread in shared memory, on their way there without registers to wait in.
template <int kChunks>
struct LaneShelf {
  int first_byte;

  // The index-th shelf behind the first bytes of shared memory.
  KEYE_DEVICE LaneShelf(int begin, int index) {
    const int warp = index * (block_size() / kWarpSize) + warp_in_block();
    first_byte = begin + (warp * kChunks * kWarpSize + thread_idx() % kWarpSize) * kVectorBytes;
  }
  KEYE_DEVICE unsigned char* place(int i) const {
    const int offset = first_byte + i * kWarpSize * kVectorBytes;
    return shared_memory() + offset;
  }
  KEYE_DEVICE void fetch(int i, const void* memory) const {
    ptx::cp_async_cg(shared_address(place(i)), memory);
  }
  // For all that was fetched, to any shelf of this thread.
  KEYE_DEVICE void wait() const {
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
  }
  // What was fetched, or comes from memory only now.
  KEYE_DEVICE Chunk get(int i, const void* memory) const {
    return load_bytes<Chunk>(kChunks > 0 ? place(i) : memory);
  }
};

template <int kVec>
KEYE_DEVICE float sum_of(const float (&values)[kVec]) {
  float sums[kVec];
#pragma unroll
  for (int v = 0; v < kVec; v++) sums[v] = values[v];
#pragma unroll
  for (int half = kVec / 2; half > 0; half /= 2) {
#pragma unroll
    for (int v = 0; v < half; v++) sums[v] += sums[v + half];
  }
  return sums[0];
}

template <class T>
KEYE_DEVICE Chunk add_chunks(const Chunk& a, const Chunk& b) {
  constexpr int kVec = kVectorSize<T>;
  float x[kVec], y[kVec];
  unpack<T>(a, x);
  unpack<T>(b, y);
#pragma unroll
  for (int v = 0; v < kVec; v++) x[v] += y[v];
  return pack<T>(x);
}

// Of the row whose chunks chunk_at(i, chunk) gives.
template <class T, NormKind kKind, int kChunks, class ChunkAt>
KEYE_DEVICE RowStatistics<float> row_statistics(NormTeam& team, const NormPlan& plan,
                                                Chunk (&held)[num_held(kChunks)],
                                                const ChunkAt& chunk_at) {
  constexpr int kVec = kVectorSize<T>;
  const auto size = static_cast<float>(int64_t{plan.num_chunks} * kVec);
  float guess = 0.0f;
  if constexpr (kKind == NormKind::kLayer) {
    float sum[1] = {0.0f};
    for_each_chunk<kChunks>(team, plan.num_chunks, [&](int i, int chunk, bool mine) {
      float x[kVec];
      unpack<T>(chunk_at(i, chunk), x);
      const float part = sum_of(x);
      sum[0] += mine ? part : 0.0f;
    });
    forget_unpacked(held);
    team_sum(team, 0, sum);
    guess = sum[0] / size;
  }

  constexpr int kSums = kKind == NormKind::kLayer ? 2 : 1;
  float sums[kSums] = {};  // of squares, and of what they are the squares of
  for_each_chunk<kChunks>(team, plan.num_chunks, [&](int i, int chunk, bool mine) {
    float x[kVec];
    unpack<T>(chunk_at(i, chunk), x);
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVec; v++) {
      x[v] -= guess;
      squares = multiply_add(x[v], x[v], squares);
    }
    sums[0] += mine ? squares : 0.0f;
    if constexpr (kKind == NormKind::kLayer) {
      const float part = sum_of(x);
      sums[1] += mine ? part : 0.0f;
    }
  });
  forget_unpacked(held);
  if constexpr (kKind == NormKind::kRms) team.flip ^= 1;
  team_sum(team, kKind == NormKind::kRms ? team.flip : 1, sums);
  if constexpr (kKind == NormKind::kLayer) {
    return statistics_from_sums(guess, sums[1], sums[0], size, plan.eps);
  } else {
    return {0.0f, rms_norm_rstd(sums[0], size, plan.eps), 0.0f};
  }
}

// ---- forward ----

// Rows has at(index), and x_of(row, chunk): where a chunk of its x lies.
template <class T, NormKind kKind, int kChunks, class Rows>
KEYE_DEVICE void norm_forward(const NormPlan& plan, const Rows& rows) {
  constexpr int kVec = kVectorSize<T>;
  constexpr int kHeld = num_held(kChunks);
  NormTeam team = make_team(plan);
  const T* weight = static_cast<const T*>(plan.weight);
  const T* bias = static_cast<const T*>(plan.bias);
  const LaneShelf<kChunks> residual(kNormScratchBytes, 0);
  const auto for_each = [&](const auto& f) { for_each_chunk<kChunks>(team, plan.num_chunks, f); };

  for (int64_t index = team.first; index < plan.num_rows; index += plan.all_teams) {
    ptx::forget(team.thread);  // addresses are cheaper to compute for every row than to hold
    const auto row = rows.at(index);
    if (!row.inside) {
      for_each([&](int, int chunk, bool mine) {
        if (mine) store_bytes(row.out + int64_t{chunk} * kVec, Chunk{});
      });
      continue;
    }

    // Load all of it, then add.
    const bool adds = row.residual != nullptr;
    Chunk x[kHeld];
    if constexpr (kChunks > 0) {
      for_each([&](int i, int chunk, bool) { x[i] = load_bytes<Chunk>(rows.x_of(row, chunk)); });
      if (adds) {
        for_each([&](int i, int chunk, bool) {
          residual.fetch(i, row.residual + int64_t{chunk} * kVec);
        });
        residual.wait();
      }
    }
    if (adds) {
      for_each([&](int i, int chunk, bool mine) {
        const int64_t d = int64_t{chunk} * kVec;
        x[i] = add_chunks<T>(held_or_loaded<kChunks>(x[i], rows.x_of(row, chunk)),
                             residual.get(i, row.residual + d));
        if (mine) store_bytes(row.sum + d, x[i]);
      });
    }

    const auto chunk_at = [&](int i, int chunk) {
      const T* x_or_sum = adds ? row.sum + int64_t{chunk} * kVec : rows.x_of(row, chunk);
      return held_or_loaded<kChunks>(x[i], x_or_sum);
    };
    const auto statistics = row_statistics<T, kKind, kChunks>(team, plan, x, chunk_at);

    for_each([&](int i, int chunk, bool mine) {
      const int64_t d = int64_t{chunk} * kVec;
      float y[kVec], w[kVec], b[kVec] = {};
      unpack<T>(chunk_at(i, chunk), y);
      load_vector(weight + d, w);
      if constexpr (kKind == NormKind::kLayer) load_vector(bias + d, b);
#pragma unroll
      for (int v = 0; v < kVec; v++) {
        const float normed = normalised(y[v], statistics);
        y[v] = kKind == NormKind::kLayer ? multiply_add(normed, w[v], b[v]) : normed * w[v];
      }
      if (mine) store_bytes(row.out + d, pack<T>(y));
    });
  }
}

// ---- backward ----

template <int kVec>
KEYE_DEVICE void store_partial(float* partial, const float (&values)[kVec]) {
#pragma unroll
  for (int v = 0; v < kVec; v += 4) {
    const float four[4] = {values[v], values[v + 1], values[v + 2], values[v + 3]};
    store_vector(partial + v, four);
  }
}

template <int kVec>
KEYE_DEVICE void add_partial(const float* partial, float (&values)[kVec]) {
#pragma unroll
  for (int v = 0; v < kVec; v += 4) {
    float four[4];
    load_vector(partial + v, four);
#pragma unroll
    for (int j = 0; j < 4; j++) values[v + j] = four[j] + values[v + j];
  }
}

// Shared memory: sums over the teams of a block or the scratch of team_sum, then what is added to
// dx, on its way from memory without a register to wait in.
template <class T>
constexpr int kNormTeamSums = kNormChunks * kVectorSize<T> * kWarpSize;  // floats a parameter
template <class T>
constexpr int kNormSumsBytes = 2 * kNormTeamSums<T> * static_cast<int>(sizeof(float));
static_assert(kNormScratchBytes <= kNormSumsBytes<float>, "they share their place");

// One parameter's gradient over the rows of the block, in the team that comes last.
template <class T>
KEYE_DEVICE void add_teams(const NormTeam& team, int num_teams, float* sums,
                           float (&values)[kNormChunks][kVectorSize<T>]) {
  constexpr int kVec = kVectorSize<T>;
  const int index = warp_in_block();  // only teams of one warp are more than one
  for (int turn = 0; turn < num_teams; turn++) {
    if (index == turn) {
#pragma unroll
      for (int i = 0; i < kNormChunks; i++) {
        // Groups of four values lie a lane apart, so that lanes meet in no bank.
#pragma unroll
        for (int v = 0; v < kVec; v += 4) {
          const int offset = (((i * kVec + v) / 4) * kWarpSize + team.thread) * 4;
          float* place = sums + offset;
          float four[4] = {values[i][v], values[i][v + 1], values[i][v + 2], values[i][v + 3]};
          if (turn > 0) add_partial(place, four);
          if (turn < num_teams - 1) store_vector(place, four);
#pragma unroll
          for (int j = 0; j < 4; j++) values[i][v + j] = four[j];
        }
      }
    }
    if (turn < num_teams - 1) syncthreads();
  }
}

// Rows has dx_of(row, chunk) as well.
template <class T, NormKind kKind, int kChunks, class Rows>
KEYE_DEVICE void norm_backward(const NormPlan& plan, const Rows& rows) {
  constexpr int kVec = kVectorSize<T>;
  constexpr int kHeld = num_held(kChunks);
  constexpr bool kLayer = kKind == NormKind::kLayer;
  NormTeam team = make_team(plan);
  const T* weight = static_cast<const T*>(plan.weight);
  const auto size = static_cast<float>(int64_t{plan.num_chunks} * kVec);
  const int64_t partial = block_idx() * plan.num_chunks * kVec;
  const auto for_each = [&](const auto& f) { for_each_chunk<kChunks>(team, plan.num_chunks, f); };

  // What the rows of this team add to the gradients of the weight and of the bias.
  float dweight[kHeld][kVec] = {}, dbias[kHeld][kVec] = {};
  const auto store_partials = [&](int i, int64_t d) {
    store_partial(plan.dweight_partial + partial + d, dweight[i]);
    if constexpr (kLayer) store_partial(plan.dbias_partial + partial + d, dbias[i]);
  };
  if constexpr (kChunks == 0) {
    for_each([&](int i, int chunk, bool) { store_partials(i, int64_t{chunk} * kVec); });
  }

  const LaneShelf<kChunks> dy(kNormSumsBytes<T>, 0), dsum(kNormSumsBytes<T>, 1);

  for (int64_t index = team.first; index < plan.num_rows; index += plan.all_teams) {
    ptx::forget(team.thread);  // addresses are cheaper to compute for every row than to hold
    const auto row = rows.at(index);
    if (!row.inside) {
      for_each([&](int i, int chunk, bool mine) {
        if (mine) store_bytes(rows.dx_of(row, chunk), Chunk{});
      });
      continue;
    }

    // Load all of it.
    Chunk x[kHeld];
    if constexpr (kChunks > 0) {
      for_each([&](int i, int chunk, bool) { x[i] = load_bytes<Chunk>(rows.x_of(row, chunk)); });
      for_each([&](int i, int chunk, bool) { dy.fetch(i, row.dout + int64_t{chunk} * kVec); });
      if (row.dsum != nullptr) {
        for_each([&](int i, int chunk, bool) { dsum.fetch(i, row.dsum + int64_t{chunk} * kVec); });
      }
    }
    const auto x_at = [&](int i, int chunk) {
      return held_or_loaded<kChunks>(x[i], rows.x_of(row, chunk));
    };
    const auto statistics = row_statistics<T, kKind, kChunks>(team, plan, x, x_at);
    dy.wait();

    // The parameters' gradients, and the means that dx needs.
    constexpr int kSums = kLayer ? 2 : 1;
    float sums[kSums] = {};
    for_each([&](int i, int chunk, bool mine) {
      const int64_t d = int64_t{chunk} * kVec;
      float normed[kVec], grad[kVec], w[kVec];
      unpack<T>(x_at(i, chunk), normed);
      unpack<T>(dy.get(i, row.dout + d), grad);
      load_vector(weight + d, w);
      if constexpr (kChunks == 0) {
#pragma unroll
        for (int v = 0; v < kVec; v++) dweight[i][v] = dbias[i][v] = 0.0f;
      }
      if constexpr (kChunks > 0) sync_warp();  // a chunk at a time: registers are scarce
      float products = 0.0f;
#pragma unroll
      for (int v = 0; v < kVec; v++) {
        normed[v] = normalised(normed[v], statistics);
        dweight[i][v] = multiply_add(grad[v], normed[v], dweight[i][v]);
        if constexpr (kLayer) dbias[i][v] += grad[v];
        w[v] *= grad[v];
        products = multiply_add(w[v], normed[v], products);
      }
      sums[0] += mine ? products : 0.0f;
      if constexpr (kLayer) {
        const float part = sum_of(w);
        sums[1] += mine ? part : 0.0f;
      }
      if constexpr (kChunks == 0) {
        add_partial(plan.dweight_partial + partial + d, dweight[i]);
        if constexpr (kLayer) add_partial(plan.dbias_partial + partial + d, dbias[i]);
        store_partials(i, d);
      }
    });
    forget_unpacked(x);
    team_sum(team, 2, sums);
    const float correlation = sums[0] / size;
    const float mean = sums[kSums - 1] / size;  // only a LayerNorm has one

    for_each([&](int i, int chunk, bool mine) {
      const int64_t d = int64_t{chunk} * kVec;
      float normed[kVec], grad[kVec], w[kVec];
      unpack<T>(x_at(i, chunk), normed);
      unpack<T>(dy.get(i, row.dout + d), grad);
      load_vector(weight + d, w);
#pragma unroll
      for (int v = 0; v < kVec; v++) {
        normed[v] = normalised(normed[v], statistics);
        grad[v] = kLayer
                      ? layer_norm_dx(grad[v], w[v], normed[v], statistics.rstd, mean, correlation)
                      : rms_norm_dx(grad[v] * w[v], normed[v], statistics.rstd, correlation);
      }
      if (row.dsum != nullptr) {
        unpack<T>(dsum.get(i, row.dsum + d), w);
#pragma unroll
        for (int v = 0; v < kVec; v++) grad[v] += w[v];
      }
      if (mine) store_bytes(rows.dx_of(row, chunk), pack<T>(grad));
    });
  }

  // One row of partial sums a block.
  if constexpr (kChunks > 0) {
    float* team_sums = reinterpret_cast<float*>(shared_memory());
    add_teams<T>(team, plan.num_teams, team_sums, dweight);
    if constexpr (kLayer) add_teams<T>(team, plan.num_teams, team_sums + kNormTeamSums<T>, dbias);
    if (warp_in_block() < plan.num_teams - 1) return;
    for_each([&](int i, int chunk, bool mine) {
      if (mine) store_partials(i, int64_t{chunk} * kVec);
    });
  }
}

}  // namespace keye_ops
