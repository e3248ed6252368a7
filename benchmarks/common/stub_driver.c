/* A libcuda that does nothing: Triton's own launcher runs over it on a machine without a GPU, and what is timed
   is the host's part of a launch. It counts launches and keeps the parameters of none. */

#include <stddef.h>
#include <stdint.h>

enum { THREADS_OF_A_FUNCTION = 0, REGISTERS_OF_A_FUNCTION = 4 };                      /* CUfunction_attribute */
enum { SHARED = 8, WARP = 10, REGISTERS = 12, PROCESSORS = 16, SHARED_OPTIN = 97 }; /* CUdevice_attribute */

static long launched = 0;
static uintptr_t functions = 0x1000;

long stub_launches(void) { return launched; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "an error of the stub"; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *size, int limit) { *size = 0; return 0; }
int cuCtxSetLimit(int limit, size_t size) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)image; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)functions++;
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  *(uint64_t *)data = pointer;
  return 0;
}
int cuOccupancyMaxActiveClusters(int *clusters, void *function, void *config) { *clusters = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }

/* of an H100, as far as Triton asks */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case SHARED: *value = 49152; break;
    case SHARED_OPTIN: *value = 232448; break;
    case WARP: *value = 32; break;
    case REGISTERS: *value = 65536; break;
    case PROCESSORS: *value = 132; break;
    default: *value = 1000;
  }
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == THREADS_OF_A_FUNCTION ? 1024 : attribute == REGISTERS_OF_A_FUNCTION ? 32 : 0;
  return 0;
}

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  launched++;
  return 0;
}
