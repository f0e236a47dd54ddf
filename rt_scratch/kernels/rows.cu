// Moving rows by index, and adding them up by index in a fixed order.
// Called by gather, scatter_sum, scatter_mean and segment_sum in cuda.py.
#include "common.cuh"

// out[b, h, r] = x[b, h, index[b, h, r]]: rows of `words` words of type W (the widest that divides
// a row), strides of x in words. One thread per word, grid (words of a head / threads, B H).
template <typename W>
__global__ void gather_rows(const W* x_strided, const int* index_bhr, W* out_bhrw, int heads,
                            int rows, int words, long long stride_b, long long stride_h,
                            long long stride_t) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (long long)rows * words) return;
  int row = i / words, word = i % words, bh = blockIdx.y;
  const W* x_t = x_strided + bh / heads * stride_b + bh % heads * stride_h;
  int token = index_bhr[(u64)bh * rows + row];
  out_bhrw[(u64)bh * rows * words + i] = x_t[token * stride_t + word];
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

// Most lists, and most floats and tokens of output per block.
constexpr int LISTS = 1024, TILE = 4096, TOKENS = 256;

// out[t] = sum of rows[k, w] over index[k, w] == t, in the order of k; with floor >= 0 divided by
// (their number + floor). Each list index[k] ascends, so the rows of the `tile` tokens of a block
// are a stretch of every list. times_bht (or null) receives the numbers.
// Grid (T / tile, B H), threads own columns; tile D <= TILE, tile <= TOKENS.
template <typename T>
__global__ void scatter_rows(const T* row_bhkwd, const int* index_bhkw, T* out_bhtd, T* times_bht,
                             int lists, int window, int tokens, int width, int tile,
                             float floor) {
  __shared__ float sums[TILE];
  __shared__ int begins[LISTS], ends[LISTS], times[TOKENS];
  u64 bh = blockIdx.y;
  int begin = blockIdx.x * tile, size = min(tile, tokens - begin);
  const int* index_kw = index_bhkw + bh * lists * window;
  const T* row_kwd = row_bhkwd + bh * lists * window * width;

  for (int k = threadIdx.x; k < lists; k += blockDim.x) {
    begins[k] = lower_bound(index_kw + (u64)k * window, window, begin);
    ends[k] = lower_bound(index_kw + (u64)k * window, window, begin + size);
  }
  for (int i = threadIdx.x; i < size * width; i += blockDim.x) sums[i] = 0;
  for (int t = threadIdx.x; t < size; t += blockDim.x) times[t] = 0;
  __syncthreads();
  for (int k = 0; k < lists; k++) {
    for (u64 w = (u64)k * window + begins[k]; w < (u64)k * window + ends[k]; w++) {
      int t = index_kw[w] - begin;
      for (int d = threadIdx.x; d < width; d += blockDim.x)
        sums[t * width + d] += to_float(row_kwd[w * width + d]);
      if (threadIdx.x == 0) times[t]++;
    }
  }
  __syncthreads();
  u64 out = (bh * tokens + begin) * width;
  for (int i = threadIdx.x; i < size * width; i += blockDim.x)
    store(out_bhtd + out + i, floor < 0 ? sums[i] : sums[i] / (times[i / width] + floor));
  if (times_bht)
    for (int t = threadIdx.x; t < size; t += blockDim.x)
      store(times_bht + bh * tokens + begin + t, (float)times[t]);
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
