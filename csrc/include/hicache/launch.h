// The CPU launchers, called by the Python bindings. Arguments are validated by the caller.
#pragma once

#include "hicache/cpu.h"

namespace hicache {

const char* cpu_isa();  // "avx512", "avx2" or "baseline": what this process runs
void cpu_update(const cascade_args& args, int threads);
void cpu_update_forecast(const cascade_args& args, int threads);
void cpu_forecast(const cascade_args& args, int threads);  // args.read: coefficients − 1
void cpu_gated_sum(const sum_args& args, int threads);

}  // namespace hicache
