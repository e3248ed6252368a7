// Python bindings: addresses, sizes and numbers. No torch: the extension works with any version of it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "hicache/launch.h"

namespace py = pybind11;
using namespace hicache;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

history past(uintptr_t orders, int64_t order_stride, int num_orders, int type) {
  if (num_orders < 1 || num_orders > kMaxOrders) throw std::invalid_argument("expected 1 to 5 orders");
  if (type < 0 || type > 3) throw std::invalid_argument("unknown dtype code");
  return {pointer(orders), order_stride, num_orders - 1, static_cast<dtype>(type)};
}

// Every table index is checked here once more: a wrong one would call a wild pointer.
int checked(int value, int low, int high, const char* name) {
  if (value < low || value > high) throw std::invalid_argument(std::string("out of range: ") + name);
  return value;
}

void update(uintptr_t orders, int64_t order_stride, int num_orders, int type, int64_t numel, int read, double inv_gap,
            int threads) {
  const auto args = cascade_args{past(orders, order_stride, num_orders, type), numel,
                                 checked(read, 0, num_orders - 1, "filled"), inv_gap, nullptr, nullptr};
  py::gil_scoped_release release;
  cpu_update(args, threads);
}

void forecast(uintptr_t orders, int64_t order_stride, int num_orders, int type, int64_t numel,
              const std::vector<double>& coeffs, uintptr_t out, int threads) {
  const int last = checked(static_cast<int>(coeffs.size()), 1, num_orders, "coeffs") - 1;
  const auto args = cascade_args{past(orders, order_stride, num_orders, type), numel, last, 0.0, coeffs.data(),
                                 pointer(out)};
  py::gil_scoped_release release;
  cpu_forecast(args, threads);
}

void update_forecast(uintptr_t orders, int64_t order_stride, int num_orders, int type, int64_t numel, int read,
                     double inv_gap, const std::vector<double>& coeffs, uintptr_t out, int threads) {
  checked(static_cast<int>(coeffs.size()) - 1, read, read, "coeffs");
  const auto args = cascade_args{past(orders, order_stride, num_orders, type), numel,
                                 checked(read, 0, num_orders - 1, "filled"), inv_gap, coeffs.data(), pointer(out)};
  py::gil_scoped_release release;
  cpu_update_forecast(args, threads);
}

void gated_sum(uintptr_t orders, int64_t order_stride, int num_orders, int type, int64_t term_stride, int64_t terms,
               int64_t batch, int64_t rows, int64_t channels, int base_type, uintptr_t base, uintptr_t gates,
               const std::vector<double>& coeffs, uintptr_t out, bool update, double inv_gap, int threads) {
  sum_args args = {};
  args.past = past(orders, order_stride, num_orders, type);
  args.term_stride = term_stride;
  args.terms = terms;
  args.batch = batch;
  args.rows = rows;
  args.channels = channels;
  args.base_type = static_cast<dtype>(checked(base_type, 0, 3, "base dtype"));
  args.base = pointer(base);
  args.gates = pointer(gates);
  args.out = pointer(out);
  args.orders_used = checked(static_cast<int>(coeffs.size()), 1, num_orders, "coeffs");
  args.coeffs = coeffs.data();
  args.update = update;
  args.inv_gap = inv_gap;
  py::gil_scoped_release release;
  cpu_gated_sum(args, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "HiCache kernels for the CPU, on raw addresses. Use hicache_kernels, which validates.";
  m.attr("MAX_ORDERS") = kMaxOrders;
  m.def("cpu_isa", &cpu_isa);
  m.def("update_", &update);
  m.def("forecast", &forecast);
  m.def("update_forecast_", &update_forecast);
  m.def("gated_sum", &gated_sum);
}
