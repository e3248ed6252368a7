// bits < cases > results: runs every case with the CPU kernels; on stderr, the instruction set that did it.
//
// A case is a header of int64, then arrays as they are in memory; a result is the orders and what was forecast. All of
// it is written and read by tests/installation/compilers.py. The legend is in csrc/include/hicache/kernels.h.

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "hicache/launch.h"

using namespace hicache;

namespace {

struct header {
  int64_t op;  // 0: update_, 1: forecast, 2: update_forecast_, 3: gated_sum
  int64_t type, base_type, num_orders, num_features, batch, rows, channels, num_coeffs, gated, update, threads;
};

using bytes = std::vector<unsigned char>;

size_t size_of(int64_t type) { return type == 0 ? 4 : type == 3 ? 8 : 2; }

bytes read(size_t count) {
  bytes found(count);
  if (count != 0 && std::fread(found.data(), 1, count, stdin) != count) throw std::runtime_error("a case ends early");
  return found;
}

void write(const bytes& from) {
  if (!from.empty()) std::fwrite(from.data(), 1, from.size(), stdout);
}

void run(const header& h) {
  const int64_t elements = h.batch * h.rows * h.channels, row = h.num_features * elements;
  bytes orders = read(size_of(h.type) * static_cast<size_t>(h.num_orders * row));
  bytes coeffs = read(sizeof(double) * static_cast<size_t>(h.num_coeffs));
  bytes inv_gap = read(sizeof(double));
  const size_t outputs = h.op == 3 ? size_of(h.base_type) * static_cast<size_t>(elements)
                                   : size_of(h.type) * static_cast<size_t>(h.op == 0 ? 0 : row);
  bytes base = read(h.op == 3 ? outputs : 0);
  bytes gates = read(h.gated ? size_of(h.base_type) * static_cast<size_t>(h.num_features * h.batch * h.channels) : 0);
  bytes out(outputs);

  const history past = {orders.data(), row, static_cast<int>(h.num_orders - 1), static_cast<dtype>(h.type)};
  const scalars weights = {coeffs.data(), dtype::f64}, gap = {inv_gap.data(), dtype::f64};
  const int threads = static_cast<int>(h.threads);
  if (h.op == 3) {
    sum_args args = {};
    args.past = past;
    args.feature_stride = elements;
    args.num_features = h.num_features;
    args.batch = h.batch;
    args.rows = h.rows;
    args.channels = h.channels;
    args.base_type = static_cast<dtype>(h.base_type);
    args.base = base.data();
    args.gates = h.gated ? gates.data() : nullptr;
    args.out = out.data();
    args.num_coeffs = static_cast<int>(h.num_coeffs);
    args.coeffs = weights;
    args.update = h.update != 0;
    args.inv_gap = gap;
    cpu_gated_sum(args, threads);
  } else {
    cascade_args args = {};
    args.past = past;
    args.numel = row;
    args.num_differences = static_cast<int>(h.num_coeffs - 1);
    args.inv_gap = gap;
    args.coeffs = weights;
    args.out = out.data();
    (h.op == 0 ? cpu_update : h.op == 1 ? cpu_forecast : cpu_update_forecast)(args, threads);
  }
  write(orders);
  write(out);
}

}  // namespace

int main() {
  std::fputs(cpu_isa(), stderr);
  for (header h; std::fread(&h, sizeof h, 1, stdin) == 1;) run(h);
}
