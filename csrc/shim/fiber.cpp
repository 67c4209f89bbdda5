#include "fiber.hpp"

#include <cstdint>
#include <stdexcept>

namespace shim {

void Fiber::start(void (*entry)(void*), void* argument) {
  if (!stack_) stack_.reset(new char[STACK]);  // not cleared: pages that no frame reaches cost nothing
  entry_ = entry;
  argument_ = argument;
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

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_scheduler_, stack_.get(), STACK);
#endif
  swapcontext(&scheduler_, &here_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_scheduler_, nullptr, nullptr);
#endif
}

void Fiber::leave([[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_here_, scheduler_stack_, scheduler_size_);
#endif
  swapcontext(&here_, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_here_, &scheduler_stack_, &scheduler_size_);
#endif
}

}  // namespace shim
