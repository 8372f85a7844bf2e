// Small kernels that run every function of the kernel vocabulary, on a GPU and on the host
// executor: given the same bits, both must give the same.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/tensor_map.h"

namespace keye_ops::twin {

struct TwinParams {
  const uint32_t* in;
  uint32_t* out;  // zeros before the launch
  TensorMap map;  // of kernels that copy a box, and what they copy
  int coords[5];
  uint32_t box_bytes;
};

struct alignas(16) FourWords {
  uint32_t words[4];
};

struct Twin {
  std::string name;  // the function, then the variant
  void (*kernel)(TwinParams);
  uint32_t in_words, out_words;
  const char* data = "bits";   // what the input is made of: bits, floats, bf16, fp16
  const char* rule = "exact";  // how alike the outputs are: exact, ulp1, ulp2, sum (of products)
  uint32_t num_threads = kWarpSize;
  uint32_t shared_bytes = 0;
  uint32_t cluster_size = 1;
  std::vector<uint32_t> grid = {1, 1, 1};
  TensorMapSpec box = {};  // its base is the input (of a load) or the output
  std::vector<int> coords = {};
  bool is_load = false;
};
using Twins = std::vector<Twin>;

inline TwinParams twin_params(const Twin& twin, const uint32_t* in, uint32_t* out) {
  TwinParams params{};
  params.in = in;
  params.out = out;
  if (twin.coords.empty()) return params;
  TensorMapSpec spec = twin.box;
  spec.name = twin.name.c_str();
  spec.base = twin.is_load ? static_cast<const void*>(in) : out;
  params.map = make_tensor_map(spec);
  params.box_bytes = static_cast<uint32_t>(spec.element_size);
  for (size_t i = 0; i < twin.coords.size(); i++) {
    params.coords[i] = twin.coords[i];
    params.box_bytes *= static_cast<uint32_t>(spec.box[i]);
  }
  return params;
}

inline const Twin& find_twin(const Twins& twins, const std::string& name) {
  for (const Twin& twin : twins) {
    if (twin.name == name) return twin;
  }
  throw std::runtime_error("twin: the name must be that of a kernel, got " + name);
}

// A line for every twin, fields separated by tabs. Boxes: swizzle, element size, then sizes,
// strides, box and coordinates, each separated by commas.
inline std::string describe(const Twins& twins) {
  std::ostringstream text;
  const auto list = [&text](const auto& values) {
    text << '\t';
    for (size_t i = 0; i < values.size(); i++) text << (i == 0 ? "" : ",") << values[i];
  };
  for (const Twin& twin : twins) {
    text << twin.name << '\t' << twin.in_words << '\t' << twin.out_words << '\t' << twin.data
         << '\t' << twin.rule << '\t' << twin.num_threads << '\t' << twin.shared_bytes << '\t'
         << twin.cluster_size;
    list(twin.grid);
    text << '\t' << static_cast<uint32_t>(twin.box.swizzle) << '\t' << twin.box.element_size;
    list(twin.box.sizes);
    list(twin.box.strides);
    list(twin.box.box);
    list(twin.coords);
    text << '\n';
  }
  return text.str();
}

}  // namespace keye_ops::twin
