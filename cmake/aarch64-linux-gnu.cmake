# Cross build for aarch64 with Debian's g++-aarch64-linux-gnu. FLASHDELTA_SYSROOT is a folder with the arm64 packages of the libraries
# (tools/aarch64_test.sh makes one); tests run under qemu-user.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)

list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES FLASHDELTA_SYSROOT)
if(FLASHDELTA_SYSROOT)
  set(CMAKE_FIND_ROOT_PATH ${FLASHDELTA_SYSROOT})
  set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
  set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
  set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
  set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
  include_directories(SYSTEM ${FLASHDELTA_SYSROOT}/usr/include)
  set(sysroot_libraries ${FLASHDELTA_SYSROOT}/usr/lib/aarch64-linux-gnu)
  add_link_options(-L${sysroot_libraries} -Wl,-rpath-link,${sysroot_libraries})
endif()

find_program(FLASHDELTA_QEMU NAMES qemu-aarch64-static qemu-aarch64)
if(FLASHDELTA_QEMU)
  # The cross compiler's own libraries are the run-time system; the sysroot only adds to it.
  set(CMAKE_CROSSCOMPILING_EMULATOR ${FLASHDELTA_QEMU} -L /usr/aarch64-linux-gnu -E LD_LIBRARY_PATH=${sysroot_libraries})
endif()
