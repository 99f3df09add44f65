#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace conddetr {

char* scratch(size_t bytes) {
  struct Buffer {
    ~Buffer() { std::free(start); }
    char* start = nullptr;
    size_t size = 0;
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.start);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.start = static_cast<char*>(std::aligned_alloc(64, buffer.size));
    if (buffer.start == nullptr) {
      buffer.size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.start;
}

}  // namespace conddetr
