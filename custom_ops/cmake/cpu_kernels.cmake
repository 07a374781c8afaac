# bivlm_add_cpu_kernels(avx2 AVX2 FLAGS -mavx2 -mfma SOURCES src/cpu/avx2/binary_matmul_avx2.cc)
#
# Adds the kernels of one instruction set to bivlm_kernels. FLAGS reach SOURCES alone, and these stay
# out of link-time optimization, so that none of their instructions is inlined into code that runs
# on every CPU. Everything else sees BIVLM_CPU_<macro>, which puts the kernels into the lists.
function(bivlm_add_cpu_kernels isa macro)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "FLAGS;SOURCES")
  add_library(bivlm_cpu_${isa} OBJECT ${arg_SOURCES})
  target_link_libraries(bivlm_cpu_${isa} PRIVATE bivlm_base)
  target_include_directories(bivlm_cpu_${isa} PRIVATE src/cpu)
  target_compile_options(bivlm_cpu_${isa} PRIVATE ${arg_FLAGS})
  set_target_properties(bivlm_cpu_${isa} PROPERTIES INTERPROCEDURAL_OPTIMIZATION OFF)
  target_sources(bivlm_kernels PRIVATE $<TARGET_OBJECTS:bivlm_cpu_${isa}>)
  target_compile_definitions(bivlm_base INTERFACE BIVLM_CPU_${macro})
endfunction()
