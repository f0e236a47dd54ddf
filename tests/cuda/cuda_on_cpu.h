// CUDA C++ for g++: the part of the language that the kernels use, so that their own text runs on a
// CPU and can be compared with NumPy. Blocks run one after another; the threads of a block in one
// of two ways.
//
//   default         Each thread is a coroutine that runs until it meets a barrier or a shuffle.
//                   With `backwards` threads and blocks take their turns from the last to the
//                   first: code that lacks a barrier then gives other numbers. Misuse is reported:
//                   some threads at a block barrier and others at a warp operation, a warp
//                   operation after a lane has returned, a block that is not whole warps.
//   -DREAL_THREADS  Each thread is a std::thread, for ThreadSanitizer.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#include <setjmp.h>
#include <ucontext.h>

#define CUDA_ON_CPU
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define threadIdx emulator::here->index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

using std::max;
using std::min;

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

// ------------------------------------------------------------------------------ half precision

struct __half { _Float16 value; };
struct __nv_bfloat16 { uint16_t bits; };
inline float __half2float(__half x) { return x.value; }
inline __half __float2half(float x) { return {(_Float16)x}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ----------------------------------------------------------------------------- threads of a block

namespace emulator {

enum State { RUNS, AT_BLOCK_BARRIER, AT_WARP_BARRIER, RETURNED };

struct Thread {
  dim3 index;
  unsigned number = 0;    // in its block
  unsigned exchanges = 0; // warp operations so far; values lie in two alternating buffers
  State state = RUNS;
  bool started = false;
  jmp_buf context;
  ucontext_t entry;
  std::unique_ptr<char[]> stack;
};

struct Warp {
  uint64_t values[2][32];
#ifdef REAL_THREADS
  std::barrier<> barrier{32};
#endif
};

inline dim3 grid_size, block_size, block_index;
inline std::vector<Thread> threads(1024);
inline std::vector<Warp> warps(32);
inline thread_local Thread* here;
inline void (*body)(void*);
inline void* body_data;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u %u %u)\n", what, block_index.x, block_index.y,
               block_index.z);
  std::abort();
}

#ifdef REAL_THREADS

inline std::unique_ptr<std::barrier<>> block_barrier;
inline void block_wait() { block_barrier->arrive_and_wait(); }
inline void warp_wait() { warps[here->number / 32].barrier.arrive_and_wait(); }

inline void run_block(unsigned count, bool) {
  block_barrier = std::make_unique<std::barrier<>>(count);
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < count; i++)
    workers.emplace_back([i] {
      here = &threads[i];
      body(body_data);
      block_barrier->arrive_and_drop();
    });
  for (auto& worker : workers) worker.join();
}

#else

constexpr size_t STACK_BYTES = 128 << 10;
inline jmp_buf scheduler;

// setjmp and longjmp switch without a system call; swapcontext would make two.
inline void wait(State state) {
  here->state = state;
  if (!_setjmp(here->context)) _longjmp(scheduler, 1);
}
inline void block_wait() { wait(AT_BLOCK_BARRIER); }
inline void warp_wait() { wait(AT_WARP_BARRIER); }

inline void enter() {  // a coroutine serves one block after another
  for (;;) {
    body(body_data);
    wait(RETURNED);
  }
}

inline void resume(Thread& thread) {
  here = &thread;
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  thread.stack.reset(new char[STACK_BYTES]);
  getcontext(&thread.entry);
  thread.entry.uc_stack.ss_sp = thread.stack.get();
  thread.entry.uc_stack.ss_size = STACK_BYTES;
  thread.entry.uc_link = nullptr;
  makecontext(&thread.entry, enter, 0);
  setcontext(&thread.entry);
}

// Lets threads run until all have returned. A warp goes on when its 32 lanes wait, the block when
// every thread that has not returned waits.
inline void run_block(unsigned count, bool backwards) {
  for (unsigned done = 0; done < count;) {
    done = 0;
    unsigned waiting = 0;
    bool moved = false;
    for (unsigned w = 0; w < count / 32; w++) {
      unsigned first = (backwards ? count / 32 - 1 - w : w) * 32, at_warp = 0, returned = 0;
      for (unsigned l = 0; l < 32; l++) {
        Thread& thread = threads[first + (backwards ? 31 - l : l)];
        if (thread.state == RUNS) {
          resume(thread);
          moved = true;
        }
        at_warp += thread.state == AT_WARP_BARRIER;
        returned += thread.state == RETURNED;
        waiting += thread.state == AT_BLOCK_BARRIER;
      }
      if (at_warp && returned) fail("a warp operation after a lane has returned");
      if (at_warp == 32)
        for (unsigned l = 0; l < 32; l++) threads[first + l].state = RUNS;
      moved = moved || at_warp == 32;
      done += returned;
    }
    if (waiting && waiting + done == count) {
      for (unsigned i = 0; i < count; i++)
        if (threads[i].state == AT_BLOCK_BARRIER) threads[i].state = RUNS;
      moved = true;
    }
    if (!moved && done < count) fail("threads wait at different barriers");
  }
}

#endif

template <typename Body>
void launch(dim3 grid, dim3 block, bool backwards, Body call) {
  unsigned count = block.x * block.y * block.z;
  if (count == 0 || count > 1024 || count % 32) fail("a block must be whole warps, at most 1024");
  grid_size = grid;
  block_size = block;
  body = [](void* data) { (*(Body*)data)(); };
  body_data = &call;
  uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; i++) {
    uint64_t at = backwards ? blocks - 1 - i : i;
    block_index = {(unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y),
                   (unsigned)(at / grid.x / grid.y)};
    for (unsigned n = 0; n < count; n++) {
      Thread& thread = threads[n];
      thread.index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
      thread.number = n;
      thread.exchanges = 0;
      thread.state = RUNS;
    }
    run_block(count, backwards);
  }
}

// Every lane gives a value and, once all have, sees the 32 values.
template <typename T>
const uint64_t* exchange(T value) {
  Warp& warp = warps[here->number / 32];
  uint64_t* values = warp.values[here->exchanges++ % 2];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  values[here->number % 32] = bits;
  warp_wait();
  return values;
}

template <typename T>
T from_lane(const uint64_t* values, unsigned lane) {
  T value;
  std::memcpy(&value, &values[lane % 32], sizeof value);
  return value;
}

inline unsigned lane() { return here->number % 32; }

}  // namespace emulator

// ------------------------------------------------------------------- barriers, warps, intrinsics
// Masks are taken to be full: the kernels use no others.

inline void __syncthreads() { emulator::block_wait(); }
inline void __syncwarp() { emulator::exchange(0); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::from_lane<T>(emulator::exchange(value), lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return emulator::from_lane<T>(emulator::exchange(value), emulator::lane() ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  unsigned lane = emulator::lane();
  return emulator::from_lane<T>(emulator::exchange(value), lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* votes = emulator::exchange((unsigned)vote);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; i++) bits |= (unsigned)votes[i] << i;
  return bits;
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  const uint64_t* values = emulator::exchange(value);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; i++)
    bits |= (unsigned)(values[i] == values[emulator::lane()]) << i;
  return bits;
}

inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
