#include "cuda_runtime.h"

#include <cstring>

cudaError_t fake::status(const char* call) {
  return std::strcmp(call, state.fails) == 0 ? cudaErrorFake : cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = fake::state.device;
  return fake::status("cudaGetDevice");
}

cudaError_t cudaSetDevice(int device) {
  const cudaError_t status = fake::status("cudaSetDevice");
  if (status == cudaSuccess) fake::state.device = device;
  return status;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device;
  return fake::status("cudaDeviceGetAttribute");
}

cudaError_t cudaGetLastError() {
  ++fake::state.errors_cleared;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorFake"; }
const char* cudaGetErrorString(cudaError_t) { return "as asked"; }

extern "C" {

fake::machine* machine() { return &fake::state; }

// Called by code built with -fsanitize=alignment, in place of the sanitizer's own printing.
void __ubsan_handle_type_mismatch_v1(void*, void*) { ++fake::state.misaligned; }
}
