// Python bindings: addresses, sizes and dtype codes. No torch: the extension works with any version of it.
// The legend is in kernels.h.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "hicache/launch.h"
#include "hicache/states.h"

namespace py = pybind11;
using namespace hicache;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Every table index is checked here once more: a wrong one would call a wild pointer.
int checked(int value, int low, int high, const char* name) {
  if (value < low || value > high) throw std::invalid_argument(std::string("out of range: ") + name);
  return value;
}

history past(uintptr_t orders, int64_t order_stride, int num_orders, int type) {
  return {pointer(orders), order_stride, checked(num_orders, 1, kMaxOrders, "orders") - 1,
          static_cast<dtype>(checked(type, 0, 3, "dtype"))};
}

scalars scalars_at(uintptr_t address, int type, int64_t features = 0) {
  if (type != static_cast<int>(dtype::f32) && type != static_cast<int>(dtype::f64)) {
    throw std::invalid_argument("expected coefficients and gaps of float32 or float64");
  }
  return {pointer(address), static_cast<dtype>(type), features};
}

// LAUNCH runs the op, and Where says where: threads on the CPU; a device and a stream on CUDA.

template <auto LAUNCH, class... Where>
void update(uintptr_t orders, int64_t order_stride, int num_orders, int type, int64_t numel, int num_differences,
            uintptr_t inv_gap, int inv_gap_type, Where... where) {
  cascade_args args = {};
  args.past = past(orders, order_stride, num_orders, type);
  args.numel = numel;
  args.num_differences = checked(num_differences, 0, num_orders - 1, "filled");
  args.inv_gap = scalars_at(inv_gap, inv_gap_type);
  py::gil_scoped_release release;
  LAUNCH(args, where...);
}

template <auto LAUNCH, class... Where>
void forecast(uintptr_t orders, int64_t order_stride, int num_orders, int type, int64_t numel, uintptr_t coeffs,
              int coeffs_type, int64_t coeffs_features, int num_coeffs, uintptr_t out, Where... where) {
  cascade_args args = {};
  args.past = past(orders, order_stride, num_orders, type);
  args.numel = numel;
  args.num_differences = checked(num_coeffs, 1, num_orders, "coeffs") - 1;
  args.coeffs = scalars_at(coeffs, coeffs_type, coeffs_features);
  args.slot = coeffs_features ? numel / coeffs_features : numel;
  args.out = pointer(out);
  py::gil_scoped_release release;
  LAUNCH(args, where...);
}

template <auto LAUNCH, class... Where>
void update_forecast(uintptr_t orders, int64_t order_stride, int num_orders, int type, int64_t numel,
                     uintptr_t inv_gap, int inv_gap_type, uintptr_t coeffs, int coeffs_type, int64_t coeffs_features,
                     int num_coeffs, uintptr_t out, Where... where) {
  cascade_args args = {};
  args.past = past(orders, order_stride, num_orders, type);
  args.numel = numel;
  args.num_differences = checked(num_coeffs, 1, num_orders, "coeffs") - 1;
  args.inv_gap = scalars_at(inv_gap, inv_gap_type);
  args.coeffs = scalars_at(coeffs, coeffs_type, coeffs_features);
  args.slot = coeffs_features ? numel / coeffs_features : numel;
  args.out = pointer(out);
  py::gil_scoped_release release;
  LAUNCH(args, where...);
}

// An inv_gap of 0 is none: no update is pending. Gates of 0 are none: every gate is one.
template <auto LAUNCH, class... Where>
void gated_sum(uintptr_t orders, int64_t order_stride, int num_orders, int type, int64_t feature_stride,
               int64_t num_features, int64_t batch, int64_t rows, int64_t channels, int base_type, uintptr_t base,
               uintptr_t gates, uintptr_t inv_gap, int inv_gap_type, uintptr_t coeffs, int coeffs_type,
               int64_t coeffs_features, int num_coeffs, uintptr_t out, Where... where) {
  sum_args args = {};
  args.past = past(orders, order_stride, num_orders, type);
  args.feature_stride = feature_stride;
  args.num_features = num_features;
  args.batch = batch;
  args.rows = rows;
  args.channels = channels;
  args.base_type = static_cast<dtype>(checked(base_type, 0, 3, "base dtype"));
  args.base = pointer(base);
  args.gates = pointer(gates);
  args.out = pointer(out);
  args.num_coeffs = checked(num_coeffs, 1, num_orders, "coeffs");
  args.coeffs = scalars_at(coeffs, coeffs_type, coeffs_features);
  args.update = inv_gap != 0;
  args.inv_gap = scalars_at(inv_gap, inv_gap_type);
  py::gil_scoped_release release;
  LAUNCH(args, where...);
}

