// The few names of CUDA that csrc/ uses, for a host compiler: its threads run one after the other, on host memory.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x;
  explicit dim3(unsigned count) : x(count) {}
};
inline dim3 blockIdx(0), threadIdx(0), gridDim(0);

using cudaStream_t = struct stream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorFake = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

namespace fake {

struct machine {
  int blocks_a_processor = 1;
  int backward = 0;        // run the threads in the opposite order
  const char* fails = "";  // the call that reports an error
  int device = 0;          // the current one
  // where there is one, it is told of a launch, and the threads are not run: kernel, blocks, threads, arguments
  int (*launched)(void*, unsigned, unsigned, void**) = nullptr;
  // what happened
  int launches = 0, blocks = 0, launched_on = -1, occupancy_asked = 0, errors_cleared = 0, misaligned = 0;
  uintptr_t stream = 0;
};
inline machine state;

cudaError_t status(const char* call);

}  // namespace fake

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t status);
const char* cudaGetErrorString(cudaError_t status);

template <class Args>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Args), int, size_t) {
  ++fake::state.occupancy_asked;
  *blocks = fake::state.blocks_a_processor;
  return fake::status("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t stream) {
  const cudaError_t status = fake::status("cudaLaunchKernel");
  if (status != cudaSuccess) return status;
  ++fake::state.launches;
  fake::state.blocks = static_cast<int>(grid.x);
  fake::state.launched_on = fake::state.device;
  fake::state.stream = reinterpret_cast<uintptr_t>(stream);
  if (fake::state.launched != nullptr) {
    return fake::state.launched(reinterpret_cast<void*>(kernel), grid.x, block.x, arguments) == 0 ? cudaSuccess
                                                                                              : cudaErrorFake;
  }
  gridDim = grid;
  const unsigned threads = grid.x * block.x;
  for (unsigned i = 0; i < threads; ++i) {
    const unsigned number = fake::state.backward ? threads - 1 - i : i;
    blockIdx.x = number / block.x;
    threadIdx.x = number % block.x;
    kernel(*static_cast<const Args*>(arguments[0]));
  }
  return cudaSuccess;
}
