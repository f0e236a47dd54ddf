// Shared by all kernels. Sources are kept to what both NVRTC and g++ understand (see tests/cuda):
// the same text runs on the GPU and, one thread after another, on a CPU.
//
// Conventions. T is the type of activations: float, __half or __nv_bfloat16; arithmetic is always
// float. Suffix letters name the axes of an array (y_nc: rows by columns). No float atomics: sums
// have a fixed order, so that the same input gives the same bits on every run.
#ifndef CUDA_ON_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

typedef unsigned long long u64;
constexpr unsigned ALL = 0xffffffffu;            // every lane of a warp
constexpr float LOWEST = -3.402823466e38f;       // most negative float; NVRTC has no <cfloat>

__device__ inline float minus_infinity() { return __int_as_float((int)0xff800000u); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline void store(__half* p, float x) { *p = __float2half(x); }
__device__ inline void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }

// N neighbours x[first .. first + N), those at or beyond `size` left out; 16 bytes at a time where
// the address allows it.
template <typename T> struct alignas(16) Pack { T at[16 / sizeof(T)]; };

template <int N, typename T>
__device__ inline void read_many(const T* x, u64 first, u64 size, float (&out)[N]) {
  constexpr int P = 16 / sizeof(T);
  if (first + N <= size && (u64)(x + first) % 16 == 0) {
    for (int i = 0; i < N; i += P) {
      Pack<T> pack = *(const Pack<T>*)(x + first + i);
      for (int j = 0; j < P; j++) out[i + j] = to_float(pack.at[j]);
    }
  } else {
    for (int i = 0; i < N; i++) out[i] = first + i < size ? to_float(x[first + i]) : 0.0f;
  }
}

template <int N, typename T>
__device__ inline void write_many(T* x, u64 first, u64 size, const float (&in)[N]) {
  constexpr int P = 16 / sizeof(T);
  if (first + N <= size && (u64)(x + first) % 16 == 0) {
    for (int i = 0; i < N; i += P) {
      Pack<T> pack;
      for (int j = 0; j < P; j++) store(&pack.at[j], in[i + j]);
      *(Pack<T>*)(x + first + i) = pack;
    }
  } else {
    for (int i = 0; i < N; i++)
      if (first + i < size) store(x + first + i, in[i]);
  }
}

__device__ inline float warp_sum(float x) {
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// Sum of one number per thread of a block of 256, in a fixed order, in every thread.
__device__ inline float block_sum(float x) {
  __shared__ float sums[8];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < 8; i++) x += sums[i];
  return x;
}

// Which of the entries 8 octet .. 8 octet + 7 survive dropout, as eight bits: those whose 16-bit
// number is at least `threshold` (rate x 65536). Entries count from the first window of the step,
// the array's own from `first` on. Philox4x32-10, Salmon et al. 2011, with counter (octet in 64
// bits, stream, step): dropout.dropout_mask draws the same numbers.
struct Drop { unsigned threshold, seed_low, seed_high, stream, step; u64 first; };

// The step is read from the device, so that a graph of kernels draws new numbers each time it runs;
// null where nothing is dropped.
__device__ inline Drop drop_of(unsigned threshold, unsigned seed_low, unsigned seed_high,
                               unsigned stream, const unsigned* step_1, long long first) {
  return {threshold, seed_low, seed_high, stream, step_1 ? *step_1 : 0, (u64)first};
}

__device__ inline unsigned kept(u64 octet, Drop drop) {
  if (drop.threshold == 0) return 0xff;
  unsigned c0 = (unsigned)octet, c1 = (unsigned)(octet >> 32), c2 = drop.stream, c3 = drop.step;
  unsigned k0 = drop.seed_low, k1 = drop.seed_high;
  for (int round = 0; round < 10; round++) {
    u64 p0 = (u64)0xD2511F53u * c0, p1 = (u64)0xCD9E8D57u * c2;
    c0 = (unsigned)(p1 >> 32) ^ c1 ^ k0;
    c2 = (unsigned)(p0 >> 32) ^ c3 ^ k1;
    c1 = (unsigned)p1;
    c3 = (unsigned)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  unsigned words[4] = {c0, c1, c2, c3}, bits = 0;
  for (int i = 0; i < 4; i++) {
    bits |= (unsigned)((words[i] & 0xffff) >= drop.threshold) << (2 * i);
    bits |= (unsigned)((words[i] >> 16) >= drop.threshold) << (2 * i + 1);
  }
  return bits;
}

__device__ inline float kept_scale(Drop drop) { return 65536.0f / (65536 - drop.threshold); }

// The bits of `kept` for the eight entries that begin at `at`, wherever in an octet that is.
__device__ inline unsigned kept_from(u64 at, Drop drop) {
  unsigned lead = (drop.first + at) % 8;
  u64 octet = (drop.first + at) / 8;
  unsigned bits = kept(octet, drop);
  if (lead) bits = (bits | kept(octet + 1, drop) << 8) >> lead;
  return bits;
}
