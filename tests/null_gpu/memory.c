// Device memory is host memory, in pages that cost nothing until they are written. Kernels compute nothing, so every
// copy to the host is zeros.
#include "null_gpu.h"

#include <sys/mman.h>

enum { MAX_BLOCKS = 1 << 18 };
static struct {
  char *start;
  size_t size;
  enum Owner owner;
  int device;
} blocks[MAX_BLOCKS];
static int block_count;
static size_t used[MAX_DEVICES];

static cudaError_t allocate(void **address, size_t size, enum Owner owner) {
  pthread_mutex_lock(&books);
  int slot = 0;
  while (slot < block_count && blocks[slot].start != NULL) slot++;
  const bool is_full = owner == DEVICE && used[current_device] + size > DEVICE_BYTES;
  if (is_full || slot == MAX_BLOCKS) {
    pthread_mutex_unlock(&books);
    return cudaErrorMemoryAllocation;
  }
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  blocks[slot].start = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
  blocks[slot].size = size;
  blocks[slot].owner = owner;
  blocks[slot].device = current_device;
  if (slot == block_count) block_count++;
  if (owner == DEVICE) used[current_device] += size;
  counts.allocations++;
  *address = blocks[slot].start;
  pthread_mutex_unlock(&books);
  return cudaSuccess;
}

static cudaError_t release(void *address) {
  pthread_mutex_lock(&books);
  for (int slot = 0; address != NULL && slot < block_count; slot++) {
    if (blocks[slot].start != address) continue;
    munmap(address, blocks[slot].size ? blocks[slot].size : 1);
    if (blocks[slot].owner == DEVICE) used[blocks[slot].device] -= blocks[slot].size;
    blocks[slot].start = NULL;
    break;
  }
  pthread_mutex_unlock(&books);
  return cudaSuccess;
}

// The block that contains an address, or -1.
static int block_of(const void *address) {
  int block = -1;
  pthread_mutex_lock(&books);
  for (int slot = 0; slot < block_count && block < 0; slot++) {
    const char *start = blocks[slot].start, *at = address;
    if (start != NULL && at >= start && at < start + blocks[slot].size) block = slot;
  }
  pthread_mutex_unlock(&books);
  return block;
}

enum Owner owner_of(const void *address) {
  const int block = block_of(address);
  return block < 0 ? PAGEABLE : blocks[block].owner;
}

int device_of(const void *address) {
  const int block = block_of(address);
  return block < 0 ? -1 : blocks[block].device;
}

cudaError_t cudaMalloc(void **address, size_t size) {
  REFUSE_IF_UNSAFE();
  return allocate(address, size, DEVICE);
}

cudaError_t cudaMallocAsync(void **address, size_t size, cudaStream_t stream) {
  return allocate(address, size, DEVICE);
}

cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
  REFUSE_IF_UNSAFE();
  return allocate(address, size, PINNED);
}

cudaError_t cudaMallocHost(void **address, size_t size) { return cudaHostAlloc(address, size, 0); }
cudaError_t cudaFree(void *address) { return release(address); }
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { return release(address); }
cudaError_t cudaFreeHost(void *address) { return release(address); }
cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *address) { return cudaSuccess; }

cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *total = DEVICE_BYTES;
  *available = DEVICE_BYTES - used[current_device];
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
  static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
  memset(attributes, 0, sizeof *attributes);
  attributes->type = types[owner_of(address)];
  attributes->device = device_of(address);
  attributes->devicePointer = attributes->hostPointer = (void *)address;
  return cudaSuccess;
}

static void count_copy(size_t size, enum cudaMemcpyKind kind) {
  pthread_mutex_lock(&books);
  if (kind == cudaMemcpyHostToDevice) {
    counts.to_device++;
    counts.bytes_to_device += (long)size;
  } else if (kind == cudaMemcpyDeviceToHost) {
    counts.from_device++;
    counts.bytes_from_device += (long)size;
  } else {
    counts.within_device++;
    counts.bytes_within_device += (long)size;
  }
  pthread_mutex_unlock(&books);
}

// Only copies to the host are written; device memory is never read.
static void copy(void *target, size_t size, enum cudaMemcpyKind kind) {
  count_copy(size, kind);
  if (kind == cudaMemcpyDeviceToHost) memset(target, 0, size);
}

cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const void *host = kind == cudaMemcpyHostToDevice ? source : kind == cudaMemcpyDeviceToHost ? target : NULL;
  if (is_captured(stream) && host != NULL && owner_of(host) == PAGEABLE) return refused();
  copy(target, size, kind);
  return check_stream(stream);
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
  REFUSE_IF_UNSAFE();
  COUNT(waits);
  copy(target, size, kind);
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  count_copy(width * height, kind);
  for (size_t row = 0; kind == cudaMemcpyDeviceToHost && row < height; row++) {
    memset((char *)target + row * target_pitch, 0, width);
  }
  return check_stream(stream);
}

cudaError_t cudaMemcpyPeerAsync(void *target, int to, const void *source, int from, size_t size, cudaStream_t stream) {
  count_copy(size, cudaMemcpyDeviceToDevice);
  return cudaSuccess;
}

cudaError_t cudaMemset(void *target, int value, size_t size) {
  count_memset(size);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t stream) {
  count_memset(size);
  return check_stream(stream);
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
  *pool = handle();
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  return cudaSuccess;
}
