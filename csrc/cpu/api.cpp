// The C ABI: argument checks, cutting of work into chunks, threads. Arithmetic is in the range kernels.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "chunks.h"
#include "kernels.h"
#include "status.h"

namespace ft {
namespace {

constexpr int64_t kElementChunk = int64_t{1} << 14;
constexpr int64_t kNoiseChunk = int64_t{1} << 12;
constexpr int64_t kScoreChunk = int64_t{1} << 16;
constexpr int64_t kStepChunk = int64_t{1} << 12;
constexpr int64_t kPlanHead = 3;
constexpr int64_t kPlan = kPlanHead + kScoreChunk / 64;

// Nothing may leave the library as a C++ exception. Kernels do not allocate, so only set-up can fail, before any write.
template <class Body>
int32_t guarded(Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return failed(FT_OUT_OF_MEMORY, "out of memory for working space");
  }
}

bool supported(const Kernels* table) {
  if (table == nullptr) return false;
#if defined(__x86_64__) && defined(__GNUC__)
  if (table == kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw");
  }
  if (table == kAvx2) return __builtin_cpu_supports("avx2");
#endif
  return table == kPortable;
}

const Kernels* named(const char* name) {
  for (const Kernels* table : {kAvx512, kAvx2, kPortable}) {
    if (supported(table) && std::strcmp(table->name, name) == 0) return table;
  }
  return nullptr;
}

const Kernels* choose() {
  const char* wanted = std::getenv("FISHERTUNE_NATIVE_ISA");
  if (wanted != nullptr && named(wanted) != nullptr) return named(wanted);
  for (const Kernels* table : {kAvx512, kAvx2}) {
    if (supported(table)) return table;
  }
  return kPortable;
}

const Kernels*& current() {
  static const Kernels* table = choose();
  return table;
}

bool is_dtype(int64_t code) { return code == FT_FP32 || code == FT_BF16 || code == FT_FP16; }
bool is_index_dtype(int64_t code) { return code == FT_INT32 || code == FT_INT64; }

const void* at(const void* data, int64_t dtype, int64_t i) {
  return static_cast<const char*>(data) + i * (dtype == FT_FP32 ? 4 : 2);
}

void* at(void* data, int64_t dtype, int64_t i) { return static_cast<char*>(data) + i * (dtype == FT_FP32 ? 4 : 2); }

template <class Row>
int32_t check_list(const Row* rows, int64_t n_rows) {
  if (n_rows < 0) return invalid("n_rows is %lld; expected 0 or more", static_cast<long long>(n_rows));
  if (n_rows > 0 && rows == nullptr) return invalid("rows is NULL with n_rows %lld", static_cast<long long>(n_rows));
  return FT_OK;
}

// Checks one row's size and dtype, and the pointers that a row with elements must have.
int32_t check_row(int64_t row, int64_t numel, int64_t dtype, std::initializer_list<const void*> pointers) {
  if (numel < 0) return invalid("row %lld: numel is %lld; expected 0 or more", static_cast<long long>(row), static_cast<long long>(numel));
  if (!is_dtype(dtype)) {
    return invalid("row %lld: dtype code %lld; expected 0 (fp32), 1 (bf16) or 2 (fp16)", static_cast<long long>(row),
                   static_cast<long long>(dtype));
  }
  if (numel > 0) {
    for (const void* p : pointers) {
      if (p == nullptr) return invalid("row %lld: a tensor of %lld elements is NULL", static_cast<long long>(row), static_cast<long long>(numel));
    }
  }
  return FT_OK;
}

int64_t index_at(const void* index, int64_t dtype, int64_t i) {
  return dtype == FT_INT32 ? static_cast<const int32_t*>(index)[i] : static_cast<const int64_t*>(index)[i];
}

int32_t check_index(int64_t row, const void* index, int64_t dtype, int64_t count, int64_t numel) {
  const long long r = row, n = numel;
  if (!is_index_dtype(dtype)) return invalid("row %lld: index dtype code %lld; expected 0 (int32) or 1 (int64)", r, static_cast<long long>(dtype));
  if (count < 0 || count > numel) return invalid("row %lld: %lld indices for a tensor of %lld elements", r, static_cast<long long>(count), n);
  if (count == 0) return FT_OK;
  if (index == nullptr) return invalid("row %lld: index is NULL with %lld entries", r, static_cast<long long>(count));
  // Sorted, so the ends bound the rest.
  const long long low = index_at(index, dtype, 0), high = index_at(index, dtype, count - 1);
  if (low < 0 || high >= numel || low > high) {
    return invalid("row %lld: indices run from %lld to %lld in a tensor of %lld elements; expected sorted flat indices inside it", r, low, high, n);
  }
  return FT_OK;
}

}  // namespace
}  // namespace ft

