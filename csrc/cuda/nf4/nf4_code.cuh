// The NF4 table where kernels can read it, filled from the one in common/nf4.h: an array of the
// host is out of a kernel's reach.
#pragma once

#include "common/nf4.h"

namespace pylora::cuda {

static __constant__ float nf4_code[kNF4Size] = {
    kNF4Code[0],  kNF4Code[1],  kNF4Code[2],  kNF4Code[3],  kNF4Code[4],  kNF4Code[5],
    kNF4Code[6],  kNF4Code[7],  kNF4Code[8],  kNF4Code[9],  kNF4Code[10], kNF4Code[11],
    kNF4Code[12], kNF4Code[13], kNF4Code[14], kNF4Code[15],
};

}  // namespace pylora::cuda
