// Counts launches by kernel, waits and copies, and returns them as JSON.
#include "null_gpu.h"

#include <stdio.h>

Counts counts;
pthread_mutex_t books = PTHREAD_MUTEX_INITIALIZER;

enum { SLOTS = 1 << 16 };
static struct {
  const void *kernel;
  char *name;
  long launches;
} kernels[SLOTS];

// Launches and clearings of memory since the last reset, in order; those after the first LOGGED are only counted.
enum { LOGGED = 1 << 14 };
static struct {
  const void *kernel;
  dim3 grid, block;
  size_t bytes;
} entries[LOGGED];
static int logged;

// The slot of a kernel: open addressing, never full in practice (PyTorch has some 20,000 kernels).
static int slot_of(const void *kernel) {
  size_t slot = ((size_t)kernel >> 4) * 2654435761u % SLOTS;
  while (kernels[slot].kernel != NULL && kernels[slot].kernel != kernel) slot = (slot + 1) % SLOTS;
  kernels[slot].kernel = kernel;
  return (int)slot;
}

void name_kernel(const void *kernel, const char *name) {
  pthread_mutex_lock(&books);
  const int slot = slot_of(kernel);
  // The handle may have the address of an earlier kernel.
  if (kernels[slot].name == NULL || strcmp(kernels[slot].name, name) != 0) kernels[slot].name = strdup(name);
  pthread_mutex_unlock(&books);
}

static void log_entry(const void *kernel, dim3 grid, dim3 block, size_t bytes) {
  if (logged == LOGGED) return;
  entries[logged].kernel = kernel;
  entries[logged].grid = grid;
  entries[logged].block = block;
  entries[logged].bytes = bytes;
  logged++;
}

void count_launch(const void *kernel, dim3 grid, dim3 block, size_t shared) {
  pthread_mutex_lock(&books);
  log_entry(kernel, grid, block, shared);
  counts.launches++;
  counts.launches_by_device[current_device]++;
  kernels[slot_of(kernel)].launches++;
  pthread_mutex_unlock(&books);
}

// A library call that would launch at least one kernel; `name` must live as long as the process.
void null_gpu_library_call(const char *name) {
  name_kernel(name, name);
  count_launch(name, (dim3){0}, (dim3){0}, 0);
}

void count_memset(size_t bytes) {
  static const char name[] = "memset";
  name_kernel(name, name);
  pthread_mutex_lock(&books);
  counts.memsets++;
  log_entry(name, (dim3){0}, (dim3){0}, bytes);
  pthread_mutex_unlock(&books);
}

void null_gpu_reset(void) {
  pthread_mutex_lock(&books);
  memset(&counts, 0, sizeof counts);
  logged = 0;
  for (int slot = 0; slot < SLOTS; slot++) kernels[slot].launches = 0;
  pthread_mutex_unlock(&books);
}

// Launches, waits, and copies with memsets so far; fast enough for a call after every operation.
void null_gpu_totals(long totals[3]) {
  pthread_mutex_lock(&books);
  totals[0] = counts.launches;
  totals[1] = counts.waits;
  totals[2] = counts.to_device + counts.from_device + counts.within_device + counts.memsets;
  pthread_mutex_unlock(&books);
}

static const char *name_of(int slot) { return kernels[slot].name ? kernels[slot].name : "unknown"; }

static void write_counts(FILE *file) {
  const struct {
    const char *name;
    long value;
  } numbers[] = {
      {"launches", counts.launches},
      {"graph_launches", counts.graph_launches},
      {"waits", counts.waits},
      {"to_device", counts.to_device},
      {"from_device", counts.from_device},
      {"within_device", counts.within_device},
      {"bytes_to_device", counts.bytes_to_device},
      {"bytes_from_device", counts.bytes_from_device},
      {"bytes_within_device", counts.bytes_within_device},
      {"memsets", counts.memsets},
      {"allocations", counts.allocations},
      {"modules", counts.modules},
      {"refused_in_capture", counts.refused_in_capture},
  };
  fprintf(file, "{");
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
    fprintf(file, "\"%s\": %ld, ", numbers[i].name, numbers[i].value);
  }
  fprintf(file, "\"launches_by_device\": [");
  for (int i = 0; i < device_count(); i++) fprintf(file, "%s%ld", i ? ", " : "", counts.launches_by_device[i]);
  // A list, not an object: several kernels may have one name.
  fprintf(file, "], \"kernels\": [");
  const char *separator = "";
  for (int slot = 0; slot < SLOTS; slot++) {
    if (kernels[slot].launches == 0) continue;
    fprintf(file, "%s[\"%s\", %ld]", separator, name_of(slot), kernels[slot].launches);
    separator = ", ";
  }
  fprintf(file, "]}");
}

static void write_log(FILE *file) {
  fprintf(file, "[");
  for (int i = 0; i < logged; i++) {
    const dim3 grid = entries[i].grid, block = entries[i].block;
    fprintf(file, "%s[\"%s\", [%u, %u, %u], [%u, %u, %u], %zu]", i ? ", " : "", name_of(slot_of(entries[i].kernel)),
            grid.x, grid.y, grid.z, block.x, block.y, block.z, entries[i].bytes);
  }
  fprintf(file, "]");
}

static char *as_text(void (*write)(FILE *)) {
  char *text = NULL;
  size_t size = 0;
  FILE *file = open_memstream(&text, &size);
  pthread_mutex_lock(&books);
  write(file);
  pthread_mutex_unlock(&books);
  fclose(file);
  return text;
}

// The counts as JSON; the caller frees it.
char *null_gpu_counts(void) { return as_text(write_counts); }

// The log as JSON: kernel, grid, block, bytes of dynamic shared memory (of a memset: bytes cleared); the caller frees
// it.
char *null_gpu_log(void) { return as_text(write_log); }
