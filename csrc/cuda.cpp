// Picks a CUDA kernel and launches it once, on as many blocks as the device holds at a time.
// The legend is in kernels.h.

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "hicache/cuda.h"
#include "hicache/launch.h"

namespace hicache {

namespace {

void check(const char* op, const char* call, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next one to ask, torch perhaps, would be told of it too
  throw std::runtime_error(std::string(op) + ": " + call + " failed: " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ")");
}

// Makes a device current for as long as it lives.
class on_device {
 public:
  on_device(const char* op, int device) {
    check(op, "cudaGetDevice", cudaGetDevice(&before_));
    if (device == before_) return;
    check(op, "cudaSetDevice", cudaSetDevice(device));
    changed_ = true;
  }
  ~on_device() {
    if (changed_) cudaSetDevice(before_);
  }
  on_device(const on_device&) = delete;
  on_device& operator=(const on_device&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Blocks of a kernel that the current device, number `device`, runs at a time. Asked once.
template <class Args>
int64_t resident_blocks(const char* op, void (*kernel)(Args), int device) {
  static std::mutex mutex;
  static std::map<std::pair<void (*)(Args), int>, int64_t> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) return found->second;
  int processors = 0, blocks = 0;
  check(op, "cudaDeviceGetAttribute", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(op, "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  return known[{kernel, device}] = int64_t{processors} * std::max(blocks, 1);
}

// `work`: threads that have something to do. With fewer, each does several things in turn.
template <class Args>
void launch(const char* op, void (*kernel)(Args), Args args, int64_t work, int device, uintptr_t stream) {
  if (work == 0) return;
  const on_device guard(op, device);
  const int64_t blocks = std::min((work + kThreads - 1) / kThreads, resident_blocks(op, kernel, device));
  void* arguments[] = {&args};
  check(op, "cudaLaunchKernel",
        cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0,
                         reinterpret_cast<cudaStream_t>(stream)));
  ++launch_count;
}

const cuda_kernel_table& kernels_of(dtype type) {
  static const cuda_kernel_table tables[] = {cuda_kernels<float>(), cuda_kernels<bf16>(), cuda_kernels<fp16>(),
                                             cuda_kernels<double>()};  // in the order of dtype
  return tables[static_cast<int>(type)];
}

int bytes_of(dtype type) { return type == dtype::f64 ? 8 : type == dtype::f32 ? 4 : 2; }

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0; }

// Whether every row of a history starts at a multiple of 16 bytes.
bool aligned(const history& past) {
  return aligned(past.orders) && (past.top == 0 || past.order_stride * bytes_of(past.type) % sizeof(uint4) == 0);
}

void launch_cascade(const char* op, const cascade_kernels& kernels, const cascade_args& args, int device,
                    uintptr_t stream) {
  const int pack = pack_size(bytes_of(args.past.type), bytes_of(args.past.type));
  if (args.numel % pack == 0 && args.slot % pack == 0 && aligned(args.past) && aligned(args.out)) {
    launch(op, kernels.wide[args.num_differences], args, args.numel / pack, device, stream);
  } else {
    launch(op, kernels.any, args, args.numel, device, stream);
  }
}

sum_tiles tiles_of(sum_args args, int pack, int rows) {
  sum_tiles tiles = {};
  tiles.numel = args.batch * args.rows * args.channels;
  if (args.gates == nullptr) {
    // A row has no meaning: rows as long as a warp is wide, so that its accesses stay whole. The last may be cut.
    args.channels = 32 * pack;
    args.rows = (tiles.numel + args.channels - 1) / args.channels;
    args.batch = 1;
  }
  tiles.args = args;
  tiles.packs = args.channels / pack;
  tiles.groups = (args.rows + rows - 1) / rows;
  tiles.count = tiles.packs * tiles.groups * args.batch;
  return tiles;
}

}  // namespace

std::vector<int> cuda_archs() { return {HICACHE_CUDA_ARCHS}; }

void cuda_update(const cascade_args& args, int device, uintptr_t stream) {
  launch_cascade("update_", kernels_of(args.past.type).update, args, device, stream);
}

void cuda_update_forecast(const cascade_args& args, int device, uintptr_t stream) {
  const bool by_feature = args.coeffs.features != 0;
  launch_cascade("update_forecast_", kernels_of(args.past.type).update_forecast[by_feature], args, device, stream);
}

void cuda_forecast(const cascade_args& args, int device, uintptr_t stream) {
  const bool by_feature = args.coeffs.features != 0;
  launch_cascade("forecast", kernels_of(args.past.type).forecast[by_feature], args, device, stream);
}

void cuda_gated_sum(const sum_args& args, int device, uintptr_t stream) {
  const bool by_feature = args.coeffs.features != 0;
  const sum_kernels& kernels = kernels_of(args.past.type).gated_sum[by_feature][static_cast<int>(args.base_type)];
  if (kernels.any == nullptr) throw std::invalid_argument("gated_sum: no native kernel for this pair of dtypes");
  const int bytes = bytes_of(args.past.type), base_bytes = bytes_of(args.base_type);
  const int pack = pack_size(bytes, base_bytes);
  const int64_t row = args.gates ? args.channels : args.batch * args.rows * args.channels;
  const bool wide = row % pack == 0 && aligned(args.past) && aligned(args.base) && aligned(args.gates) &&
                    aligned(args.out) && (args.num_features == 1 || args.feature_stride * bytes % sizeof(uint4) == 0);
  if (wide) {
    const sum_tiles tiles = tiles_of(args, pack, tile_rows(pack * bytes * args.num_coeffs));
    launch("gated_sum", kernels.wide[args.update][args.num_coeffs - 1], tiles, tiles.count, device, stream);
  } else {
    const sum_tiles tiles = tiles_of(args, 1, 1);
    launch("gated_sum", kernels.any, tiles, tiles.count, device, stream);
  }
}

}  // namespace hicache