using namespace ft;

extern "C" {

const char* ft_isa(void) { return current()->name; }

int32_t ft_set_isa(const char* name) {
  const Kernels* table = name == nullptr ? nullptr : named(name);
  if (table == nullptr) {
    return invalid("instruction set %s is not in this build or not on this machine; expected avx512, avx2 or portable",
                   name == nullptr ? "NULL" : name);
  }
  current() = table;
  return FT_OK;
}

int32_t ft_squared_grad_accumulate(const ft_square_row* rows, int64_t n_rows, double weight, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    for (int64_t r = 0; r < n_rows; ++r) FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].accumulator, rows[r].grad}));
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kElementChunk, [=](int64_t r) { return rows[r].numel; });
    chunks.run(chunks.team(threads), [&](const Chunk& c) {
      const ft_square_row& row = rows[c.row];
      k.squared_grad_accumulate(row.accumulator + c.begin,
                                at(row.grad, row.dtype, c.begin), row.dtype,
                                c.end - c.begin, static_cast<float>(weight));
    });
    return FT_OK;
  });
}

int32_t ft_gaussian_perturb(const ft_perturb_row* rows, int64_t n_rows, double prior_precision, uint64_t seed, uint64_t step,
                            double sign, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    for (int64_t r = 0; r < n_rows; ++r) {
      FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].param, rows[r].excess, rows[r].out}));
    }
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kNoiseChunk, [=](int64_t r) { return rows[r].numel; });
    chunks.run(chunks.team(threads, 2 * kNoiseChunk), [&](const Chunk& c) {
      const ft_perturb_row& row = rows[c.row];
      k.gaussian_perturb(at(row.param, row.dtype, c.begin), row.excess + c.begin, at(row.out, row.dtype, c.begin), row.dtype,
                         c.end - c.begin, static_cast<float>(prior_precision), static_cast<float>(sign), seed, step,
                         static_cast<uint64_t>(row.offset + c.begin));
    });
    return FT_OK;
  });
}

int32_t ft_precision_update_natural(const ft_natural_row* rows, int64_t n_rows, double beta, double gamma, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    for (int64_t r = 0; r < n_rows; ++r) FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].excess, rows[r].squared_grad}));
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kElementChunk, [=](int64_t r) { return rows[r].numel; });
    chunks.run(chunks.team(threads), [&](const Chunk& c) {
      const ft_natural_row& row = rows[c.row];
      k.precision_update_natural(row.excess + c.begin,
                                 at(row.squared_grad, row.dtype, c.begin), row.dtype,
                                 c.end - c.begin, static_cast<float>(1.0 - beta), static_cast<float>(beta / gamma));
    });
    return FT_OK;
  });
}

