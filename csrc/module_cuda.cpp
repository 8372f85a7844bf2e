// The Python module _C_cuda. Importing it runs the registrations that are linked into it.
#include <Python.h>

#include "build_info.h"

namespace {

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() {
  PyObject* self = PyModule_Create(&module);
  if (self == nullptr) return nullptr;
  PyModule_AddStringConstant(self, "build_info", KEYE_BUILD_INFO);
  return self;
}
