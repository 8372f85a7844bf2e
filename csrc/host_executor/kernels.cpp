#include "host_executor/kernels.h"

namespace host_executor {
namespace {

std::map<std::string, Binder>& binders() {
  static std::map<std::string, Binder> all;
  return all;
}

}  // namespace

bool register_kernel(const std::string& name, Binder binder) {
  binders()[name] = std::move(binder);
  return true;
}

Report launch_by_name(const std::string& name, const Arguments& arguments,
                      const LaunchConfig& config, const Schedule& schedule) {
  const auto found = binders().find(name);
  if (found == binders().end()) {
    std::string known;
    for (const std::string& one : kernel_names()) known += " " + one;
    throw std::runtime_error("host_executor: kernel must be one of" + known + ", got " + name);
  }
  const BoundKernel kernel = found->second(arguments);
  const auto run = [](const void* context) { (*static_cast<const BoundKernel*>(context))(); };
  return launch(config, run, &kernel, schedule);
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& [name, binder] : binders()) names.push_back(name);
  return names;
}

}  // namespace host_executor
