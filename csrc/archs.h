// Which devices and drivers a build runs on, and why it does not run on another: asked before anything is launched, so
// that no kernel is started that was not compiled. fastvid/ops/dispatch.py asks the same when it binds.
#pragma once

#include <sstream>
#include <string>

namespace fastvid {

// Whether code built for archs ("80;90a") runs on a device (86 for sm_86): sm_80 on any 8.x, sm_90a on 9.0 alone.
inline bool runs_on(const std::string& archs, int capability) {
    std::istringstream list(archs);
    for (std::string arch; std::getline(list, arch, ';');) {
        const int built = std::stoi(arch);
        const bool later = built / 10 == capability / 10 && built < capability;
        if (built == capability || (later && arch.back() != 'a')) return true;
    }
    return false;
}

// Why a kernel cannot run on a device, empty if it can, or if the device is not known (0: CUDA says more of that).
// needs: the only architecture that the kernel is compiled for, or empty where all of archs have it.
inline std::string refuse_device(const std::string& archs, const std::string& needs, int capability) {
    const std::string device = "sm_" + std::to_string(capability);
    const std::string own = std::to_string(capability) + (capability == 90 ? "a" : "");  // Hopper's own instructions
    const std::string& arch = needs.empty() ? own : needs;
    if (capability == 0) return "";
    if (!needs.empty() && !runs_on(needs, capability)) {
        return "this kernel is for sm_" + needs + " alone, and the device is " + device;
    }
    const bool built = needs.empty() ? runs_on(archs, capability) : (";" + archs + ";").find(";" + needs + ";") + 1;
    if (built) return "";
    return "fastvid._C was built for " + archs + ", and the device is " + device + ": build it with " + arch +
           " among FASTVID_CUDA_ARCHS";
}

// The first release of a driver that CUDA of a major version runs on; 0 of a version that is not known here.
inline int oldest_driver(int major) {
    return major == 12 ? 525 : major == 13 ? 580 : 0;
}

// Why a driver cannot run what was built with CUDA `built` ("13.0"), empty if it can. known: the latest CUDA that the
// driver knows (12080 for 12.8; 0 without a driver); within a major version an older one will do.
inline std::string refuse_driver(const std::string& built, int known) {
    const int major = std::stoi(built), release = oldest_driver(major);
    if (known == 0) return "CUDA: there is no driver of NVIDIA's, or this process does not see it";
    if (known / 1000 >= major) return "";
    const std::string version = std::to_string(known / 1000) + "." + std::to_string(known % 1000 / 10);
    const std::string older = major > 12 ? ", or build fastvid with CUDA 12.8, for drivers from r525 on" : "";
    return "the driver is too old: it knows CUDA " + version + ", and fastvid._C was built with CUDA " + built +
           ", which needs a driver from r" + std::to_string(release) + " on; update the driver" + older;
}

}  // namespace fastvid
