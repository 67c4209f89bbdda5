// A CUDA thread as a fiber with a stack of its own; its block's scheduler resumes it.
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
  // Prepares `entry(argument)` to run on this fiber's stack at the next resume(). `entry` must not return: it ends with
  // leave(true).
  void start(void (*entry)(void*), void* argument);
  // Runs the fiber until it leaves; called by the scheduler.
  void resume();
  // Goes back to the scheduler; called on the fiber. `last` means that it will not be resumed again.
  void leave(bool last = false);

 private:
  // Room for the frames of a kernel that keeps 250 values in registers, unoptimised and with a sanitizer's redzones.
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
