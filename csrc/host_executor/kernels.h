// Kernels that can be launched by name on named arrays, as tests do from Python.
#pragma once

#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "host_executor/executor.h"

namespace host_executor {

// What a launch by name was given.
class Arguments {
 public:
  std::map<std::string, void*> arrays;  // in guarded memory
  std::map<std::string, double> numbers;

  template <class T>
  T* array(const std::string& name) const {
    return static_cast<T*>(find(arrays, "array", name));
  }
  // Null without one.
  template <class T>
  T* array_if_any(const std::string& name) const {
    return arrays.count(name) > 0 ? array<T>(name) : nullptr;
  }
  double number(const std::string& name) const { return find(numbers, "number", name); }
  int64_t integer(const std::string& name) const {
    return static_cast<int64_t>(find(numbers, "number", name));
  }

 private:
  template <class V>
  static V find(const std::map<std::string, V>& values, const char* what, const std::string& name) {
    const auto found = values.find(name);
    if (found == values.end()) {
      throw std::runtime_error(std::string("host_executor: the kernel needs the ") + what + " '" +
                               name + "', got none");
    }
    return found->second;
  }
};

using BoundKernel = std::function<void()>;  // run by every thread
using Binder = std::function<BoundKernel(const Arguments&)>;

// Later registrations of a name replace earlier ones, so that a library with a changed kernel can
// be loaded on top. Returns true, to be the value of a static variable.
HOST_EXECUTOR_API bool register_kernel(const std::string& name, Binder binder);
HOST_EXECUTOR_API Report launch_by_name(const std::string& name, const Arguments& arguments,
                                        const LaunchConfig& config, const Schedule& schedule);
HOST_EXECUTOR_API std::vector<std::string> kernel_names();

template <class Params>
BoundKernel bind_kernel(void (*kernel)(Params), const Params& params) {
  return [kernel, params] { kernel(params); };
}

}  // namespace host_executor
