// Linear assignment on the CPU: the interface of `cpu.cpp` to the code that is compiled once for each instruction set.
#pragma once

#include <stdint.h>

#include "common/levels.h"
#include "common/stored.h"

namespace conddetr::match {

// One matrix of costs, contiguous [objects, queries], with no more objects than queries.
struct Problem {
  const void* cost;
  Stored stored;
  int64_t objects;
  int64_t queries;
};

// Memory of one search, reused for the next. `width` is the number of queries rounded up to `kAlignment`.
struct Workspace {
  double* cost;       // [objects, width], all finite
  double* potential;  // [width] dual variable of a query; -inf while the search has closed it
  double* distance;   // [width] from the new object; inf once closed
  double* taken;      // [width] inf where an object holds the query, else 0
  int64_t* origin;    // [width] the object that a query was reached from
  int64_t* holder;    // [width] the object that holds a query
  int64_t* query_of;  // [objects]
  int64_t* closed;    // [objects] queries, in the order in which they were closed,
  double* closed_at;  // [objects] their distance then,
  double* kept;       // [objects] and their potential before
};

constexpr int64_t kAlignment = 8;

// assignment [queries]: the object that each query gets, -1 for none.
#define CONDDETR_DECLARE(level)                                      \
  namespace level {                                                  \
  void solve(const Problem&, const Workspace&, int64_t* assignment); \
  }
CONDDETR_FOR_EACH_LEVEL(CONDDETR_DECLARE)
#undef CONDDETR_DECLARE

}  // namespace conddetr::match
