# hicache_cpu_kernels(target) adds the CPU kernels to a target, which may be an extension or a program.
find_package(Threads REQUIRED)

function(hicache_cpu_kernels target)
  target_sources(${target} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cpu.cpp)
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/include)
  target_link_libraries(${target} PRIVATE Threads::Threads)
  hicache_kernels_for(${target} baseline)  # 16-byte vectors: SSE2, or NEON on aarch64
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    target_compile_definitions(${target} PRIVATE HICACHE_X86)
    hicache_kernels_for(${target} avx2 -mavx2 -mf16c)
    hicache_kernels_for(${target} avx512 -mavx512f -mavx512bw -mprefer-vector-width=512)
  endif()
endfunction()

# One object library an instruction set; cpu.cpp picks one at run time.
function(hicache_kernels_for target isa)
  add_library(kernels_${isa} OBJECT ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cpu_kernels.cpp)
  target_include_directories(kernels_${isa} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/include)
  target_compile_definitions(kernels_${isa} PRIVATE HICACHE_ISA=${isa} HICACHE_ISA_NAME="${isa}")
  # No contraction: every instruction set gives the reference's bits. (gcc 12 warns of its own AVX-512 headers.)
  target_compile_options(kernels_${isa} PRIVATE -O3 -ffp-contract=off -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized ${ARGN})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:kernels_${isa}>)
endfunction()
