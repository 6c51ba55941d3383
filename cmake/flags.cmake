# Warnings and flags of every target of ours: link to sdpreload_flags.
add_library(sdpreload_flags INTERFACE)
target_include_directories(sdpreload_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(sdpreload_flags INTERFACE
  -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Wcast-align=strict -Wno-missing-field-initializers
  -fvisibility=hidden -fvisibility-inlines-hidden -fno-plt)
target_compile_options(sdpreload_flags INTERFACE $<$<CONFIG:Release,RelWithDebInfo>:-O2>)
find_package(Threads REQUIRED)
target_link_libraries(sdpreload_flags INTERFACE Threads::Threads)
if(SDPRELOAD_SANITIZE)
  target_compile_options(sdpreload_flags INTERFACE -fsanitize=${SDPRELOAD_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  target_link_options(sdpreload_flags INTERFACE -fsanitize=${SDPRELOAD_SANITIZE})
endif()
