// The Python module `conddetr._C`. Importing it registers the operators as `torch.ops.conddetr_native.*`.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "build_info.h"
#include "common/levels.h"
#include "peak/kernels.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY_FRAGMENT(conddetr_native, library) { conddetr::define_operators(library); }

namespace {

using conddetr::Level;

std::vector<std::pair<std::string, Level>> levels() {
  std::vector<std::pair<std::string, Level>> compiled;
#define CONDDETR_ADD(name) compiled.emplace_back(#name, Level::name);
  CONDDETR_FOR_EACH_LEVEL(CONDDETR_ADD)
#undef CONDDETR_ADD
  return compiled;
}

pybind11::dict build_info() {
  pybind11::dict info;
  const std::string cuda = CONDDETR_CUDA;
  info["compiler"] = CONDDETR_COMPILER;
  info["cuda"] = cuda.empty() ? pybind11::object(pybind11::none()) : pybind11::str(cuda);
  info["architectures"] = pybind11::str(CONDDETR_ARCHITECTURES).attr("split")();
  info["flags"] = CONDDETR_FLAGS;
  info["sources"] = CONDDETR_SOURCES;
  pybind11::list names;
  for (const auto& [name, level] : levels()) names.append(name);
  info["cpu_levels"] = names;
  return info;
}

std::string cpu_level() {
  for (const auto& [name, level] : levels()) {
    if (level == conddetr::level()) return name;
  }
  return "unknown";
}

bool use_cpu_level(const std::string& requested) {
  for (const auto& [name, level] : levels()) {
    if (name == requested) return conddetr::use_level(level);
  }
  throw pybind11::value_error("level: expected plain, avx2 or avx512, got " + requested);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels: importing this module registers torch.ops.conddetr_native.";
  module.def("build_info", &build_info,
             "How this library was built: compiler, CUDA version or None, GPU architectures, compiler flags, a hash of "
             "its sources, and the instruction sets that CPU kernels were compiled for.");
  module.def("cpu_level", &cpu_level, "The instruction set that CPU kernels use on this machine.");
  module.def("use_cpu_level", &use_cpu_level, pybind11::arg("level"),
             "Use another of the instruction sets in build_info(), for tests and benchmarks. False if this processor "
             "cannot run it; nothing changes then.");
  module.def("peak_flops", &conddetr::peak::multiply_adds_per_second,
             "Floating-point operations per second of float32 multiply-adds in registers, on all of torch's threads.");
}
