# jemalloc under names of its own: the program's malloc stays the program's, and nobody sees this one.
#
# Debian's static library has the plain names (malloc, free, mallctl...). Every symbol that it defines is renamed to sdpje_NAME in
# a copy, so that inside our library malloc still means the program's. What else is changed in the copy: rename_symbols.
#
# Costs of having it linked in: about 50 us at the start of a program for relocations, 2.6 KiB of initial-exec TLS per thread (so
# the library must be preloaded or linked; dlopen() may find no room for it), nothing else before the first heap.
set(JEMALLOC_ARCHIVE_NAMES libjemalloc_pic.a)
find_library(JEMALLOC_ARCHIVE NAMES ${JEMALLOC_ARCHIVE_NAMES} REQUIRED)
set(SDPJE_ARCHIVE ${CMAKE_BINARY_DIR}/libsdpje.a)
add_custom_command(
  OUTPUT ${SDPJE_ARCHIVE}
  COMMAND ${CMAKE_SOURCE_DIR}/cmake/rename_symbols ${JEMALLOC_ARCHIVE} ${SDPJE_ARCHIVE} sdpje_
  DEPENDS ${JEMALLOC_ARCHIVE} ${CMAKE_SOURCE_DIR}/cmake/rename_symbols
  VERBATIM)
add_custom_target(sdpje_archive DEPENDS ${SDPJE_ARCHIVE})
add_library(sdpje STATIC IMPORTED GLOBAL)
set_target_properties(sdpje PROPERTIES IMPORTED_LOCATION ${SDPJE_ARCHIVE})
add_dependencies(sdpje sdpje_archive)
target_link_libraries(sdpje INTERFACE Threads::Threads ${CMAKE_DL_LIBS})
