// A device guard for CUDA that does nothing, for a torch built without CUDA: autograd asks for one
// even where all tensors are fake.
#include <c10/core/impl/DeviceGuardImplInterface.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
