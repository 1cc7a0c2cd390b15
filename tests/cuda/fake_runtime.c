/* The calls of a run time on top of fake_driver.c: each is written down, memory is real, what is
 * given out and not taken back is counted, and any call can be told to fail. */
#include <stdio.h>
#include <stdlib.h>

#define cuDeviceGetAttribute attribute_of_the_kernels
#include "fake_driver.c"
#undef cuDeviceGetAttribute

enum { MAX_LOG = 1 << 16 };
char fake_log[MAX_LOG];
char fake_fails[64];     /* name of the call that fails */
int fake_fails_with;     /* its CUresult */
int fake_fails_after;    /* this many successes first */
int fake_live;           /* handles and memory given out and not given back */
int fake_integrated;
void *fake_capturing;            /* the stream that is being captured */
int fake_capture;                /* which capture that is */
void (*fake_replay)(int capture);
static int capture_of[1 << 16];  /* by handle of a graph */
void *fake_pointer_context = (void *)0xc0;
int fake_pointer_ordinal;
static void *current[16];
static int depth;
static uintptr_t next_handle = 0x1000;
static double now_ms;

static int note(const char *name, const char *arguments) {
    size_t used = strlen(fake_log);
    snprintf(fake_log + used, MAX_LOG - used, "%s(%s)\n", name, arguments);
    if (strcmp(name, fake_fails) == 0 && fake_fails_after-- <= 0) return fake_fails_with;
    return 0;
}

#define CALL(name, format, ...)                                    \
    char text[160];                                                \
    snprintf(text, sizeof text, format, __VA_ARGS__);              \
    int result = note(name, text);                                 \
    if (result) return result

#define X(value) ((unsigned long long)(uintptr_t)(value))
#define CAPTURE(graph) capture_of[(X(graph) >> 4) & 0xffff]

static void give(void **target) { *target = (void *)(next_handle += 0x10), fake_live++; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute == 16) return *value = 8, 0;
    if (attribute == 18) return *value = fake_integrated, 0;
    return attribute_of_the_kernels(value, attribute, device);
}
int cuDeviceGet(int *device, int ordinal) { CALL("cuDeviceGet", "%d", ordinal); *device = 3; return 0; }
int cuDeviceGetName(char *name, int size, int device) { CALL("cuDeviceGetName", "%d", device); snprintf(name, (size_t)size, "Orin"); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { CALL("cuDeviceTotalMem", "%d", device); *size = 8ull << 30; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { CALL("cuDevicePrimaryCtxRetain", "%d", device); *context = (void *)0xc0; fake_live++; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { CALL("cuDevicePrimaryCtxRelease", "%d", device); fake_live--; return 0; }
int cuCtxGetCurrent(void **context) { CALL("cuCtxGetCurrent", "%s", ""); *context = depth ? current[depth - 1] : 0; return 0; }
int cuCtxPushCurrent_v2(void *context) { CALL("cuCtxPushCurrent", "%#llx", X(context)); current[depth++] = context; return 0; }
int cuCtxPopCurrent_v2(void **context) { CALL("cuCtxPopCurrent", "%s", ""); *context = current[--depth]; return 0; }
int cuStreamCreate(void **stream, unsigned flags) { CALL("cuStreamCreate", "%u", flags); give(stream); return 0; }
int cuStreamDestroy_v2(void *stream) { CALL("cuStreamDestroy", "%#llx", X(stream)); fake_live--; return 0; }
int cuStreamSynchronize(void *stream) { CALL("cuStreamSynchronize", "%#llx", X(stream)); return 0; }
int cuStreamBeginCapture_v2(void *stream, int mode) { CALL("cuStreamBeginCapture", "%#llx, %d", X(stream), mode); fake_capturing = stream, fake_capture++; return 0; }
int cuStreamEndCapture(void *stream, void **graph) { fake_capturing = 0; CALL("cuStreamEndCapture", "%#llx", X(stream)); give(graph); CAPTURE(*graph) = fake_capture; return 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { CALL("cuStreamWaitEvent", "%#llx, %#llx, %u", X(stream), X(event), flags); return 0; }
int cuGraphInstantiateWithFlags(void **made, void *graph, unsigned long long flags) { CALL("cuGraphInstantiate", "%#llx, %llu", X(graph), flags); give(made); CAPTURE(*made) = CAPTURE(graph); return 0; }
int cuGraphLaunch(void *made, void *stream) { CALL("cuGraphLaunch", "%#llx, %#llx", X(made), X(stream)); if (fake_replay) fake_replay(CAPTURE(made)); return 0; }
int cuGraphExecDestroy(void *made) { CALL("cuGraphExecDestroy", "%#llx", X(made)); fake_live--; return 0; }
int cuGraphDestroy(void *graph) { CALL("cuGraphDestroy", "%#llx", X(graph)); fake_live--; return 0; }
int cuEventCreate(void **event, unsigned flags) { CALL("cuEventCreate", "%u", flags); give(event); return 0; }
int cuEventDestroy_v2(void *event) { CALL("cuEventDestroy", "%#llx", X(event)); fake_live--; return 0; }
int cuEventRecord(void *event, void *stream) { CALL("cuEventRecord", "%#llx, %#llx", X(event), X(stream)); return 0; }
int cuEventSynchronize(void *event) { CALL("cuEventSynchronize", "%#llx", X(event)); return 0; }
int cuEventElapsedTime(float *ms, void *begin, void *end) { CALL("cuEventElapsedTime", "%#llx, %#llx", X(begin), X(end)); now_ms += 0.5; *ms = (float)now_ms; return 0; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { CALL("cuMemGetInfo", "%s", ""); *free_bytes = 1u << 30; *total = 8ull << 30; return 0; }
int cuMemAlloc_v2(unsigned long long *address, size_t size) { CALL("cuMemAlloc", "%zu", size); *address = X(calloc(1, size)); fake_live++; return 0; }
int cuMemFree_v2(unsigned long long address) { CALL("cuMemFree", "%s", ""); free((void *)(uintptr_t)address); fake_live--; return 0; }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) { CALL("cuMemHostAlloc", "%zu, %u", size, flags); *address = calloc(1, size); fake_live++; return 0; }
int cuMemFreeHost(void *address) { CALL("cuMemFreeHost", "%s", ""); free(address); fake_live--; return 0; }
int cuMemHostGetDevicePointer_v2(unsigned long long *address, void *host, unsigned flags) { CALL("cuMemHostGetDevicePointer", "%u", flags); *address = X(host); return 0; }
int cuMemcpyHtoDAsync_v2(unsigned long long target, const void *host, size_t size, void *stream) { CALL("cuMemcpyHtoDAsync", "%zu, %#llx", size, X(stream)); memcpy((void *)(uintptr_t)target, host, size); return 0; }
int cuMemcpyDtoHAsync_v2(void *host, unsigned long long source, size_t size, void *stream) { CALL("cuMemcpyDtoHAsync", "%zu, %#llx", size, X(stream)); memcpy(host, (void *)(uintptr_t)source, size); return 0; }
int cuPointerGetAttribute(void *data, int attribute, unsigned long long address) { CALL("cuPointerGetAttribute", "%d, %#llx", attribute, address); if (attribute == 9) return *(int *)data = fake_pointer_ordinal, 0; *(void **)data = fake_pointer_context; return 0; }
