# The CUDA library: decides whether it is built, and for which architectures.
#
# Sets BIVLM_HAS_CUDA, or BIVLM_CUDA_REASON, why not, and BIVLM_CUDA_SOURCES and
# BIVLM_CUDA_OPERATOR_SOURCES, which tests/ compiles with the C++ compiler as well.
set(BIVLM_CUDA AUTO CACHE STRING "Build the CUDA library: ON, OFF or AUTO (where nvcc is found)")
set(BIVLM_CUDA_ARCHITECTURES "" CACHE STRING
  "Compute capabilities of the CUDA library, as 87 or 80;87. Empty: all that are known to nvcc")

# Jetson Orin is 87, Thor 110. The PTX of the last one serves newer GPUs.
set(BIVLM_REQUIRED_ARCHITECTURES 75 80 86 87 89 90)  # by the tests
set(known_architectures ${BIVLM_REQUIRED_ARCHITECTURES} 100 110 120)

set(BIVLM_CUDA_SOURCES
  src/cuda/binary_matmul.cu
  src/cuda/binary_matmul_decode.cu
  src/cuda/binary_matmul_prefill.cu
  src/cuda/binary_matmul_prepare.cu
  src/cuda/device.cu
  src/cuda/gated_silu.cu
  src/cuda/token_prune.cu
  src/cuda/token_prune_output.cu
  src/cuda/token_prune_plan.cc
  src/cuda/token_prune_select.cu)
list(TRANSFORM BIVLM_CUDA_SOURCES PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)
# TokenPrune chooses as the CPU does (OPS.md), which rounds products and sums apart (CMakeLists.txt):
# nvcc makes no FMA of two operations; those that the source asks for stay.
set(token_prune_sources ${BIVLM_CUDA_SOURCES})
list(FILTER token_prune_sources INCLUDE REGEX "/token_prune[a-z_]*[.]cu$")
set_source_files_properties(${token_prune_sources} PROPERTIES
  COMPILE_OPTIONS $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false>)
# What makes operators of ONNX Runtime of them.
set(BIVLM_CUDA_OPERATOR_SOURCES
  src/ort/adaptor.cc
  src/ort/binary_matmul_inputs.cc
  src/ort/product.cc
  src/ort/gated_silu_inputs.cc
  src/ort/register.cc
  src/ort/token_prune_inputs.cc
  src/ort_cuda/binary_matmul_op.cc
  src/ort_cuda/gated_silu_op.cc
  src/ort_cuda/gpu_call.cc
  src/ort_cuda/library.cc
  src/ort_cuda/token_prune_op.cc)
list(TRANSFORM BIVLM_CUDA_OPERATOR_SOURCES PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)

function(bivlm_find_cuda)
  set(BIVLM_HAS_CUDA OFF PARENT_SCOPE)
  string(TOUPPER "${BIVLM_CUDA}" wanted)
  if(NOT wanted MATCHES "^(ON|OFF|AUTO)$")
    message(FATAL_ERROR "BIVLM_CUDA is '${BIVLM_CUDA}', expected ON, OFF or AUTO")
  endif()
  if(wanted STREQUAL "OFF")
    set(BIVLM_CUDA_REASON "BIVLM_CUDA is OFF" PARENT_SCOPE)
    return()
  endif()
  if(CMAKE_CROSSCOMPILING)
    set(BIVLM_CUDA_REASON "it is built on the device, not cross-compiled" PARENT_SCOPE)
    return()
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(BIVLM_CUDA_REASON
      "no working nvcc was found; install the CUDA toolkit or set CUDACXX to its nvcc" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE listed
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9]+" listed "${listed}")
  set(architectures ${BIVLM_CUDA_ARCHITECTURES})
  if(NOT architectures)
    set(architectures ${known_architectures})
    list(JOIN listed "|" any)
    list(FILTER architectures INCLUDE REGEX "^(${any})$")
  endif()
  foreach(architecture IN LISTS architectures)
    if(NOT architecture IN_LIST listed)
      message(FATAL_ERROR "BIVLM_CUDA_ARCHITECTURES names ${architecture}, which "
        "${CMAKE_CUDA_COMPILER} does not know; it knows ${listed}")
    endif()
  endforeach()
  set(BIVLM_HAS_CUDA ON PARENT_SCOPE)
  set(BIVLM_BUILT_ARCHITECTURES ${architectures} PARENT_SCOPE)
endfunction()

# bivlm_say(text): a line of what CMake prints. pip keeps that to itself (but for pip install -v), so
# that under pip the line goes to the terminal, too, where there is one.
function(bivlm_say text)
  message(STATUS "${text}")
  if(SKBUILD)
    execute_process(COMMAND sh -c "printf '\\n%s\\n' \"$1\" >/dev/tty" sh "bivlm-edge: ${text}"
                    RESULT_VARIABLE no_terminal ERROR_QUIET)
  endif()
endfunction()

bivlm_find_cuda()
if(BIVLM_HAS_CUDA)
  bivlm_say("CUDA library: built for ${BIVLM_BUILT_ARCHITECTURES} with ${CMAKE_CUDA_COMPILER}")
elseif(BIVLM_CUDA MATCHES "^[Oo][Nn]$")
  message(FATAL_ERROR "BIVLM_CUDA=ON, but the CUDA library cannot be built: ${BIVLM_CUDA_REASON}")
else()
  bivlm_say("CUDA library: not built, ${BIVLM_CUDA_REASON}")
endif()

# bivlm_use_cuda(target): its .cu files are compiled for all architectures; beside each object file
# stands what ptxas said, which cuda_resources_test reads.
function(bivlm_use_cuda target)
  set(code ${BIVLM_BUILT_ARCHITECTURES})
  list(POP_BACK code newest)
  list(TRANSFORM code APPEND -real)
  set_target_properties(${target} PROPERTIES
    CUDA_ARCHITECTURES "${code};${newest}"
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_EXTENSIONS OFF
    CUDA_VISIBILITY_PRESET hidden
    # A copy of the CUDA runtime of our own: it shares the driver's context and streams with that of
    # ONNX Runtime, whatever version that one is, and needs no libcudart beside it.
    CUDA_RUNTIME_LIBRARY Static
    CUDA_COMPILER_LAUNCHER ${CMAKE_CURRENT_SOURCE_DIR}/cmake/record_ptxas.sh)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>
    $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${BIVLM_WERROR}>>:-Werror=all-warnings>)
endfunction()
