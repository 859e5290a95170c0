// The C ABI: argument checks, cutting of work into chunks, threads. Arithmetic is in the range kernels.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

#include "chunks.h"
#include "kernels.h"
#include "status.h"

namespace ft {
namespace {

constexpr int64_t kElementChunk = int64_t{1} << 14;
constexpr int64_t kNoiseChunk = int64_t{1} << 12;
constexpr int64_t kScoreChunk = int64_t{1} << 16;
constexpr int64_t kStepChunk = int64_t{1} << 12;
constexpr int64_t kSampleChunk = int64_t{1} << 10;    // strata
constexpr int64_t kIndexBuffer = 4 * kScoreChunk;     // entries that a thread may hold back while earlier chunks are at work
constexpr int64_t kMaxPending = 64;                   // chunks held back

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

int32_t check_bracket(const ft_bracket* bracket) {
  if (bracket == nullptr || bracket->counts == nullptr || (bracket->capacity > 0 && bracket->candidates == nullptr)) {
    return invalid("the bracket, its counts or its candidates are NULL");
  }
  if (bracket->low < 0 || bracket->high > UINT32_MAX || bracket->low > bracket->high || bracket->capacity < 0) {
    return invalid("bracket from %lld to %lld with room for %lld; expected 0 <= low <= high < 2^32 and room of 0 or more",
                   static_cast<long long>(bracket->low), static_cast<long long>(bracket->high), static_cast<long long>(bracket->capacity));
  }
  return FT_OK;
}

// What lies in a bracket of keys, gathered chunk by chunk: a thread fills its own buffer, then takes as much of the result.
class Collector {
 public:
  Collector(const ft_bracket& bracket, int64_t n_rows, int team, int64_t chunk)
      : bracket_(bracket), n_rows_(n_rows), team_(team), room_(chunk + kSlack), counts_(static_cast<size_t>(team * n_rows * 3)) {
    if (bracket.capacity > 0) keys_.reset(new uint32_t[static_cast<size_t>(team * room_)]);
  }

  void take(const Kernels& k, const Chunk& c, const void* score, int64_t dtype) {
    uint32_t* const keys = taken_.load(std::memory_order_relaxed) < bracket_.capacity ? keys_.get() + c.thread * room_ : nullptr;
    const int64_t found = k.collect_bracket(score, dtype, c.end - c.begin, static_cast<uint32_t>(bracket_.low),
                                            static_cast<uint32_t>(bracket_.high), keys, &counts_[(c.thread * n_rows_ + c.row) * 3]);
    if (keys == nullptr || found == 0) return;
    const int64_t first = taken_.fetch_add(found, std::memory_order_relaxed);
    if (first + found > bracket_.capacity) return;
    for (int64_t i = 0; i < found; ++i) bracket_.candidates[first + i] = c.row << 32 | keys[i];
  }

  void finish() const {
    for (int64_t i = 0; i < 3 * n_rows_; ++i) {
      bracket_.counts[i] = 0;
      for (int64_t t = 0; t < team_; ++t) bracket_.counts[i] += counts_[t * 3 * n_rows_ + i];
    }
  }

 private:
  const ft_bracket& bracket_;
  const int64_t n_rows_, team_, room_;
  std::unique_ptr<uint32_t[]> keys_;
  std::vector<int64_t> counts_;
  std::atomic<int64_t> taken_{0};
};

// Where the indices of each chunk go is known once all earlier chunks of its tensor are counted. Chunks are handed out in
// order and their counts published; a thread holds a chunk's offsets back in its own buffer until it can place them.
class Placement {
 public:
  Placement(const Chunks& chunks, const ft_compact_row* rows, int team)
      : chunks_(chunks), rows_(rows), found_(static_cast<size_t>(chunks.count())),
        offsets_(new uint32_t[static_cast<size_t>(team * (kIndexBuffer + kSlack))]) {}