int32_t ft_precision_update_sgvb(const ft_sgvb_row* rows, int64_t n_rows, const ft_sgvb* options, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    for (int64_t r = 0; r < n_rows; ++r) {
      FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].excess, rows[r].grad, rows[r].exp_avg, rows[r].exp_avg_sq}));
    }
    if (options->step < 1) return invalid("step is %lld; Adam steps count from 1", static_cast<long long>(options->step));
    const double step = static_cast<double>(options->step);
    const SgvbConstants constants = {
        static_cast<float>(options->prior_precision),
        static_cast<float>(0.5 * options->sign),
        static_cast<float>(0.5 * options->gamma),
        static_cast<float>(options->beta1),
        static_cast<float>(1.0 - options->beta1),
        static_cast<float>(options->beta2),
        static_cast<float>(1.0 - options->beta2),
        static_cast<float>(options->lr / (1.0 - std::pow(options->beta1, step))),
        static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(options->beta2, step))),
        static_cast<float>(options->eps),
        // The sum with prior_precision must stay positive after rounding.
        static_cast<float>(-options->prior_precision * (1.0 - 0x1p-23)),
        options->seed,
        options->noise_step,
    };
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kNoiseChunk, [=](int64_t r) { return rows[r].numel; });
    chunks.run(chunks.team(threads, 2 * kNoiseChunk), [&](const Chunk& c) {
      const ft_sgvb_row& row = rows[c.row];
      k.precision_update_sgvb(row.excess + c.begin, at(row.grad, row.dtype, c.begin),
                              row.exp_avg + c.begin, row.exp_avg_sq + c.begin, row.dtype, c.end - c.begin, constants,
                              static_cast<uint64_t>(row.offset + c.begin));
    });
    return FT_OK;
  });
}

int32_t ft_dr_fim_score(const ft_score_row* rows, int64_t n_rows, int32_t kind, double c, double gamma, double prior_precision,
                        double eps, int64_t count, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    if (kind < FT_F || kind > FT_DR_FIM_VARIATIONAL) return invalid("score kind %d; expected 0 to 3", static_cast<int>(kind));
    if (count < 1) return invalid("count is %lld; the first score has count 1", static_cast<long long>(count));
    for (int64_t r = 0; r < n_rows; ++r) {
      const void* shifted = kind == FT_F ? rows[r].fisher : rows[r].shifted;
      FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].score, rows[r].fisher, shifted}));
    }
    ScoreConstants constants = {};
    const bool variational = kind == FT_DR_FIM_VARIATIONAL;
    constants.fisher_scale = kind == FT_DELTA_F ? 0.0f : static_cast<float>(variational ? gamma : 1.0);
    constants.ratio_scale = kind == FT_F ? 0.0f : static_cast<float>(kind == FT_DELTA_F ? 1.0 : variational ? gamma * c : c);
    constants.damping = static_cast<float>(variational ? prior_precision + eps / gamma : eps);
    constants.inv_count = static_cast<float>(1.0 / static_cast<double>(count));
    constants.first = count == 1;
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kElementChunk, [=](int64_t r) { return rows[r].numel; });
    chunks.run(chunks.team(threads), [&](const Chunk& chunk) {
      const ft_score_row& row = rows[chunk.row];
      const void* shifted = kind == FT_F ? row.fisher : row.shifted;
      k.dr_fim_score(row.score + chunk.begin, at(row.fisher, row.dtype, chunk.begin), at(shifted, row.dtype, chunk.begin),
                     row.dtype, chunk.end - chunk.begin, constants);
    });
    return FT_OK;
  });
}

int32_t ft_key_histogram(const ft_scores* rows, int64_t n_rows, int32_t shift, int32_t bits, uint32_t prefix_mask,
                         uint32_t prefix, int64_t* histogram, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    if (bits < 1 || bits > 16 || shift < 0 || shift > 31) {
      return invalid("shift %d, bits %d; expected 0 <= shift < 32 and 1 <= bits <= 16", static_cast<int>(shift), static_cast<int>(bits));
    }
    if (histogram == nullptr) return invalid("histogram is NULL");
    for (int64_t r = 0; r < n_rows; ++r) FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].score}));
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kScoreChunk, [=](int64_t r) { return rows[r].numel; });
    const int team = chunks.team(threads);
    const int64_t bins = (int64_t{1} << bits) + 1, stride = (bins + 15) / 16 * 16;
    std::vector<uint32_t> counters(static_cast<size_t>(team * kReplicas * stride));
    std::vector<int64_t> totals(static_cast<size_t>(team * bins)), pending(static_cast<size_t>(team));
    const auto flush = [&](int64_t thread) {
      uint32_t* counter = counters.data() + thread * kReplicas * stride;
      for (int64_t b = 0; b < bins; ++b) {
        for (int replica = 0; replica < kReplicas; ++replica) totals[thread * bins + b] += counter[replica * stride + b];
      }
      std::memset(counter, 0, static_cast<size_t>(kReplicas * stride) * sizeof *counter);
      pending[thread] = 0;
    };
    chunks.run(team, [&](const Chunk& c) {
      const ft_scores& row = rows[c.row];
      const int64_t n = c.end - c.begin;
      if (pending[c.thread] + n > INT32_MAX) flush(c.thread);  // before a 32-bit counter can wrap
      k.key_histogram(at(row.score, row.dtype, c.begin), row.dtype, n, shift, bits,
                      prefix_mask, prefix, counters.data() + c.thread * kReplicas * stride, stride);
      pending[c.thread] += n;
    });
    for (int64_t t = 0; t < team; ++t) {
      flush(t);
      for (int64_t b = 0; b < bins; ++b) histogram[b] += totals[t * bins + b];
    }
    return FT_OK;
  });
}

