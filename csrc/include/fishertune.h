/*
 * The library behind fishertune_kernels: a plain C ABI, no torch, so that one build serves every torch version. The first
 * part runs on CPUs; the CUDA part at the end holds what the Triton kernels of the Python package are weak at.
 *
 * Conventions
 *   - Every size, count and index range is int64_t. All arithmetic is fp32; 16-bit values are widened exactly on load and
 *     rounded to nearest even on store. Results do not depend on the thread count or on the instruction set in use.
 *   - Operators take a list of tensors as an array of rows, so that a model's hundred small tensors cost one call and one
 *     parallel region. Every field of a row is eight bytes wide (a pointer or an int64_t): a caller may build the array as
 *     plain 64-bit integers. Tensors are dense and row-major; `numel` 0 is legal, its pointers may then be NULL.
 *   - `threads` is the number of OpenMP threads to use; values below 1 mean the OpenMP default.
 *   - Every function returns 0, or a nonzero ft_status with the reason in ft_last_error() (kept per thread). Arguments are
 *     checked before any memory is written.
 */
#ifndef FISHERTUNE_H
#define FISHERTUNE_H

#include <stdint.h>

#if defined(_WIN32)
#define FT_API __declspec(dllexport)
#else
#define FT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change a caller compiled or written against an older header would notice. */
#define FT_ABI_VERSION 2

typedef enum { FT_OK = 0, FT_INVALID = 1, FT_OUT_OF_MEMORY = 2, FT_UNAVAILABLE = 3, FT_CUDA_ERROR = 4 } ft_status;
typedef enum { FT_FP32 = 0, FT_BF16 = 1, FT_FP16 = 2 } ft_dtype;
typedef enum { FT_INT32 = 0, FT_INT64 = 1 } ft_index_dtype;

FT_API int32_t ft_abi_version(void);
FT_API const char* ft_last_error(void);

/* Instruction set in use: "avx512", "avx2" or "portable"; the widest the machine has, unless the environment variable
 * FISHERTUNE_NATIVE_ISA or ft_set_isa names another. ft_set_isa refuses what the machine or the build lacks. */
FT_API const char* ft_isa(void);
FT_API int32_t ft_set_isa(const char* name);

/* accumulator += weight * grad^2 */
typedef struct {
  float* accumulator;
  const void* grad;
  int64_t numel;
  int64_t dtype; /* of grad */
} ft_square_row;
FT_API int32_t ft_squared_grad_accumulate(const ft_square_row* rows, int64_t n_rows, double weight, int32_t threads);

/* weight_accumulator[c] += weight * sum_n (sum_t dy[n,t,c] * (x[n,t,c] - mean[n,t]) * rstd[n,t])^2
 * bias_accumulator[c]   += weight * sum_n (sum_t dy[n,t,c])^2
 * Sums over t run in blocks of 64 terms, so that their error does not grow with the whole of `tokens`. */
typedef struct {
  float* weight_accumulator; /* or NULL */
  float* bias_accumulator;   /* or NULL */
  const void* x;             /* needed with weight_accumulator only */
  const void* dy;
  const float* mean; /* NULL together with rstd: x is taken as it is */
  const float* rstd;
  int64_t samples;
  int64_t tokens;
  int64_t channels;
  int64_t x_dtype;
  int64_t dy_dtype;
} ft_affine_row;
FT_API int32_t ft_per_sample_affine(const ft_affine_row* rows, int64_t n_rows, double weight, int32_t threads);

/* out = param + sign * (excess + prior_precision)^(-1/2) * eps, eps ~ N(0, 1) a function of (seed, step, offset + i) only:
 * Philox-4x32-10 with key (seed low, seed high) and counter (g/4 low, g/4 high, step low, step high), lane g % 4 of the
 * element with global index g; outputs become uniforms ((r >> 8) + 0.5) * 2^-24 and normals by Box-Muller. */
typedef struct {
  const void* param;
  const float* excess;
  void* out;
  int64_t numel;
  int64_t dtype; /* of param and out */
  int64_t offset;
} ft_perturb_row;
FT_API int32_t ft_gaussian_perturb(const ft_perturb_row* rows, int64_t n_rows, double prior_precision, uint64_t seed,
                                   uint64_t step, double sign, int32_t threads);

/* excess = (1 - beta) * excess + (beta / gamma) * squared_grad */
typedef struct {
  float* excess;
  const void* squared_grad;
  int64_t numel;
  int64_t dtype; /* of squared_grad */
} ft_natural_row;
FT_API int32_t ft_precision_update_natural(const ft_natural_row* rows, int64_t n_rows, double beta, double gamma,
                                           int32_t threads);

/* One Adam step on log(precision), precision = excess + prior_precision, with the draw of ft_gaussian_perturb:
 *   g = -sign/2 * eps * precision^(-1/2) * grad + gamma/2 * excess / precision
 *   excess += precision * expm1(Adam step), kept above -prior_precision */
