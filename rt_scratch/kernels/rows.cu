// Moving rows by index, and adding them up by index in a fixed order.
// Called by gather, scatter_sum, scatter_mean, their backwards and coverage in cuda/routing.py, by
// local_attention and its backward in cuda/attention.py, by segment_sum in cuda/sums.py.
#include "common.cuh"

// out[b, h, r] = x[b, h, index[b, h, r]]: rows of `words` words of type W (the widest that divides
// a row), strides in words, `stride` from row to row of out. One thread per word, grid
// (words of a head / threads, B H).
template <typename W>
__global__ void gather_rows(const W* x_strided, const int* index_bhr, W* out_strided, int heads,
                            int rows, int words, int stride, long long stride_b, long long stride_h,
                            long long stride_t) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (long long)rows * words) return;
  int row = i / words, word = i % words, bh = blockIdx.y;
  const W* x_t = x_strided + bh / heads * stride_b + bh % heads * stride_h;
  int token = index_bhr[(u64)bh * rows + row];
  out_strided[((u64)bh * rows + row) * stride + word] = x_t[token * stride_t + word];
}

// Up to four arrays x[b, h, t], of the same size, as rows of one head after another: in out_arw
// array a has `front` rows of zeros, then `length` rows per head, those from `tokens` on zeros;
// its rows are `stride` words apart.
// One thread per word, grid (words of an array / threads, arrays).
template <typename W>
__global__ void split_heads(const W* x0_strided, const W* x1_strided, const W* x2_strided,
                            const W* x3_strided, W* out_strided, int heads, int tokens, int front,
                            int length, int rows, int words, int stride, long long b0, long long h0,
                            long long t0, long long b1, long long h1, long long t1, long long b2,
                            long long h2, long long t2, long long b3, long long h3, long long t3) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (long long)rows * words) return;
  int row = (int)(i / words) - front, word = i % words, bh = row / length, t = row % length;
  W* out = out_strided + ((u64)blockIdx.y * rows + front + row) * stride + word;
  if (row < 0 || t >= tokens) {
    *out = W();
    return;
  }
  long long b = bh / heads, h = bh % heads;
  if (blockIdx.y == 0) *out = x0_strided[b * b0 + h * h0 + t * t0 + word];
  if (blockIdx.y == 1) *out = x1_strided[b * b1 + h * h1 + t * t1 + word];
  if (blockIdx.y == 2) *out = x2_strided[b * b2 + h * h2 + t * t2 + word];
  if (blockIdx.y == 3) *out = x3_strided[b * b3 + h * h3 + t * t3 + word];
}

// First position in the ascending list index_w whose entry is at least `token`.
__device__ inline int lower_bound(const int* index_w, int window, int token) {
  int low = 0, high = window;
  while (low < high) {
    int middle = (low + high) / 2;
    if (index_w[middle] < token) low = middle + 1;
    else high = middle;
  }
  return low;
}

// out[t] = sum of rows[k, w] over index[k, w] == t, in the order of k; with floor >= 0 divided by
// (their number + floor). Rows are `stride` entries apart. Each list index[k] ascends and names a
// token once at most. times_bht (or null) receives the numbers. One warp per token, grid
// (T / warps, B H): its lanes look for the token in 32 lists at a time, then add up the rows found,
// 128 columns at a time.
template <typename T>
__global__ void scatter_rows(const T* row_strided, const int* index_bhkw, T* out_bhtd, T* times_bht,
                             int lists, int window, int tokens, int width, int stride,
                             float floor) {
  int t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (t >= tokens) return;
  u64 bh = blockIdx.y;
  const int* index_kw = index_bhkw + bh * lists * window;
  const T* row_kwd = row_strided + bh * lists * window * stride;
  T* out_d = out_bhtd + (bh * tokens + t) * width;
  for (int left = 0; left < width; left += 128) {
    float sums[4] = {0, 0, 0, 0};
    int times = 0;
    for (int group = 0; group < lists; group += 32) {
      int k = group + lane, at = window;
      if (k < lists) at = lower_bound(index_kw + (u64)k * window, window, t);
      bool found = at < window && index_kw[(u64)k * window + at] == t;
      unsigned which = __ballot_sync(ALL, found);
      times += __popc(which);
      while (which) {
        int source = __ffs(which) - 1;
        which &= which - 1;
        u64 row = (u64)(group + source) * window + __shfl_sync(ALL, at, source);
        for (int i = 0; i < 4; i++) {
          int d = left + 32 * i + lane;
          if (d < width) sums[i] += to_float(row_kwd[row * stride + d]);
        }
      }
    }
    for (int i = 0; i < 4; i++) {
      int d = left + 32 * i + lane;
      if (d < width) store(out_d + d, floor < 0 ? sums[i] : sums[i] / (times + floor));
    }
    if (times_bht && left == 0 && lane == 0) store(times_bht + bh * tokens + t, (float)times);
  }
}

