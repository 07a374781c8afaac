# cmake -DNM=nm -DLIBRARY=lib.so -DOBJECTS=a.o;b.o -DOPTIMIZED=1 -P symbols_test.cmake
#
# The library exports RegisterCustomOps alone. Objects with instructions that not every CPU has
# define no weak symbols: the linker might use such a copy of an inline function everywhere.
execute_process(COMMAND ${NM} -D --defined-only ${LIBRARY} OUTPUT_VARIABLE exported
                COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" lines "${exported}")
list(LENGTH lines count)
if(NOT count EQUAL 1 OR NOT exported MATCHES " T RegisterCustomOps\n")
  message(FATAL_ERROR "${LIBRARY} exports:\n${exported}")
endif()
if(OPTIMIZED)
  foreach(object IN LISTS OBJECTS)
    execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols
                    COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[^\n]+ [VWu] [^\n]+" weak "${symbols}")
    if(weak)
      message(FATAL_ERROR "${object} defines weak symbols:\n${weak}")
    endif()
  endforeach()
else()
  message("not optimized: weak symbols in the kernels are expected and not checked")
endif()
