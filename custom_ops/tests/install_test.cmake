# cmake -DBUILD=folder "-DLIBRARIES=a.so;b.so" -P install_test.cmake
#
# Fails where installing a build leaves out one of its operator libraries.
set(prefix ${BUILD}/tests/installed)
file(REMOVE_RECURSE ${prefix})
execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix} OUTPUT_QUIET
                COMMAND_ERROR_IS_FATAL ANY)
file(GLOB found RELATIVE ${prefix}/bivlm_edge/_lib ${prefix}/bivlm_edge/_lib/*)
list(SORT LIBRARIES)
if(NOT found STREQUAL LIBRARIES)
  message(FATAL_ERROR "installed are '${found}' instead of '${LIBRARIES}'")
endif()