  // One thread's part of the work.
  void run(const Kernels& k, float value, int thread) {
    uint32_t* const buffer = offsets_.get() + thread * (kIndexBuffer + kSlack);
    Held held[kMaxPending];
    int64_t n_held = 0, used = 0;
    Before before;
    for (;;) {
      if (n_held == kMaxPending || used + kScoreChunk > kIndexBuffer) n_held = used = place(k, value, held, n_held, true, before);
      const int64_t id = next_.fetch_add(1);
      if (id >= chunks_.count()) break;
      const Chunk c = chunks_.find(id, thread);
      const ft_compact_row& row = rows_[c.row];
      int64_t ties = 0;
      const int64_t kept = k.compact(at(row.score, row.dtype, c.begin), row.dtype, c.end - c.begin, value, buffer + used, &ties);
      found_[id].store(kReady | static_cast<uint64_t>(kept - ties) << 32 | static_cast<uint64_t>(ties), std::memory_order_release);
      held[n_held++] = Held{c, buffer + used, kept, ties};
      used += kept;
      n_held = place(k, value, held, n_held, false, before);
      if (n_held == 0) used = 0;
    }
    place(k, value, held, n_held, true, before);
  }

  void totals(int64_t* selected, int64_t n_rows) const {
    for (int64_t r = 0; r < n_rows; ++r) {
      int64_t above = 0, ties = 0;
      for (int64_t id = chunks_.first_of(r); id < chunks_.first_of(r + 1); ++id) {
        above += above_of(found_[id]);
        ties += ties_of(found_[id]);
      }
      selected[r] = above + std::min(ties, rows_[r].ties);
    }
  }

 private:
  static constexpr uint64_t kReady = uint64_t{1} << 63;

  struct Held {
    Chunk chunk;
    uint32_t* offsets;
    int64_t kept, ties;
  };

  // Sums over the chunks of `row` before `id`.
  struct Before {
    int64_t id = 0, row = 0, above = 0, ties = 0;
  };

  static int64_t above_of(uint64_t found) { return static_cast<int64_t>(found >> 32 & 0x7fffffffu); }
  static int64_t ties_of(uint64_t found) { return static_cast<int64_t>(found & 0xffffffffu); }

  // Writes what is held and can be placed, all of it if `wait`; returns how much stays, moved to the front.
  int64_t place(const Kernels& k, float value, Held* held, int64_t n, bool wait, Before& before) {
    int64_t done = 0;
    for (; done < n && advance(before, held[done].chunk, wait); ++done) write(k, value, held[done], before);
    std::move(held + done, held + n, held);
    return n - done;
  }

  bool advance(Before& before, const Chunk& to, bool wait) const {
    if (before.row != to.row) before = Before{chunks_.first_of(to.row), to.row, 0, 0};
    for (; before.id < to.id; ++before.id) {
      uint64_t found = found_[before.id].load(std::memory_order_acquire);
      // Whoever took that chunk counts it without waiting for anyone.
      for (; wait && found == 0; found = found_[before.id].load(std::memory_order_acquire)) std::this_thread::yield();
      if (found == 0) return false;
      before.above += above_of(found);
      before.ties += ties_of(found);
    }
    return true;
  }

  void write(const Kernels& k, float value, const Held& held, const Before& before) const {
    const ft_compact_row& row = rows_[held.chunk.row];
    const int64_t quota = std::max<int64_t>(row.ties - before.ties, 0), begin = held.chunk.begin;
    const int64_t first = before.above + std::min(before.ties, row.ties);
    int64_t kept = held.kept;
    if (held.ties > quota) kept = k.drop_ties(at(row.score, row.dtype, begin), row.dtype, value, quota, kept, held.offsets);
    if (first + kept > row.count) return;  // not the scores of this threshold; `totals` tells
    if (row.index_dtype == FT_INT32) {
      copy(held.offsets, kept, begin, static_cast<int32_t*>(row.index) + first);
    } else {
      copy(held.offsets, kept, begin, static_cast<int64_t*>(row.index) + first);
    }
  }

  template <class Index>
  static void copy(const uint32_t* offsets, int64_t n, int64_t base, Index* index) {
    for (int64_t i = 0; i < n; ++i) index[i] = static_cast<Index>(base + offsets[i]);
  }