// Addresses of arrays and of functions: see states.h.
bool tensors_unchanged(uintptr_t tensors, int64_t count, uintptr_t addresses, int64_t counted, uintptr_t writes,
                       uintptr_t address, uintptr_t write) {
  return unchanged(reinterpret_cast<const tensor*>(tensors), count, reinterpret_cast<const uint64_t*>(addresses),
                   counted, reinterpret_cast<const uint64_t*>(writes), reinterpret_cast<address_of>(address),
                   reinterpret_cast<writes_to>(write));
}

// Whether dictionaries have as many values as they had, and these ones, in order. Borrows all of them.
bool same_values(const py::list& dicts, const py::list& sizes, const py::list& values) {
  const Py_ssize_t count = PyList_GET_SIZE(values.ptr());
  Py_ssize_t seen = 0;
  const Py_ssize_t length = PyList_GET_SIZE(dicts.ptr());
  for (Py_ssize_t index = 0; index < length; ++index) {
    if (index + 2 * kAhead < length) prefetch(PyList_GET_ITEM(dicts.ptr(), index + 2 * kAhead));
    if (index + kAhead < length) fetch(PyList_GET_ITEM(dicts.ptr(), index + kAhead), sizeof(PyDictObject), 2);
    PyObject* dict = PyList_GET_ITEM(dicts.ptr(), index);
    if (!PyDict_Check(dict) || PyDict_Size(dict) != PyLong_AsSsize_t(PyList_GET_ITEM(sizes.ptr(), index))) return false;
    PyObject* value = nullptr;
    for (Py_ssize_t place = 0; PyDict_Next(dict, &place, nullptr, &value); ++seen) {
      if (seen == count || value != PyList_GET_ITEM(values.ptr(), seen)) return false;
    }
  }
  return seen == count;
}

py::list measured() {
  py::list found;
  for (const measured_tactics& one : cpu_tactics()) {
    const sum_kind& kind = one.kind;
    found.append(py::make_tuple(kind.type, kind.num_coeffs, kind.log_features, kind.log_numel, kind.update, kind.gated,
                                kind.threads, one.chosen, py::cast(one.costs)));
  }
  return found;
}

py::tuple archs() {
#if defined(HICACHE_CUDA)
  return py::tuple(py::cast(cuda_archs()));
#else
  return py::tuple();
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "HiCache kernels on raw addresses. Use hicache_kernels, which validates.";
  m.attr("MAX_ORDERS") = kMaxOrders;
  m.def("launches", [] { return launch_count.load(); }, "CPU kernel calls and CUDA launches of this process so far.");
  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_tactics", &measured, "Of gated sums past the caches: (a kind's numbers in turn, tactic taken, seconds a byte of each).");
  m.def("update_", &update<cpu_update, int>);
  m.def("forecast", &forecast<cpu_forecast, int>);
  m.def("update_forecast_", &update_forecast<cpu_update_forecast, int>);
  m.def("gated_sum", &gated_sum<cpu_gated_sum, int>);
  m.def("tensors_unchanged", &tensors_unchanged, "Whether tensors are where they were, and as often written to.");
  m.def("same_values", &same_values, "Whether dictionaries have the values that they had: dicts, sizes, all values.");
  m.def("cuda_archs", &archs, "Compute capabilities compiled for, such as 90; none when built without CUDA.");
#if defined(HICACHE_CUDA)
  m.def("cuda_update_", &update<cuda_update, int, uintptr_t>);
  m.def("cuda_forecast", &forecast<cuda_forecast, int, uintptr_t>);
  m.def("cuda_update_forecast_", &update_forecast<cuda_update_forecast, int, uintptr_t>);
  m.def("cuda_gated_sum", &gated_sum<cuda_gated_sum, int, uintptr_t>);
#endif
}
