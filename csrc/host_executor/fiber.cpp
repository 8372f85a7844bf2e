#include "host_executor/fiber.h"

#include <cstdint>

#if defined(__x86_64__)

// NOTE: swapcontext makes a system call to save the signal mask, which costs more than a switch.
extern "C" void host_executor_switch(void** save, void* resume);
asm(R"(
.text
.globl host_executor_switch
.hidden host_executor_switch
.type host_executor_switch, @function
host_executor_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace host_executor {

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes - 64);
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::resume(Fiber& from) { host_executor_switch(&from.stack_pointer_, stack_pointer_); }

}  // namespace host_executor

#else

namespace host_executor {

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::resume(Fiber& from) { swapcontext(&from.context_, &context_); }

}  // namespace host_executor

#endif