  const Chunks& chunks_;
  const ft_compact_row* const rows_;
  std::atomic<int64_t> next_{0};
  std::vector<std::atomic<uint64_t>> found_;  // per chunk: ready, above (31 bits), equal
  std::unique_ptr<uint32_t[]> offsets_;
};

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

int32_t ft_per_sample_affine(const ft_affine_row* rows, int64_t n_rows, double weight, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    int64_t channels = 0, elements = 0;
    for (int64_t r = 0; r < n_rows; ++r) {
      const ft_affine_row& row = rows[r];
      if (row.samples < 0 || row.tokens < 0 || row.channels < 0) {
        return invalid("row %lld: %lld samples, %lld tokens, %lld channels; expected 0 or more", static_cast<long long>(r),
                       static_cast<long long>(row.samples), static_cast<long long>(row.tokens),
                       static_cast<long long>(row.channels));
      }
      const int64_t numel = row.samples * row.tokens * row.channels;
      FT_TRY(check_row(r, numel, row.dy_dtype, {row.dy}));
      if (row.weight_accumulator != nullptr) FT_TRY(check_row(r, numel, row.x_dtype, {row.x}));
      if ((row.mean == nullptr) != (row.rstd == nullptr)) {
        return invalid("row %lld: one of mean and rstd is NULL; expected both or none", static_cast<long long>(r));
      }
      channels += row.channels;
      elements += numel;
    }
    const Kernels& k = *current();
    // Every channel is summed by one thread, in one order; how they are cut changes no bit. Whole cache lines go together.
    const int64_t share = (channels / thread_count(threads) + 63) / 64 * 64;
    const int64_t chunk = std::min(std::max<int64_t>(share, 64), kAffineChannels);
    const Chunks chunks(n_rows, chunk, [=](int64_t r) { return rows[r].channels; });
    chunks.run(elements < (int64_t{1} << 15) ? 1 : chunks.team(threads, 0), [&](const Chunk& c) {
      k.per_sample_affine(rows[c.row], c.begin, c.end - c.begin, static_cast<float>(weight));
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
                        double eps, int64_t count, const ft_bracket* bracket, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    if (bracket != nullptr) FT_TRY(check_bracket(bracket));
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
    const int team = chunks.team(threads);
    std::unique_ptr<Collector> collector(bracket == nullptr ? nullptr : new Collector(*bracket, n_rows, team, kElementChunk));
    chunks.run(team, [&](const Chunk& chunk) {
      const ft_score_row& row = rows[chunk.row];
      const void* shifted = kind == FT_F ? row.fisher : row.shifted;
      k.dr_fim_score(row.score + chunk.begin, at(row.fisher, row.dtype, chunk.begin), at(shifted, row.dtype, chunk.begin),
                     row.dtype, chunk.end - chunk.begin, constants);
      if (collector != nullptr) collector->take(k, chunk, row.score + chunk.begin, FT_FP32);  // still in the cache
    });
    if (collector != nullptr) collector->finish();
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

int32_t ft_sample_scores(const ft_scores* rows, int64_t n_rows, int64_t stride, float* sample, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    if (stride < 1 || stride > INT32_MAX) return invalid("stride is %lld; expected 1 to 2^31 - 1", static_cast<long long>(stride));
    for (int64_t r = 0; r < n_rows; ++r) FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].score}));
    const auto strata = [=](int64_t r) { return (rows[r].numel + stride - 1) / stride; };
    std::vector<int64_t> first(static_cast<size_t>(n_rows) + 1);
    for (int64_t r = 0; r < n_rows; ++r) first[r + 1] = first[r] + strata(r);
    if (first[n_rows] > 0 && sample == nullptr) return invalid("sample is NULL");
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kSampleChunk, strata);
    chunks.run(chunks.team(threads), [&](const Chunk& c) {
      const ft_scores& row = rows[c.row];
      const int64_t begin = c.begin * stride, number = first[c.row] + c.begin;
      k.sample_scores(at(row.score, row.dtype, begin), row.dtype, row.numel - begin, stride, number, c.end - c.begin, sample + number);
    });
    return FT_OK;
  });
}

