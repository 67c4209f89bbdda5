// A CUDA thread as a fiber: a stack of its own, entered and left by the scheduler of its block.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

class Fiber {
 public:
  // Prepares `entry(argument)` to run on this fiber's stack at the next resume(). `entry` must not return: it ends by
  // leave().
  void start(void (*entry)(void*), void* argument);
  // Runs the fiber until it leaves; called by the scheduler.
  void resume();
  // Goes back to the scheduler; called on the fiber. `last` where it will not be resumed again.
  void leave(bool last = false);

 private:
  // Frames of a kernel that keeps 250 values in registers, unoptimised and with a sanitizer's redzones.
  static constexpr std::size_t STACK = 512 * 1024;

  static void enter(unsigned low, unsigned high);

  std::unique_ptr<char[]> stack_;
  ucontext_t here_{};
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  ucontext_t scheduler_{};
  void* fake_here_ = nullptr;
  void* fake_scheduler_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_size_ = 0;
#else
  jmp_buf entered_{}, left_{};
  bool begun_ = false;
#endif
};

}  // namespace shim
