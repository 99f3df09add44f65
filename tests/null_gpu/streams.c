// Streams, events and captures: nothing runs on them, but calls that CUDA forbids during a capture are refused.
#include "null_gpu.h"

typedef struct {
  int device;
  bool captured;
} Stream;

typedef struct {
  bool captured;
} Event;

enum { MAX_CAPTURED = 256 };
// One capture at a time, as PyTorch makes them.
static struct {
  bool runs;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  unsigned long long id;
  Stream *streams[MAX_CAPTURED];
  int count;
} capture;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
// The handles of default streams are small numbers; these streams cannot be captured.
static bool is_default(cudaStream_t stream) { return (size_t)stream < 16; }
static Stream *stream_of(cudaStream_t stream) { return (Stream *)stream; }

bool is_captured(cudaStream_t stream) { return !is_default(stream) && stream_of(stream)->captured; }

cudaError_t check_stream(cudaStream_t stream) {
  return is_default(stream) || stream_of(stream)->device == current_device ? cudaSuccess
                                                                           : cudaErrorInvalidResourceHandle;
}

cudaError_t refused(void) {
  COUNT(refused_in_capture);
  return cudaErrorStreamCaptureUnsupported;
}

bool is_unsafe(void) {
  if (!capture.runs || capture.mode == cudaStreamCaptureModeRelaxed || thread_mode == cudaStreamCaptureModeRelaxed) {
    return false;
  }
  const bool is_mine = pthread_equal(capture.thread, pthread_self());
  const bool is_local =
      capture.mode == cudaStreamCaptureModeThreadLocal || thread_mode == cudaStreamCaptureModeThreadLocal;
  return is_mine || !is_local;
}

static void join_capture(Stream *stream) {
  if (stream->captured || capture.count == MAX_CAPTURED) return;
  stream->captured = true;
  capture.streams[capture.count++] = stream;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  Stream *made = calloc(1, sizeof(Stream));
  made->device = current_device;
  *stream = (cudaStream_t)made;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

// Not freed: PyTorch keeps its streams forever, and use of a freed stream would crash.
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  REFUSE_IF_UNSAFE();
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_captured(stream)) return refused();
  REFUSE_IF_UNSAFE();
  COUNT(waits);
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  // A stream that waits for a captured event joins the capture.
  if (capture.runs && event != NULL && ((Event *)event)->captured && !is_default(stream)) {
    join_capture(stream_of(stream));
  }
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if (is_default(stream) || capture.runs) return cudaErrorStreamCaptureUnsupported;
  capture.runs = true;
  capture.mode = mode;
  capture.thread = pthread_self();
  capture.id++;
  capture.count = 0;
  join_capture(stream_of(stream));
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  if (!capture.runs) return cudaErrorIllegalState;
  for (int i = 0; i < capture.count; i++) capture.streams[i]->captured = false;
  capture.runs = false;
  *graph = handle();
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  static cudaGraphNode_t none[1];
  static int some_graph;
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capture.id;
  if (graph) *graph = (cudaGraph_t)&some_graph;
  if (dependencies) *dependencies = none;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  const enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t *dependencies,
                                                const cudaGraphEdgeData *edges, size_t count, unsigned flags) {
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  if (!is_captured(stream)) function(data);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = calloc(1, sizeof(Event));
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const cudaError_t error = check_stream(stream);
  if (error == cudaSuccess) ((Event *)event)->captured = is_captured(stream);
  return error;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (capture.runs && ((Event *)event)->captured) return refused();
  REFUSE_IF_UNSAFE();
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  REFUSE_IF_UNSAFE();
  COUNT(waits);
  return cudaSuccess;
}

// Not zero, because callers divide by it. It is not a measured time: see README.md.
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 0.01f;
  return cudaSuccess;
}

cudaError_t cudaGraphCreate(cudaGraph_t *graph, unsigned flags) {
  *graph = handle();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  *made = handle();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(made, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  COUNT(graph_launches);
  return check_stream(stream);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t *made, void *data, cudaHostFn_t destroy, unsigned count,
                                 unsigned flags) {
  *made = handle();
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) {
  return cudaSuccess;
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaSuccess; }
