// csrc/archs.h for Python.
#include <cstring>

#include "archs.h"

extern "C" int runs_on(const char* archs, int capability) {
    return fastvid::runs_on(archs, capability);
}

extern "C" void refuse_device(const char* archs, const char* needs, int capability, char* out, int size) {
    std::strncpy(out, fastvid::refuse_device(archs, needs, capability).c_str(), size - 1);
}

extern "C" int oldest_driver(int major) {
    return fastvid::oldest_driver(major);
}

extern "C" void refuse_driver(const char* built, int known, char* out, int size) {
    std::strncpy(out, fastvid::refuse_driver(built, known).c_str(), size - 1);
}
