// The executor for Python: launches by name on numpy arrays, schedules, reports.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "host_executor/kernels.h"

namespace py = pybind11;

namespace host_executor {
namespace {

Dim3 dim_of(const std::vector<uint32_t>& sizes) {
  Dim3 dim;
  if (sizes.size() > 3) throw std::runtime_error("host_executor: a grid has at most 3 dimensions");
  if (!sizes.empty()) dim.x = sizes[0];
  if (sizes.size() > 1) dim.y = sizes[1];
  if (sizes.size() > 2) dim.z = sizes[2];
  return dim;
}

void* guard_array(const std::string& name, const py::array& array, Role role) {
  std::vector<Dimension> dimensions;
  for (py::ssize_t i = 0; i < array.ndim(); i++) {
    dimensions.push_back({array.shape(i), array.strides(i)});
  }
  return guard(name.c_str(), array.data(), array.itemsize(), dimensions, role);
}

Report launch_on_arrays(const std::string& kernel, const std::map<std::string, py::array>& inputs,
                        const std::map<std::string, py::array>& outputs,
                        const std::map<std::string, py::array>& inouts,
                        const std::map<std::string, uintptr_t>& addresses,
                        const std::map<std::string, double>& numbers,
                        const std::vector<uint32_t>& grid, const std::vector<uint32_t>& block,
                        const std::vector<uint32_t>& cluster, size_t shared_bytes,
                        const Schedule& schedule) {
  // Memory from allocate() stays; copies of arrays live for the launch.
  const struct Release {
    ~Release() { free_copies(); }
  } release;
  Arguments arguments;
  arguments.numbers = numbers;
  for (const auto& [name, array] : inputs) {
    arguments.arrays[name] = guard_array(name, array, Role::kInput);
  }
  for (const auto& [name, array] : outputs) {
    arguments.arrays[name] = guard_array(name, array, Role::kOutput);
  }
  for (const auto& [name, array] : inouts) {
    arguments.arrays[name] = guard_array(name, array, Role::kInOut);
  }
  for (const auto& [name, address] : addresses) {
    arguments.arrays[name] = reinterpret_cast<void*>(address);
  }
  const LaunchConfig config{dim_of(grid), dim_of(block), dim_of(cluster), shared_bytes};
  Report report = launch_by_name(kernel, arguments, config, schedule);
  copy_back();
  return report;
}

void load_library(const std::string& path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
    throw std::runtime_error("host_executor: a library of kernels must load, got " +
                             std::string(dlerror()));
  }
}

py::dict counters_of(const Report& report) {
  const Counters& c = report.counters;
  py::dict all;
  all["accesses"] = c.accesses;
  all["switches"] = c.switches;
  all["collectives"] = c.collectives;
  all["asynchronous"] = c.asynchronous;
  all["shared_requests"] = c.shared_requests;
  all["shared_wavefronts"] = c.shared_wavefronts;
  all["shared_ideal"] = c.shared_ideal;
  all["global_requests"] = c.global_requests;
  all["global_sectors"] = c.global_sectors;
  all["global_ideal"] = c.global_ideal;
  all["global_bytes_loaded"] = c.global_bytes_loaded;
  all["global_bytes_stored"] = c.global_bytes_stored;
  return all;
}

py::dict traffic_of(const Report& report, uint64_t Traffic::* loaded, uint64_t Traffic::* stored) {
  py::dict all;
  for (const auto& [name, traffic] : report.traffic) {
    if (traffic.*loaded + traffic.*stored == 0) continue;
    all[name.c_str()] = py::make_tuple(traffic.*loaded, traffic.*stored);
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_host_executor, m) {
  py::enum_<Order>(m, "Order")
      .value("in_order", Order::kInOrder)
      .value("reversed", Order::kReversed)
      .value("random", Order::kRandom);
  py::enum_<Completion>(m, "Completion")
      .value("early", Completion::kEarly)
      .value("late", Completion::kLate)
      .value("random", Completion::kRandom);
  py::enum_<Role>(m, "Role")
      .value("input", Role::kInput)
      .value("output", Role::kOutput)
      .value("inout", Role::kInOut);

  py::class_<Schedule>(m, "Schedule")
      .def(py::init([](uint64_t seed, Order order, int preempt_one_in, Completion completion,
                       bool counters, bool require_outputs, int resident_clusters) {
             return Schedule{seed,     order,           preempt_one_in,   completion,
                             counters, require_outputs, resident_clusters};
           }),
           py::arg("seed") = 0, py::arg("order") = Order::kRandom, py::arg("preempt_one_in") = 16,
           py::arg("completion") = Completion::kRandom, py::arg("counters") = false,
           py::arg("require_outputs") = true, py::arg("resident_clusters") = 1)
      .def_readonly("seed", &Schedule::seed)
      .def_readonly("order", &Schedule::order)
      .def_readonly("preempt_one_in", &Schedule::preempt_one_in)
      .def_readonly("completion", &Schedule::completion);

  py::class_<Finding>(m, "Finding")
      .def_property_readonly("kind", [](const Finding& f) { return kind_name(f.kind); })
      .def_readonly("text", &Finding::text)
      .def_readonly("count", &Finding::count)
      .def_property_readonly("places",
                             [](const Finding& f) { return source_lines({f.place, f.other}); });

  py::class_<Report>(m, "Report")
      .def_readonly("findings", &Report::findings)
      .def_property_readonly("counters", &counters_of)
      .def_property_readonly("traffic",
                             [](const Report& report) {
                               return traffic_of(report, &Traffic::bytes_loaded,
                                                 &Traffic::bytes_stored);
                             })
      .def_property_readonly("sectors",
                             [](const Report& report) {
                               return traffic_of(report, &Traffic::sectors_loaded,
                                                 &Traffic::sectors_stored);
                             })
      .def_property_readonly("kinds",
                             [](const Report& report) {
                               std::vector<std::string> kinds;
                               for (const Finding& finding : report.findings) {
                                 kinds.emplace_back(kind_name(finding.kind));
                               }
                               return kinds;
                             })
      .def("text", &Report::text);

  m.def("launch", &launch_on_arrays, py::arg("kernel"), py::kw_only(),
        py::arg("inputs") = std::map<std::string, py::array>{},
        py::arg("outputs") = std::map<std::string, py::array>{},
        py::arg("inouts") = std::map<std::string, py::array>{},
        py::arg("addresses") = std::map<std::string, uintptr_t>{},
        py::arg("numbers") = std::map<std::string, double>{}, py::arg("grid"), py::arg("block"),
        py::arg("cluster") = std::vector<uint32_t>{}, py::arg("shared_bytes") = 0,
        py::arg("schedule") = Schedule{});
  m.def("load_library", &load_library);
  m.def("kernel_names", &kernel_names);

  m.def("set_default_schedule", [](const Schedule& schedule) { default_schedule() = schedule; });
  m.def("take_reports", [] {
    std::vector<Report> taken;
    std::swap(taken, reports());
    return taken;
  });

  m.def(
      "allocate",
      [](const std::string& name, size_t bytes, Role role) {
        return reinterpret_cast<uintptr_t>(allocate(name.c_str(), bytes, role));
      },
      "Address of guarded memory, which takes no more room than what is touched of it.");
  m.def("free_all", &free_all);
  m.def("peek", [](uintptr_t address, size_t bytes) {
    return py::bytes(reinterpret_cast<const char*>(address), bytes);
  });
  m.def("poke", [](uintptr_t address, const std::string& bytes) {
    std::memcpy(reinterpret_cast<void*>(address), bytes.data(), bytes.size());
  });
}

}  // namespace host_executor