typedef struct {
  float* excess;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t numel;
  int64_t dtype; /* of grad */
  int64_t offset;
} ft_sgvb_row;
typedef struct {
  double lr, beta1, beta2, eps, gamma, prior_precision, sign;
  uint64_t seed, noise_step;
  int64_t step; /* of Adam, from 1 */
} ft_sgvb;
FT_API int32_t ft_precision_update_sgvb(const ft_sgvb_row* rows, int64_t n_rows, const ft_sgvb* options, int32_t threads);

/* A score's key is its fp32 bit pattern mapped to an unsigned integer of the same order, -0 counted as +0.
 * histogram[b] += number of elements with (key & prefix_mask) == prefix and ((key >> shift) & (2^bits - 1)) == b;
 * histogram[2^bits] += number of NaN, which are in no other bin. 1 <= bits <= 16. */
typedef struct {
  const void* score;
  int64_t numel;
  int64_t dtype;
} ft_scores;
FT_API int32_t ft_key_histogram(const ft_scores* rows, int64_t n_rows, int32_t shift, int32_t bits, uint32_t prefix_mask,
                                uint32_t prefix, int64_t* histogram, int32_t threads);

/* One score from each run of `stride` elements of each tensor, NaN where the last, shorter run has none: `sample` takes
 * ceil(numel / stride) values a tensor, tensor after tensor. Number i of these is element
 * (i * 2654435769 mod 2^32) * stride / 2^32 of its run. */
FT_API int32_t ft_sample_scores(const ft_scores* rows, int64_t n_rows, int64_t stride, float* sample, int32_t threads);

/* What a bracket of keys holds, in one read. counts[3 r ...] = number of scores of tensor r with keys above `high`, with keys
 * in [low, high], and of NaN, which are neither; `candidates` takes tensor number * 2^32 + key of each score inside, in any
 * order, unless there are more than `capacity`: then its content is undefined, and the counts are right. */
typedef struct {
  int64_t low, high; /* 0 <= low <= high < 2^32 */
  int64_t capacity;
  int64_t* counts;
  int64_t* candidates;
} ft_bracket;
FT_API int32_t ft_collect_bracket(const ft_scores* rows, int64_t n_rows, const ft_bracket* bracket, int32_t threads);

/* score += (new - score) / count, new being, with F = fisher and F' = shifted (excesses for FT_DR_FIM_VARIATIONAL):
 *   FT_F                   F                                    FT_DELTA_F   |F - F'| / (min(F, F') + eps)
 *   FT_DR_FIM              F + c * delta_f
 *   FT_DR_FIM_VARIATIONAL  gamma * (F + c * |F - F'| / (min(F, F') + prior_precision + eps / gamma))
 * count 1 stores the new score and reads nothing. shifted may be NULL for FT_F. With a bracket, ft_collect_bracket of the new
 * scores comes from the same pass; it may be NULL. */
typedef enum { FT_F = 0, FT_DELTA_F = 1, FT_DR_FIM = 2, FT_DR_FIM_VARIATIONAL = 3 } ft_score_kind;
typedef struct {
  float* score;
  const void* fisher;
  const void* shifted;
  int64_t numel;
  int64_t dtype; /* of fisher and shifted */
} ft_score_row;
FT_API int32_t ft_dr_fim_score(const ft_score_row* rows, int64_t n_rows, int32_t kind, double c, double gamma,
                               double prior_precision, double eps, int64_t count, const ft_bracket* bracket,
                               int32_t threads);

/* Sorted flat indices of the scores above `value` and of the first `ties` equal to it, for each tensor, in one read. `count`
 * of them are expected; selected[r] tells how many there are. A row with another number has undefined content, within its
 * `count`. NaN is never selected. */
typedef struct {
  const void* score;
  int64_t numel;
  int64_t dtype;
  int64_t ties;
  void* index;
  int64_t index_dtype;
  int64_t count; /* entries that `index` has room for */
} ft_compact_row;
FT_API int32_t ft_compact(const ft_compact_row* rows, int64_t n_rows, float value, int64_t* selected, int32_t threads);

/* AdamW with decoupled weight decay (torch.optim.AdamW) on the `count` elements at `index` (sorted, unique) of a dense
 * parameter; the moments, scores and master values are compact, and so is the gradient with `compact_grads`. Where score <
 * active_threshold the moments move and the parameter does not. Elements not in `index` are never read or written.
 * With `stochastic`, bf16 parameters without a master are rounded up in magnitude with the probability that the 16 bits
 * dropped stand for: Philox-4x32-10 with key (seed low, seed high) and counter (g/4 low, g/4 high with its top bit set,
 * step low, step high), the upper half of word g % 4, for the element with global index g = offset + index. Other
 * parameters round to nearest even. */
