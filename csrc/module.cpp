// The Python module _C. Importing it runs the registrations that are linked into it.
#include <Python.h>

#include "build_info.h"
#include "common/cpu_capability.h"

namespace {

const char* capability() noexcept {
  try {
    return keye_ops::cpu_capability_name();
  } catch (...) {
    return "invalid KEYE_OPS_CPU_CAPABILITY";  // the ops raise with the details
  }
}

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  PyObject* self = PyModule_Create(&module);
  if (self == nullptr) return nullptr;
  PyModule_AddStringConstant(self, "build_info", KEYE_BUILD_INFO);
  PyModule_AddStringConstant(self, "cpu_capability", capability());
  return self;
}