// out[b, h, r] = x[b, h, t] / (times[b, h, t] + floor) with t = index[b, h, r]; rows of out are
// `stride` entries apart. One thread per entry, grid (entries of a head / threads, B H).
template <typename T>
__global__ void gather_mean(const T* x_strided, const T* times_bht, const int* index_bhr,
                            T* out_strided, int heads, int rows, int tokens, int width, int stride,
                            float floor,
                            long long stride_b, long long stride_h, long long stride_t) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (long long)rows * width) return;
  int row = i / width, d = i % width, bh = blockIdx.y;
  int t = index_bhr[(u64)bh * rows + row];
  float x = to_float(x_strided[bh / heads * stride_b + bh % heads * stride_h + t * stride_t + d]);
  float times = to_float(times_bht[(u64)bh * tokens + t]);
  store(out_strided + ((u64)bh * rows + row) * stride + d, x / (times + floor));
}

// Shares of the entries of times that are 0, and that are above 1. One block of 256 threads.
template <typename T>
__global__ void coverage(const T* times_n, float* share_2, int size) {
  float none = 0, several = 0;
  for (int n = threadIdx.x; n < size; n += 256) {
    float times = to_float(times_n[n]);
    none += times == 0;
    several += times > 1;
  }
  none = block_sum(none);
  several = block_sum(several);
  if (threadIdx.x == 0) {
    share_2[0] = none / size;
    share_2[1] = several / size;
  }
}

// Where each segment begins in the sorted list id: start[v] = first n with id[n] >= v, and
// start[segments] = size. One thread per n = 0 .. size.
__global__ void segment_starts(const int* id_n, int* start_v, int size, int segments) {
  int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n > size) return;
  int before = n == 0 ? -1 : id_n[n - 1], here = n == size ? segments : id_n[n];
  for (int v = before + 1; v <= here; v++) start_v[v] = n;
}

// Sums of rows order[n] with the same sorted id[n], a piece of the list per block: the sum of a
// segment that begins in the piece goes to out, the sum of one that began before it to carry.
// Grid (pieces, D / threads), one thread per column.
template <typename T>
__global__ void segment_pieces(const T* row_nd, const int* order_n, const int* id_n,
                               float* out_vd, float* carry_pd, int size, int width, int piece) {
  int d = blockIdx.y * blockDim.x + threadIdx.x;
  if (d >= width) return;
  int begin = blockIdx.x * piece, end = min(size, begin + piece), id = id_n[begin];
  bool carried = begin > 0 && id_n[begin - 1] == id;
  float sum = 0;
  for (int n = begin; n < end; n++) {
    if (id_n[n] != id) {
      (carried ? carry_pd + (u64)blockIdx.x * width : out_vd + (u64)id * width)[d] = sum;
      id = id_n[n];
      carried = false;
      sum = 0;
    }
    sum += to_float(row_nd[(u64)order_n[n] * width + d]);
  }
  (carried ? carry_pd + (u64)blockIdx.x * width : out_vd + (u64)id * width)[d] = sum;
}

// Adds to each segment what later pieces carried, in order; an empty segment is 0.
// Grid (segments, D / threads), one thread per column.
__global__ void segment_finish(const int* start_v, const float* carry_pd, float* out_vd, int width,
                               int piece) {
  int d = blockIdx.y * blockDim.x + threadIdx.x;
  if (d >= width) return;
  u64 v = blockIdx.x;
  int begin = start_v[v], end = start_v[v + 1];
  float sum = begin < end ? out_vd[v * width + d] : 0.0f;
  for (int p = begin / piece + 1; begin < end && p <= (end - 1) / piece; p++)
    sum += carry_pd[(u64)p * width + d];
  out_vd[v * width + d] = sum;
}
