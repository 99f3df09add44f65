// Declarations that the parts of the null GPU share. See README.md.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define DEVICE_NAME "NVIDIA H100 80GB HBM3 (null)"
#define DEVICE_BYTES (80ull << 30)
enum { MAX_DEVICES = 8 };

// Counts since the last reset. Guarded by `books`, like everything that threads share.
typedef struct {
  long launches, launches_by_device[MAX_DEVICES];
  long graph_launches;
  long waits;
  long to_device, from_device, within_device;
  long bytes_to_device, bytes_from_device, bytes_within_device;
  long memsets;
  long allocations;
  long modules;
  long refused_in_capture;
} Counts;

extern Counts counts;
extern pthread_mutex_t books;
// This thread's current device.
extern __thread int current_device;

#define COUNT(what)               \
  do {                            \
    pthread_mutex_lock(&books);   \
    counts.what++;                \
    pthread_mutex_unlock(&books); \
  } while (0)

// counts.c: a kernel is identified by an address, of the host function or of a handle.
void name_kernel(const void *kernel, const char *name);
void count_launch(const void *kernel, dim3 grid, dim3 block, size_t shared);
void count_memset(size_t bytes);

// device.c
int device_count(void);
int device_attribute(int attribute);

// streams.c: calls that a capture forbids.
bool is_captured(cudaStream_t stream);
// 0 if a stream belongs to the current device, else CUDA's error.
cudaError_t check_stream(cudaStream_t stream);
// Counts a call that a capture forbids, and returns its error.
cudaError_t refused(void);
// Whether a running capture forbids this thread the calls that CUDA names potentially unsafe.
bool is_unsafe(void);
#define REFUSE_IF_UNSAFE()             \
  do {                                 \
    if (is_unsafe()) return refused(); \
  } while (0)

// memory.c: the owner of an address.
enum Owner { PAGEABLE, PINNED, DEVICE };
enum Owner owner_of(const void *address);
// The device of an address, or -1.
int device_of(const void *address);

// kernels.c
cudaError_t launch_kernel(const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream);
void *handle(void);
