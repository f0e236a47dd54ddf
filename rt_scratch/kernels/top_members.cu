// The W best of T scores per row, as positions in order of time; ties go to the earlier position.
// Called by top_members in cuda/routing.py. One block of 256 threads per row (batch, head,
// cluster).
//
// Radix select: the score of rank W is found digit by digit (11, 11 and 10 bits), from a histogram
// of the next digit over the scores that agree so far. Then each warp walks its own stretch of the
// row twice, once to count and once to write what it keeps behind what the warps before it keep.
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, BINS = 2048;

// Unsigned keys in the order of the scores: -0 equals 0, NaN comes last.
__device__ inline unsigned sort_key(float score) {
  unsigned bits = __float_as_uint(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if (bits == 0x80000000u) bits = 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__global__ void __launch_bounds__(THREADS)
    top_members(const float* score_rt, int* index_rw, int tokens, int window) {
  __shared__ int histogram[BINS];
  __shared__ unsigned shared_threshold;
  __shared__ int shared_wanted, greater_of[WARPS], equal_of[WARPS];
  const float* score_t = score_rt + (u64)blockIdx.x * tokens;
  int* index_w = index_rw + (u64)blockIdx.x * window;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  unsigned threshold = 0, agreed = 0;  // the digits found, and which bits they are
  int wanted = window;                 // rank of the score looked for among those that agree
  for (int digit = 0; digit < 3; digit++) {
    int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, bins = digit == 2 ? 1024 : 2048;
    for (int i = threadIdx.x; i < bins; i += THREADS) histogram[i] = 0;
    __syncthreads();
    for (int t = threadIdx.x; t < tokens; t += THREADS) {
      unsigned key = sort_key(score_t[t]);
      if ((key & agreed) == threshold) atomicAdd(&histogram[(key >> shift) & (bins - 1)], 1);
    }
    __syncthreads();
    if (warp == 0) {
      int above = 0;  // scores in the bins passed, from the top
      for (int high = bins - 1; high >= 0; high -= 32) {
        int count = histogram[high - lane], sum = count;
        for (int step = 1; step < 32; step <<= 1) {
          int other = __shfl_up_sync(ALL, sum, step);
          if (lane >= step) sum += other;
        }
        unsigned reached = __ballot_sync(ALL, above + sum >= wanted);
        if (reached) {
          if (lane == __ffs(reached) - 1) {
            shared_threshold = threshold | (unsigned)(high - lane) << shift;
            shared_wanted = wanted - (above + sum - count);
          }
          break;
        }
        above += __shfl_sync(ALL, sum, 31);
      }
    }
    __syncthreads();
    threshold = shared_threshold;
    wanted = shared_wanted;
    agreed |= (unsigned)(bins - 1) << shift;
  }

  // All scores above the threshold are kept, and the first `wanted` of those equal to it.
  int stretch = (tokens + THREADS - 1) / THREADS * 32;
  int begin = warp * stretch, end = min(tokens, begin + stretch);
  int greater = 0, equal = 0;
  for (int base = begin; base < end; base += 32) {
    unsigned key = base + lane < end ? sort_key(score_t[base + lane]) : 0;
    greater += __popc(__ballot_sync(ALL, base + lane < end && key > threshold));
    equal += __popc(__ballot_sync(ALL, base + lane < end && key == threshold));
  }
  if (lane == 0) {
    greater_of[warp] = greater;
    equal_of[warp] = equal;
  }
  __syncthreads();
  greater = equal = 0;
  for (int i = 0; i < warp; i++) {
    greater += greater_of[i];
    equal += equal_of[i];
  }
  unsigned before = (1u << lane) - 1;
  for (int base = begin; base < end; base += 32) {
    unsigned key = base + lane < end ? sort_key(score_t[base + lane]) : 0;
    unsigned above = __ballot_sync(ALL, base + lane < end && key > threshold);
    unsigned same = __ballot_sync(ALL, base + lane < end && key == threshold);
    int ties = equal + __popc(same & before);
    bool keep = above >> lane & 1 || (same >> lane & 1 && ties < wanted);
    if (keep) index_w[greater + __popc(above & before) + min(ties, wanted)] = base + lane;
    greater += __popc(above);
    equal += __popc(same);
  }
}
