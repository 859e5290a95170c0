// Work over a list of tensors, cut into chunks and dealt to threads in contiguous runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ft {

inline int thread_count(int32_t wanted) {
#if defined(_OPENMP)
  return wanted > 0 ? wanted : omp_get_max_threads();
#else
  (void)wanted;
  return 1;
#endif
}

struct Chunk {
  int64_t row, begin, end;
  int64_t id;  // counts through all rows
  int thread;
};

class Chunks {
 public:
  template <class Size>
  Chunks(int64_t n_rows, int64_t chunk, Size size_of) : chunk_(chunk), first_(static_cast<size_t>(n_rows) + 1), sizes_(static_cast<size_t>(n_rows)) {
    for (int64_t r = 0; r < n_rows; ++r) {
      sizes_[r] = size_of(r);
      first_[r + 1] = first_[r] + (sizes_[r] + chunk - 1) / chunk;
      elements_ += sizes_[r];
    }
  }

  int64_t count() const { return first_.back(); }
  int64_t first_of(int64_t row) const { return first_[row]; }

  // Starting a team costs microseconds: small work stays on the calling thread.
  int team(int32_t wanted, int64_t worth = int64_t{1} << 15) const {
    return elements_ < worth ? 1 : static_cast<int>(std::min<int64_t>(thread_count(wanted), std::max<int64_t>(count(), 1)));
  }

  // body(const Chunk&) must not throw.
  template <class Body>
  void run(int team, Body body) const {
    const int64_t total = count();
    in_parallel(team, [&](int64_t t, int64_t threads) {
      walk(total * t / threads, total * (t + 1) / threads, static_cast<int>(t), body);
    });
  }

  // body(thread, number of threads), once on each thread of the team.
  template <class Body>
  static void in_parallel(int team, Body body) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(team) if (team > 1)
    body(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
#else
    (void)team;
    body(int64_t{0}, int64_t{1});
#endif
  }

  Chunk find(int64_t id, int thread) const {
    const int64_t row = std::upper_bound(first_.begin(), first_.end(), id) - first_.begin() - 1;
    const int64_t begin = (id - first_[row]) * chunk_;
    return Chunk{row, begin, std::min(begin + chunk_, sizes_[row]), id, thread};
  }

 private:
  template <class Body>
  void walk(int64_t from, int64_t to, int thread, Body& body) const {
    if (from == to) return;
    int64_t row = std::upper_bound(first_.begin(), first_.end(), from) - first_.begin() - 1;
    for (int64_t id = from; id < to; ++id) {
      while (id >= first_[row + 1]) ++row;
      const int64_t begin = (id - first_[row]) * chunk_;
      body(Chunk{row, begin, std::min(begin + chunk_, sizes_[row]), id, thread});
    }
  }

  int64_t chunk_;
  std::vector<int64_t> first_, sizes_;
  int64_t elements_ = 0;
};

}  // namespace ft