// The plan holds, per chunk: how many indices precede the chunk's in its tensor, how many ties it has, how many of them it
// keeps, and its marks.
int64_t ft_compact_plan_size(const ft_compact_row* rows, int64_t n_rows) {
  int64_t chunks = 0;
  for (int64_t r = 0; r < n_rows; ++r) chunks += (rows[r].numel + kScoreChunk - 1) / kScoreChunk;
  return chunks * kPlan;
}

int32_t ft_compact_count(const ft_compact_row* rows, int64_t n_rows, float value, int64_t* plan, int64_t* counts,
                         int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    if (std::isnan(value)) return invalid("the threshold is NaN");
    for (int64_t r = 0; r < n_rows; ++r) FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].score}));
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kScoreChunk, [=](int64_t r) { return rows[r].numel; });
    chunks.run(chunks.team(threads), [&](const Chunk& c) {
      const ft_compact_row& row = rows[c.row];
      int64_t* const p = plan + kPlan * c.id;
      k.mark_selected(at(row.score, row.dtype, c.begin), row.dtype, c.end - c.begin, value,
                      reinterpret_cast<uint64_t*>(p + kPlanHead), &p[0], &p[1]);
    });
    for (int64_t r = 0; r < n_rows; ++r) {
      int64_t before = 0, ties = rows[r].ties;
      for (int64_t id = chunks.first_of(r); id < chunks.first_of(r + 1); ++id) {
        int64_t* const p = plan + kPlan * id;
        p[2] = std::min(ties, p[1]);
        const int64_t selected = p[0] + p[2];
        p[0] = before;
        before += selected;
        ties -= p[2];
      }
      counts[r] = before;
    }
    return FT_OK;
  });
}

int32_t ft_compact_write(const ft_compact_row* rows, int64_t n_rows, float value, int64_t* plan, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    for (int64_t r = 0; r < n_rows; ++r) {
      FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].score}));
      if (!is_index_dtype(rows[r].index_dtype) || (rows[r].index_dtype == FT_INT32 && rows[r].numel > INT64_C(0x80000000))) {
        return invalid("row %lld: index dtype code %lld for %lld elements; expected 0 (int32, up to 2^31 elements) or 1 (int64)",
                       static_cast<long long>(r), static_cast<long long>(rows[r].index_dtype), static_cast<long long>(rows[r].numel));
      }
    }
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kScoreChunk, [=](int64_t r) { return rows[r].numel; });
    chunks.run(chunks.team(threads), [&](const Chunk& c) {
      const ft_compact_row& row = rows[c.row];
      int64_t* const p = plan + kPlan * c.id;
      uint64_t* const marks = reinterpret_cast<uint64_t*>(p + kPlanHead);
      if (p[2] < p[1]) k.unmark_ties(at(row.score, row.dtype, c.begin), row.dtype, c.end - c.begin, value, p[2], marks);
      k.write_marked(marks, c.end - c.begin, c.begin, static_cast<char*>(row.index) + p[0] * (row.index_dtype == FT_INT32 ? 4 : 8),
                     row.index_dtype);
    });
    return FT_OK;
  });
}

