#undef _FORTIFY_SOURCE  // its longjmp mistakes a jump to another stack for one to a frame that has returned
#include "fiber.hpp"

#include <cstdint>
#include <stdexcept>

namespace shim {

void Fiber::start(void (*entry)(void*), void* argument) {
  if (!stack_) stack_.reset(new char[STACK]);  // not cleared: pages that no frame reaches are never allocated
  entry_ = entry;
  argument_ = argument;
#if !defined(__SANITIZE_ADDRESS__)
  begun_ = false;
#endif
  if (getcontext(&here_) != 0) throw std::runtime_error("getcontext failed");
  here_.uc_stack.ss_sp = stack_.get();
  here_.uc_stack.ss_size = STACK;
  here_.uc_link = nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(this);
  // makecontext passes ints only.
  makecontext(&here_, reinterpret_cast<void (*)()>(&Fiber::enter), 2, static_cast<unsigned>(address),
              static_cast<unsigned>(address >> 32));
}

void Fiber::enter(unsigned low, unsigned high) {
  auto* const fiber = reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>(high) << 32 | low);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &fiber->scheduler_stack_, &fiber->scheduler_size_);
#endif
  fiber->entry_(fiber->argument_);
}

#if defined(__SANITIZE_ADDRESS__)

void Fiber::resume() {
  __sanitizer_start_switch_fiber(&fake_scheduler_, stack_.get(), STACK);
  swapcontext(&scheduler_, &here_);
  __sanitizer_finish_switch_fiber(fake_scheduler_, nullptr, nullptr);
}

void Fiber::leave(bool last) {
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_here_, scheduler_stack_, scheduler_size_);
  swapcontext(&here_, &scheduler_);
  __sanitizer_finish_switch_fiber(fake_here_, &scheduler_stack_, &scheduler_size_);
}

#else  // _setjmp and _longjmp: swapcontext is ten times as slow, because it saves the signal mask by a system call

void Fiber::resume() {
  if (_setjmp(left_) != 0) return;
  if (begun_) _longjmp(entered_, 1);
  begun_ = true;
  setcontext(&here_);
}

void Fiber::leave(bool last) {
  if (last) _longjmp(left_, 1);
  if (_setjmp(entered_) == 0) _longjmp(left_, 1);
}

#endif

}  // namespace shim
