// A driver without a GPU: prints what the real cuda-bindings hands to it, one line per call. Built by test_cuda_launch.py.
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>

namespace {

int context, module, function;

struct Params {  // of the test
  void* x;
  int n;
};

int found(const char* name, void** function_pointer) {
  *function_pointer = dlsym(RTLD_DEFAULT, name);
  return *function_pointer != nullptr ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}

}  // namespace

extern "C" {

int cuGetProcAddress(const char* name, void** pointer, int, unsigned long long) { return found(name, pointer); }
int cuGetProcAddress_v2(const char* name, void** pointer, int, unsigned long long, int* status) {
  const int result = found(name, pointer);
  if (status != nullptr) *status = result != 0;
  return result;
}
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuGetErrorString(int, const char** words) {
  *words = "in the driver's words";
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** result, int device) {
  *result = &context;
  std::printf("retain %d\n", device);
  return 0;
}
int cuCtxSetCurrent(void* current) {
  std::printf("context %d\n", current == &context);
  return 0;
}
int cuModuleLoadData(void** result, const void* code) {
  *result = &module;
  std::printf("code %s\n", static_cast<const char*>(code));
  return 0;
}
int cuModuleGetFunction(void** result, void* in, const char* name) {
  *result = &function;
  std::printf("function %s %d\n", name, in == &module);
  return 0;
}
int cuFuncSetAttribute(void* of, int attribute, int value) {
  std::printf("attribute %d %d %d\n", of == &function, attribute, value);
  return 0;
}
int cuLaunchKernel(void* of, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                   void* stream, void** params, void** extra) {
  const auto* const p = static_cast<const Params*>(params[0]);
  std::printf("launch %d (%u, %u, %u) %u threads, %u bytes, stream %zu, x %zu, n %d, extra %d\n", of == &function, x, y,
              z, threads, shared, reinterpret_cast<std::size_t>(stream), reinterpret_cast<std::size_t>(p->x), p->n,
              extra != nullptr);
  std::fflush(stdout);
  return p->n < 0 ? 719 : 0;  // CUDA_ERROR_LAUNCH_FAILED
}
}
