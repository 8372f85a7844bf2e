// Where the lanes of a warp meet.
#pragma once

#include "host_executor/state.h"

namespace host_executor {

enum class Collective {
  kSync,
  kShuffle,
  kBallot,
  kReduce,
  kElect,
  kMatrixLoad,
  kMatrixStore,
  kMma
};

// The lane waits until all lanes of the mask have come with the same collective; the last one runs
// `run`. Aligned: all at the same place of the code.
void meet(Collective collective, uint32_t mask, void* arguments, uint32_t site, bool aligned,
          void (*run)(Block& block, uint32_t warp, Rendezvous& rendezvous));

}  // namespace host_executor
