// The twins of wgmma, which take the compiler longest.
#include "host_executor/twin/wgmma.cuh"

namespace keye_ops::twin {

void add_wgmma_twins_of_device(Twins& twins) { add_wgmma_twins(twins); }

}  // namespace keye_ops::twin
