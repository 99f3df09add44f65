// Sums of backward over the tiles of one head of one image, for the gradients that need all of them.
#pragma once

#include "attn/cpu/shape.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

template <typename Real>
struct Partial {
  Partial(const Problem& p, const Shape<Real>& shape, Arena& arena)
      : queries(round_up(p.queries, kBlockQueries)),
        content(arena.take<Real>(queries * shape.content)),
        rows(arena.take<Real>(p.is_separable() ? queries * shape.height : 0)),
        columns(arena.take<Real>(p.is_separable() ? queries * shape.width : 0)) {}
  int64_t queries;
  Real* content;  // [block][panel][kRows][kPanel]: gradient of the content query, before `scale`
  Real* rows;     // [queries][Shape::height]: Σ over x of dS
  Real* columns;  // [queries][Shape::width]: Σ over y of dS
};

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
