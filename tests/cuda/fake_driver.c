/* A libcuda.so.1 for machines without a GPU: answers as its state says and records every call.
 * Tests read and write the state through ctypes; fake_driver.py mirrors the struct. */
#include <stdint.h>
#include <string.h>

enum { MAX_PARAMETERS = 32, MAX_BYTES = 256 };

struct state {
    /* what the driver answers */
    int capability, shared_limit, driver_version;
    int init_result, context_result, cubin_result, ptx_result, launch_result, attribute_result;
    int parameter_count, parameter_sizes[MAX_PARAMETERS];
    /* what it was asked */
    int cubin_loads, ptx_loads, unloads, launches;
    int shared_attribute;
    int ptx_length;
    char entry[64];
    unsigned grid[3], block[3], shared_bytes;
    uint64_t stream;
    int parameter_bytes;
    unsigned char parameters[MAX_BYTES];
} fake;

static int module_handle, function_handle;

int cuInit(unsigned flags) { return flags ? 1 : fake.init_result; }

int cuDriverGetVersion(int *version) {
    *version = fake.driver_version;
    return 0;
}

int cuCtxGetDevice(int *device) {
    *device = 3; /* not 0, so that a forgotten device number shows */
    return fake.context_result;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device != 3) return 101;
    switch (attribute) {
    case 75: *value = fake.capability / 10; return 0;
    case 76: *value = fake.capability % 10; return 0;
    case 97: *value = fake.shared_limit; return 0;
    default: return 1;
    }
}

int cuModuleLoadData(void **module, const void *image) {
    *module = &module_handle;
    if (!memcmp(image, "\177ELF", 4)) {
        fake.cubin_loads++;
        return fake.cubin_result;
    }
    fake.ptx_loads++;
    fake.ptx_length = (int)strlen(image);
    return fake.ptx_result;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    if (module != &module_handle) return 400;
    strncpy(fake.entry, name, sizeof fake.entry - 1);
    *function = &function_handle;
    return 0;
}

int cuModuleUnload(void *module) {
    fake.unloads++;
    return module == &module_handle ? 0 : 400;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    if (function != &function_handle || attribute != 8) return 1;
    fake.shared_attribute = value;
    return fake.attribute_result;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
    if (function != &function_handle || extra) return 400;
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    memcpy(fake.grid, grid, sizeof grid);
    memcpy(fake.block, block, sizeof block);
    fake.shared_bytes = shared;
    fake.stream = (uint64_t)(uintptr_t)stream;
    fake.launches++;
    int offset = 0;
    memset(fake.parameters, 0, sizeof fake.parameters);
    for (int i = 0; i < fake.parameter_count; i++) {
        int size = fake.parameter_sizes[i];
        offset = (offset + size - 1) / size * size;
        memcpy(fake.parameters + offset, parameters[i], (size_t)size);
        offset += size;
    }
    fake.parameter_bytes = offset;
    return fake.launch_result;
}
