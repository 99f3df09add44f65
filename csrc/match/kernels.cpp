// Linear assignment by shortest augmenting paths (Crouse 2016), vectorised over queries. Compiled once for each
// instruction set.
//
// Objects are added one by one; for each, a Dijkstra search over the queries finds the cheapest way to make room. Only
// the dual variables of the queries are kept: an object in the tree was reached through the query that it held, where
// its reduced cost is zero, and this gives the object's dual variable.

#include "match/kernels.h"

#include "common/simd.h"

namespace conddetr::match::CONDDETR_LEVEL {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr int64_t kStep = kLanes<double>;

inline int64_t width_of(int64_t queries) { return (queries + kAlignment - 1) / kAlignment * kAlignment; }

inline bool is_finite(double value) { return __builtin_fabs(value) < kInfinity; }

// Copies rows as float64. NaN and infinity become more than the span of all sums of finite costs, -inf its negative.
template <typename T>
void copy_costs(const Problem& p, double* out) {
  const T* cost = static_cast<const T*>(p.cost);
  const int64_t width = width_of(p.queries);
  bool all_finite = true;
  double largest = 0;
  for (int64_t row = 0; row < p.objects; ++row) {
    double* to = out + row * width;
    for (int64_t q = 0; q < width; ++q) to[q] = 0;
    for (int64_t q = 0; q < p.queries; ++q) to[q] = double(load(cost[row * p.queries + q]));
    for (int64_t q = 0; q < p.queries; ++q) all_finite &= is_finite(to[q]);
  }
  if (all_finite) return;
  for (int64_t i = 0; i < p.objects * width; ++i) {
    if (is_finite(out[i]) && __builtin_fabs(out[i]) > largest) largest = __builtin_fabs(out[i]);
  }
  const double worst = 2.0 * double(p.objects + 1) * (largest > 0 ? largest : 1.0);
  for (int64_t i = 0; i < p.objects * width; ++i) {
    if (!is_finite(out[i])) out[i] = out[i] == -kInfinity ? -worst : worst;
  }
}

// The least of several values and its index; the first of equal ones.
struct Least {
  Vector<double> value = broadcast(kInfinity);
  Integers<double> index = {};

  CONDDETR_INLINE void take(Least& least, Vector<double> value, Integers<double> index) {
    const auto is_less = value < least.value;
    least.value = is_less ? value : least.value;
    least.index = is_less ? index : least.index;
  }

  int64_t among_lanes(double& lowest) const {
    int64_t result = index[0];
    lowest = value[0];
    for (int64_t lane = 1; lane < kStep; ++lane) {
      if (value[lane] < lowest || (value[lane] == lowest && index[lane] < result)) {
        lowest = value[lane];
        result = index[lane];
      }
    }
    return result;
  }
};

// Updates distances with those through `object`, whose distance is `offset`; finds the nearest of all queries, and of
// the free ones.
CONDDETR_INLINE void relax(const Workspace& w, int64_t width, int64_t object, double offset, Least& any, Least& free) {
  const double* cost = w.cost + object * width;
  Integers<double> index;
  for (int64_t lane = 0; lane < kStep; ++lane) index[lane] = lane;
  for (int64_t q = 0; q < width; q += kStep) {
    const Vector<double> through = load_vector(cost + q) - load_vector(w.potential + q) + offset;
    const Vector<double> before = load_vector(w.distance + q);
    const auto is_nearer = through < before;
    const Vector<double> distance = is_nearer ? through : before;
    store_vector(w.distance + q, distance);
    Integers<double> origin;
    memcpy(&origin, w.origin + q, sizeof origin);
    origin = is_nearer ? object - Integers<double>{} : origin;
    memcpy(w.origin + q, &origin, sizeof origin);
    Least::take(any, distance, index);
    Least::take(free, distance + load_vector(w.taken + q), index);
    index += kStep;
  }
}

// If sums of costs overflow, no query has a distance; any free one is then equally good.
int64_t first_free(const Workspace& w) {
  int64_t query = 0;
  while (w.taken[query] != 0) ++query;
  return query;
}

// Gives `object` a query; those that have one may have to move.
void add(const Workspace& w, int64_t width, int64_t object) {
  for (int64_t q = 0; q < width; ++q) w.distance[q] = kInfinity;
  for (int64_t q = 0; q < width; ++q) w.origin[q] = object;
  int64_t through = object, count = 0, query;
  double offset = 0, nearest;
  while (true) {
    Least any, free;
    relax(w, width, through, offset, any, free);
    double nearest_free;
    const int64_t free_query = free.among_lanes(nearest_free);
    query = any.among_lanes(nearest);
    // Of equally near queries a free one ends the search.
    if (nearest_free <= nearest) {
      query = nearest_free < kInfinity ? free_query : first_free(w);
      break;
    }
    w.closed[count] = query;
    w.closed_at[count] = nearest;
    w.kept[count++] = w.potential[query];
    through = w.holder[query];
    offset = nearest - (w.cost[through * width + query] - w.potential[query]);
    w.potential[query] = -kInfinity;
    w.distance[query] = kInfinity;
  }
  for (int64_t i = 0; i < count; ++i) w.potential[w.closed[i]] = w.kept[i] + w.closed_at[i] - nearest;
  // Back along the path: every object on it moves to the query that it was reached from.
  w.taken[query] = kInfinity;
  while (true) {
    const int64_t mover = w.origin[query], next = w.query_of[mover];
    w.holder[query] = mover;
    w.query_of[mover] = query;
    if (mover == object) return;
    query = next;
  }
}

}  // namespace

void solve(const Problem& p, const Workspace& w, int64_t* assignment) {
  CONDDETR_FOR_STORED(p.stored, copy_costs, p, w.cost);
  const int64_t width = width_of(p.queries);
  // Padding past the last query is closed from the start.
  for (int64_t q = 0; q < width; ++q) w.potential[q] = q < p.queries ? 0 : -kInfinity;
  for (int64_t q = 0; q < width; ++q) w.taken[q] = q < p.queries ? 0 : kInfinity;
  for (int64_t object = 0; object < p.objects; ++object) add(w, width, object);
  for (int64_t q = 0; q < p.queries; ++q) assignment[q] = -1;
  for (int64_t object = 0; object < p.objects; ++object) assignment[w.query_of[object]] = object;
}

}  // namespace conddetr::match::CONDDETR_LEVEL