typedef struct {
  void* param;
  const void* grad;
  const void* index;
  float* exp_avg;
  float* exp_avg_sq;
  const float* score; /* or NULL: every element is active */
  float* master;      /* or NULL: the parameter itself is updated */
  int64_t numel;      /* of param and grad */
  int64_t count;      /* of the compact arrays */
  int64_t param_dtype;
  int64_t grad_dtype;
  int64_t index_dtype;
  int64_t offset; /* global index of the parameter's first element */
} ft_adamw_row;
typedef struct {
  double lr, beta1, beta2, eps, weight_decay, grad_scale, active_threshold;
  int64_t step; /* from 1 */
  int64_t compact_grads, stochastic; /* 0 or 1 */
  uint64_t seed;
} ft_adamw;
FT_API int32_t ft_sparse_adamw(const ft_adamw_row* rows, int64_t n_rows, const ft_adamw* options, int32_t threads);

/* *norm = sqrt of the sum of grad[index]^2 over all rows, added up in fp64: no fp32 value overflows or underflows. */
typedef struct {
  const void* grad;
  const void* index; /* or NULL: every element counts, `count` equals `numel` */
  int64_t numel;     /* of grad */
  int64_t count;
  int64_t grad_dtype;
  int64_t index_dtype;
} ft_norm_row;
FT_API int32_t ft_selected_grad_norm(const ft_norm_row* rows, int64_t n_rows, double* norm, int32_t threads);

/* value[j] = tensor[index[j]] and tensor[index[j]] = value[j], bit patterns of `item_size` 1, 2, 4 or 8 bytes. */
typedef struct {
  void* tensor;
  const void* index;
  void* value;
  int64_t numel; /* of tensor */
  int64_t count;
  int64_t item_size;
  int64_t index_dtype;
} ft_gather_row;
FT_API int32_t ft_gather_values(const ft_gather_row* rows, int64_t n_rows, int32_t threads);
FT_API int32_t ft_scatter_values(const ft_gather_row* rows, int64_t n_rows, int32_t threads);

/* CUDA ----------------------------------------------------------------------------------------------------------------
 * In every build of the library; one compiled without CUDA answers FT_UNAVAILABLE and says why. Work is queued on
 * `stream` (a cudaStream_t of `device`; NULL is the default stream) and nothing here waits for it. Nothing here allocates
 * device memory: results and workspaces are the caller's, and must live until the stream has passed the call. The calling
 * thread's current device is left as it was. */

/* FT_OK where the library has CUDA code and this machine a device that can run it. */
FT_API int32_t ft_cuda_available(void);

/* A list of tensors as the kernels read it, in device memory: mixed dtypes are one launch. ft_cuda_table checks `rows` and
 * fills `table` (host memory, n_rows entries), which the caller copies to the device and may keep for as long as the
 * tensors live; *n_tiles is the work in it. Scores at multiples of 16 bytes are read 16 bytes at a time. */
typedef struct {
  const void* score; /* device memory */
  int64_t numel;
  int64_t dtype;
  int64_t first_tile;
} ft_cuda_row;
FT_API int32_t ft_cuda_table(const ft_scores* rows, int64_t n_rows, ft_cuda_row* table, int64_t* n_tiles);

/* As ft_key_histogram; `histogram` is in device memory and added to. */
FT_API int32_t ft_cuda_key_histogram(const ft_cuda_row* table, int64_t n_rows, int64_t n_tiles, int32_t shift, int32_t bits,
                                     uint32_t prefix_mask, uint32_t prefix, int64_t* histogram, int32_t device,
                                     void* stream);

/* Adds to counts (n_rows, 3): keys above `high`, keys in [low, high], NaN; and to *n_candidates: all keys in [low, high].
 * The first `capacity` found, in no order, go to candidates as (row << 32) | key. All in device memory. */
FT_API int32_t ft_cuda_collect_bracket(const ft_cuda_row* table, int64_t n_rows, int64_t n_tiles, uint32_t low,
                                       uint32_t high, int64_t* counts, int64_t* candidates, int64_t capacity,
                                       int64_t* n_candidates, int32_t device, void* stream);

/* As ft_sample_scores: `sample` takes n_samples values in all, those of tensor r from first_samples[r] on. The runs are the
 * work here, so n_samples stands where the tiles do elsewhere. All in device memory. */
FT_API int32_t ft_cuda_sample_scores(const ft_cuda_row* table, int64_t n_rows, int64_t n_samples,
                                     const int64_t* first_samples, int64_t stride, float* sample, int32_t device,
                                     void* stream);

/* As ft_compact, with an output for each row of the table, in device memory; indices are int32 for tensors of up to 2^31
 * elements and int64 for larger ones. The workspace, at a multiple of 16 bytes, holds a bit per score. */
typedef struct {
  int64_t ties;
  int64_t count;
  void* index;
} ft_cuda_output;
FT_API int64_t ft_cuda_compact_workspace(int64_t n_tiles); /* bytes */
FT_API int32_t ft_cuda_compact(const ft_cuda_row* table, int64_t n_rows, int64_t n_tiles, float value,
                               const ft_cuda_output* outputs, void* workspace, int64_t* selected, int32_t device,
                               void* stream);

#ifdef __cplusplus
}
#endif
#endif