int32_t ft_sparse_adamw(const ft_adamw_row* rows, int64_t n_rows, const ft_adamw* options, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    for (int64_t r = 0; r < n_rows; ++r) {
      const ft_adamw_row& row = rows[r];
      FT_TRY(check_index(r, row.index, row.index_dtype, row.count, row.numel));
      FT_TRY(check_row(r, row.count, row.param_dtype, {row.param, row.grad, row.exp_avg, row.exp_avg_sq}));
      FT_TRY(check_row(r, row.count, row.grad_dtype, {}));
    }
    if (options->step < 1) return invalid("step is %lld; AdamW steps count from 1", static_cast<long long>(options->step));
    const double step = static_cast<double>(options->step);
    const AdamWConstants constants = {
        static_cast<float>(options->beta1),
        static_cast<float>(1.0 - options->beta1),
        static_cast<float>(options->beta2),
        static_cast<float>(1.0 - options->beta2),
        static_cast<float>(1.0 - options->lr * options->weight_decay),
        static_cast<float>(options->lr / (1.0 - std::pow(options->beta1, step))),
        static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(options->beta2, step))),
        static_cast<float>(options->eps),
        static_cast<float>(options->grad_scale),
        static_cast<float>(options->active_threshold),
    };
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kStepChunk, [=](int64_t r) { return rows[r].count; });
    chunks.run(chunks.team(threads, 2 * kStepChunk), [&](const Chunk& c) { k.sparse_adamw(rows[c.row], c.begin, c.end, constants); });
    return FT_OK;
  });
}

}  // extern "C"

namespace ft {
namespace {

constexpr int64_t kPrefetch = 32;

// A template argument as the copy's direction keeps the loop free of a branch.
template <bool Gather, class Item, class Index>
void move_range(const ft_gather_row& row, int64_t begin, int64_t end) {
  Item* const tensor = static_cast<Item*>(row.tensor);
  Item* const value = static_cast<Item*>(row.value);
  const Index* const index = static_cast<const Index*>(row.index);
  for (int64_t i = begin; i < end; ++i) {
#if defined(__GNUC__)
    if (i + kPrefetch < row.count) __builtin_prefetch(tensor + index[i + kPrefetch], Gather ? 0 : 1, 3);
#endif
    if constexpr (Gather) {
      value[i] = tensor[index[i]];
    } else {
      tensor[index[i]] = value[i];
    }
  }
}

template <bool Gather, class Item>
void move_index(const ft_gather_row& row, int64_t begin, int64_t end) {
  if (row.index_dtype == FT_INT32) {
    move_range<Gather, Item, int32_t>(row, begin, end);
  } else {
    move_range<Gather, Item, int64_t>(row, begin, end);
  }
}

template <bool Gather>
int32_t move_values(const ft_gather_row* rows, int64_t n_rows, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    for (int64_t r = 0; r < n_rows; ++r) {
      const ft_gather_row& row = rows[r];
      FT_TRY(check_index(r, row.index, row.index_dtype, row.count, row.numel));
      FT_TRY(check_row(r, row.count, FT_FP32, {row.tensor, row.value}));
      if (row.item_size != 1 && row.item_size != 2 && row.item_size != 4 && row.item_size != 8) {
        return invalid("row %lld: item size %lld; expected 1, 2, 4 or 8", static_cast<long long>(r), static_cast<long long>(row.item_size));
      }
    }
    const Chunks chunks(n_rows, kElementChunk, [=](int64_t r) { return rows[r].count; });
    chunks.run(chunks.team(threads), [&](const Chunk& c) {
      const ft_gather_row& row = rows[c.row];
      switch (row.item_size) {
        case 1: return move_index<Gather, uint8_t>(row, c.begin, c.end);
        case 2: return move_index<Gather, uint16_t>(row, c.begin, c.end);
        case 4: return move_index<Gather, uint32_t>(row, c.begin, c.end);
        default: return move_index<Gather, uint64_t>(row, c.begin, c.end);
      }
    });
    return FT_OK;
  });
}

}  // namespace
}  // namespace ft

extern "C" {

int32_t ft_gather_values(const ft_gather_row* rows, int64_t n_rows, int32_t threads) { return move_values<true>(rows, n_rows, threads); }

int32_t ft_scatter_values(const ft_gather_row* rows, int64_t n_rows, int32_t threads) {
  return move_values<false>(rows, n_rows, threads);
}

}  // extern "C"