int32_t ft_collect_bracket(const ft_scores* rows, int64_t n_rows, const ft_bracket* bracket, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    FT_TRY(check_bracket(bracket));
    for (int64_t r = 0; r < n_rows; ++r) FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].score}));
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kScoreChunk, [=](int64_t r) { return rows[r].numel; });
    const int team = chunks.team(threads);
    Collector collector(*bracket, n_rows, team, kScoreChunk);
    chunks.run(team, [&](const Chunk& c) {
      const ft_scores& row = rows[c.row];
      collector.take(k, c, at(row.score, row.dtype, c.begin), row.dtype);
    });
    collector.finish();
    return FT_OK;
  });
}

int32_t ft_compact(const ft_compact_row* rows, int64_t n_rows, float value, int64_t* selected, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    if (std::isnan(value)) return invalid("the threshold is NaN");
    if (n_rows > 0 && selected == nullptr) return invalid("selected is NULL");
    for (int64_t r = 0; r < n_rows; ++r) {
      FT_TRY(check_row(r, rows[r].numel, rows[r].dtype, {rows[r].score}));
      if (!is_index_dtype(rows[r].index_dtype) || (rows[r].index_dtype == FT_INT32 && rows[r].numel > INT64_C(0x80000000))) {
        return invalid("row %lld: index dtype code %lld for %lld elements; expected 0 (int32, up to 2^31 elements) or 1 (int64)",
                       static_cast<long long>(r), static_cast<long long>(rows[r].index_dtype), static_cast<long long>(rows[r].numel));
      }
      if (rows[r].count < 0 || rows[r].ties < 0 || (rows[r].count > 0 && rows[r].index == nullptr)) {
        return invalid("row %lld: room for %lld indices at %p, %lld ties; expected 0 or more, and memory to write them to",
                       static_cast<long long>(r), static_cast<long long>(rows[r].count), rows[r].index, static_cast<long long>(rows[r].ties));
      }
    }
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kScoreChunk, [=](int64_t r) { return rows[r].numel; });
    const int team = chunks.team(threads);
    Placement placement(chunks, rows, team);
    Chunks::in_parallel(team, [&](int64_t thread, int64_t) { placement.run(k, value, static_cast<int>(thread)); });
    placement.totals(selected, n_rows);
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
        options->compact_grads != 0,
        options->stochastic != 0,
        options->seed,
        static_cast<uint64_t>(options->step),
    };
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kStepChunk, [=](int64_t r) { return rows[r].count; });
    chunks.run(chunks.team(threads, 2 * kStepChunk), [&](const Chunk& c) { k.sparse_adamw(rows[c.row], c.begin, c.end, constants); });
    return FT_OK;
  });
}

int32_t ft_selected_grad_norm(const ft_norm_row* rows, int64_t n_rows, double* norm, int32_t threads) {
  return guarded([&]() -> int32_t {
    FT_TRY(check_list(rows, n_rows));
    if (norm == nullptr) return invalid("norm is NULL");
    for (int64_t r = 0; r < n_rows; ++r) {
      const ft_norm_row& row = rows[r];
      if (row.index != nullptr || row.count != row.numel) FT_TRY(check_index(r, row.index, row.index_dtype, row.count, row.numel));
      FT_TRY(check_row(r, row.count, row.grad_dtype, {row.grad}));
    }
    const Kernels& k = *current();
    const Chunks chunks(n_rows, kStepChunk, [=](int64_t r) { return rows[r].count; });
    // One sum per chunk, added in the chunks' order: the same bits on any number of threads.
    std::vector<double> sums(static_cast<size_t>(chunks.count()));
    chunks.run(chunks.team(threads, 2 * kStepChunk), [&](const Chunk& c) { sums[c.id] = k.selected_squares(rows[c.row], c.begin, c.end); });
    double total = 0.0;
    for (const double sum : sums) total += sum;
    *norm = std::sqrt(total);
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
