# cmake -DREADELF=readelf -DLIBRARIES=a.so;b.so -P links_test.cmake
#
# No library needs one of CUDA or of ONNX Runtime to be loaded.
foreach(library IN LISTS LIBRARIES)
  execute_process(COMMAND ${READELF} -d ${library} OUTPUT_VARIABLE dynamic
                  COMMAND_ERROR_IS_FATAL ANY)
  if(NOT dynamic MATCHES "NEEDED")
    message(FATAL_ERROR "${library}: readelf lists no needed library at all:\n${dynamic}")
  endif()
  string(REGEX MATCHALL "NEEDED[^\n]*lib(cuda|cublas|nv|onnxruntime)[^\n]*" unwanted "${dynamic}")
  if(unwanted)
    message(FATAL_ERROR "${library} needs ${unwanted}")
  endif()
endforeach()
