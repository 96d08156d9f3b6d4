/* A libnvidia-ml.so.1 without a GPU: what it has and how it fails is said in environment variables.
 *
 * FAKE_NVML_CARDS      "name|uuid|bus|total MiB|free MiB|major.minor;..."  in NVML's order
 * FAKE_NVML_MIG        "card|uuid|name|total MiB|free MiB;..."             slices; their cards are in MIG mode
 * FAKE_NVML_PROCESSES  "card|pid|MiB or na|compute or graphics;..."       card "m0" is slice 0
 * FAKE_NVML_RETURNS    "nvmlDeviceGetName=3;..."                           forced return codes
 * FAKE_NVML_HANG       name of a function that never returns
 * Compiled with -DOLD_DRIVER it lacks the symbols that drivers of 2020 lacked.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, LIMIT = 8 };
typedef unsigned long long u64;
typedef struct { char name[96], uuid[96]; unsigned bus, major, minor; int card; u64 total, free; } Gpu;
typedef struct { char legacy[16]; unsigned domain, bus, device, pciDeviceId, pciSubSystemId; char busId[32]; } Pci;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } Memory2;
typedef struct { unsigned pid; u64 used; unsigned gpuInstance, computeInstance; } Process;

static Gpu cards[LIMIT], slices[LIMIT];
static unsigned card_count, slice_count;

static int forced(const char *function) {
    const char *hang = getenv("FAKE_NVML_HANG"), *all = getenv("FAKE_NVML_RETURNS");
    while (hang && !strcmp(hang, function)) sleep(1);
    size_t length = strlen(function);
    for (const char *at = all; at && (at = strstr(at, function)); at += length)
        if (at[length] == '=' && (at == all || at[-1] == ';')) return atoi(at + length + 1);
    return OK;
}
#define ANSWER do { int code = forced(__func__); if (code) return code; } while (0)

static unsigned rows(const char *variable, char copy[4096], char *row[LIMIT]) {
    const char *text = getenv(variable);
    unsigned count = 0;
    char *rest;
    snprintf(copy, 4096, "%s", text ? text : "");
    for (char *one = strtok_r(copy, ";", &rest); one && count < LIMIT; one = strtok_r(NULL, ";", &rest))
        row[count++] = one;
    return count;
}

int nvmlInitWithFlags(unsigned flags) {
    char copy[4096], *row[LIMIT];
    (void)flags;
    ANSWER;
    card_count = rows("FAKE_NVML_CARDS", copy, row);
    for (unsigned i = 0; i < card_count; i++) {
        sscanf(row[i], "%95[^|]|%95[^|]|%x|%llu|%llu|%u.%u", cards[i].name, cards[i].uuid, &cards[i].bus,
               &cards[i].total, &cards[i].free, &cards[i].major, &cards[i].minor);
        cards[i].card = -1;
    }
    slice_count = rows("FAKE_NVML_MIG", copy, row);
    for (unsigned i = 0; i < slice_count; i++)
        sscanf(row[i], "%d|%95[^|]|%95[^|]|%llu|%llu", &slices[i].card, slices[i].uuid, slices[i].name,
               &slices[i].total, &slices[i].free);
    return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { ANSWER; return OK; }
const char *nvmlErrorString(int code) { return code == 999 ? "Unknown Error" : "Fake Error"; }

int nvmlSystemGetDriverVersion(char *out, unsigned n) { ANSWER; snprintf(out, n, "580.65.06"); return OK; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { ANSWER; *out = 13000; return OK; }
int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned n) {
    ANSWER; snprintf(out, n, "/usr/bin/train-%u", pid); return OK;
}
int nvmlDeviceGetCount_v2(unsigned *out) { ANSWER; *out = card_count; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **out) {
    char variable[64];
    ANSWER;
    snprintf(variable, sizeof variable, "FAKE_NVML_LOST_%u", index);
    if (getenv(variable)) return 15; /* GPU_IS_LOST */
    if (index >= card_count) return INVALID_ARGUMENT;
    *out = &cards[index];
    return OK;
}
int nvmlDeviceGetName(Gpu *gpu, char *out, unsigned n) { ANSWER; snprintf(out, n, "%s", gpu->name); return OK; }
int nvmlDeviceGetUUID(Gpu *gpu, char *out, unsigned n) { ANSWER; snprintf(out, n, "%s", gpu->uuid); return OK; }
int nvmlDeviceGetPciInfo_v3(Gpu *gpu, Pci *out) {
    ANSWER; memset(out, 0, sizeof *out); out->bus = gpu->bus; return OK;
}
int nvmlDeviceGetCudaComputeCapability(Gpu *gpu, int *major, int *minor) {
    ANSWER; *major = gpu->major; *minor = gpu->minor; return OK;
}
int nvmlDeviceGetMemoryInfo(Gpu *gpu, Memory *out) {
    ANSWER;
    out->total = gpu->total << 20; out->free = gpu->free << 20; out->used = out->total - out->free;
    return OK;
}
int nvmlDeviceGetEnforcedPowerLimit(Gpu *gpu, unsigned *out) { (void)gpu; ANSWER; *out = 170000; return OK; }
int nvmlDeviceGetPowerManagementLimit(Gpu *gpu, unsigned *out) { (void)gpu; ANSWER; *out = 165000; return OK; }
int nvmlDeviceGetDisplayActive(Gpu *gpu, int *out) { (void)gpu; ANSWER; *out = 1; return OK; }
int nvmlDeviceGetVirtualizationMode(Gpu *gpu, unsigned *out) {
    (void)gpu; ANSWER; *out = getenv("FAKE_NVML_VGPU") ? 2 : 0; return OK;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(Gpu *gpu, Memory2 *out) {
    ANSWER;
    out->total = gpu->total << 20; out->free = gpu->free << 20; out->reserved = 0; out->used = out->total - out->free;
    return OK;
}

static int processes(Gpu *gpu, const char *kind, unsigned *count, Process *out) {
    char copy[4096], *row[LIMIT], card[8], mib[16], what[16];
    unsigned total = rows("FAKE_NVML_PROCESSES", copy, row), pid, found = 0;
    for (unsigned i = 0; i < total; i++) {
        sscanf(row[i], "%7[^|]|%u|%15[^|]|%15s", card, &pid, mib, what);
        Gpu *where = card[0] == 'm' ? &slices[atoi(card + 1)] : &cards[atoi(card)];
        if (where != gpu || strcmp(what, kind)) continue;
        if (found < *count)
            out[found] = (Process){.pid = pid, .used = strcmp(mib, "na") ? strtoull(mib, NULL, 10) << 20 : ~0ULL};
        found++;
    }
    int fits = found <= *count;
    *count = found;
    return fits ? OK : INSUFFICIENT_SIZE;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *gpu, unsigned *count, Process *out) {
    ANSWER; return processes(gpu, "compute", count, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(Gpu *gpu, unsigned *count, Process *out) {
    ANSWER; return processes(gpu, "graphics", count, out);
}

static int slices_of(Gpu *gpu) {
    int found = 0;
    for (unsigned i = 0; i < slice_count; i++) found += &cards[slices[i].card] == gpu;
    return found;
}
int nvmlDeviceGetMigMode(Gpu *gpu, unsigned *current, unsigned *pending) {
    ANSWER;
    if (gpu->major < 8) return NOT_SUPPORTED;
    *current = *pending = slices_of(gpu) > 0;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(Gpu *gpu, unsigned *out) { (void)gpu; ANSWER; *out = 7; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(Gpu *gpu, unsigned index, Gpu **out) {
    ANSWER;
    for (unsigned i = 0; i < slice_count; i++)
        if (&cards[slices[i].card] == gpu && index-- == 0) { *out = &slices[i]; return OK; }
    return NOT_FOUND;
}
int nvmlDeviceGetAttributes_v2(Gpu *gpu, void *out) {
    struct { unsigned counts[6], gpuSlices, computeSlices; u64 megabytes; } *attributes = out;
    ANSWER;
    memset(attributes, 0, sizeof *attributes);
    attributes->gpuSlices = 1;
    attributes->megabytes = gpu->total;
    return OK;
}
#endif
