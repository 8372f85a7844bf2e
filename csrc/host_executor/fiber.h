// Contexts that take turns on one CPU thread.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host_executor {

class Fiber {
 public:
  // Makes `entry` run at the first switch to this fiber; it must not return.
  void start(void* stack, size_t bytes, void (*entry)());
  // Saves the running context in `from` and goes on with this one.
  void resume(Fiber& from);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace host_executor
