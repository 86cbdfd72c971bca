// csrc/on_device.h and tensor_map.h over the pretended runtime and driver of stub/.
#include <cstring>
#include <thread>

#include "on_device.h"
#include "tensor_map.h"

namespace {

constexpr CUresult kNoContext = 201;

CUresult encode_tiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void*, const cuuint64_t*, const cuuint64_t*,
                      const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    if (stub::context < 0) return kNoContext;
    return rank == 3 ? CUDA_SUCCESS : 1;
}

cudaError_t encode(int rank) {
    CUtensorMap made;
    const fastvid::sm90::Map map = {nullptr, rank, {64, 1, 1}, {128, 128}, {64, 1, 1}, {1, 1, 1, 1, 1}};
    return fastvid::sm90::encode(&made, map, true);
}

}  // namespace

void* stub::entry(const char* name) {
    return std::strcmp(name, "cuTensorMapEncodeTiled") ? nullptr : reinterpret_cast<void*>(&encode_tiled);
}

extern "C" {

// On a new thread, of which `current` is the device: what a map of `rank` dimensions gives. told: the device in the
// launch, whose context was bound there, and the device afterwards.
int launch(int device, int current, int rank, int told[3]) {
    int result = 0;
    std::thread([&] {
        stub::device = current;
        result = fastvid::on_device(device, [&] {
            told[0] = stub::device;
            told[1] = stub::context;
            return encode(rank);
        });
        told[2] = stub::device;
    }).join();
    return result;
}
// The same without on_device.
int launch_unbound() {
    int result = 0;
    std::thread([&] { result = encode(3); }).join();
    return result;
}
void set_found(int found) {
    stub::found = found;
}
int lookups() {
    return stub::lookups;
}
}
