// For headers that are compiled for both CPU and GPU.
#pragma once

#if defined(__CUDACC__)
#define CONDDETR_BOTH __host__ __device__ __forceinline__
#else
#define CONDDETR_BOTH inline __attribute__((always_inline))
#endif
