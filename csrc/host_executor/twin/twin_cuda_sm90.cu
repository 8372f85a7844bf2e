// The twins that need Hopper.
#include "host_executor/twin/run_on_gpu.h"
#include "host_executor/twin/sm90.cuh"

namespace keye_ops::twin {

void add_wgmma_twins_of_device(Twins& twins);

Twins sm90_twins() {
  Twins twins;
  add_sm90_twins(twins);
  add_wgmma_twins_of_device(twins);
  return twins;
}

}  // namespace keye_ops::twin
